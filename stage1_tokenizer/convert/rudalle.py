"""ruDALL-E's VAE (Sber AI 2021): taming's GumbelVQ under taming's names; its wavelet variant is refused."""

from collections.abc import Sequence
from pathlib import Path

from stage1_tokenizer.convert.taming import GUMBEL, model_settings, open_checkpoint, read_taming
from stage1_tokenizer.convert.vqgan import Converted, refuse_other_families
from tessera.config import Origin
from tessera.errors import InputError

FAMILY = "rudalle-vqgan"


def read(sources: Sequence[Path]) -> Converted:
    """From `vqgan.gumbelf8-sber.model.ckpt` or its folder."""
    weights, settings = open_checkpoint(sources, ("vqgan.gumbelf8-sber.model.ckpt", "*.ckpt"), ("*.yaml",))
    if any(name.startswith("model.decoder.idwt.") or name.startswith("decoder.idwt.") for name in weights.tensors):
        raise InputError(
            f"{weights.where} is ruDALL-E's wavelet VAE; give the plain one, vqgan.gumbelf8-sber.model.ckpt "
            "of sberbank-ai/rudalle-utils"
        )
    refuse_other_families(weights, FAMILY, GUMBEL.codebook)
    origin = Origin(
        family=FAMILY,
        project="ai-forever/ru-dalle",
        files=(weights.where,),
        code_licence="Apache-2.0",
        weights_licence="see the model page, sberbank-ai/rudalle-utils",
    )
    return read_taming(weights, FAMILY, origin, model_settings(settings))
