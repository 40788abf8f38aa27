"""SBER-MoVQGAN (ai-forever/MoVQGAN 2023): MoVQ (Zheng et al. 2022) under taming's names, files `movqgan_*.ckpt`.

The encoder is taming's. The decoder's norms are modulated by the codes' vectors, as in diffusers' MoVQ, where the norm
of an attention has another name.
"""

from collections.abc import Sequence
from pathlib import Path

from stage1_tokenizer.bottlenecks import VQConfig
from stage1_tokenizer.convert.taming import FILES, SETTINGS, compare, model_settings, open_checkpoint
from stage1_tokenizer.convert.vqgan import SPATIAL, TAMING, Converted, read_vqgan, refuse_other_families
from tessera.config import Origin

FAMILY = "sber-movqgan"
NAMES = TAMING._replace(modulated=True, modulated_attention_norm="norm")


def read(sources: Sequence[Path]) -> Converted:
    """From `movqgan_270M.ckpt` or another size, with its YAML if that is given, or from the folder of both."""
    weights, settings = open_checkpoint(sources, FILES, SETTINGS)
    refuse_other_families(weights, FAMILY, SPATIAL)
    arguments = model_settings(settings)
    codes = compare(weights, NAMES.codebook, arguments)
    origin = Origin(
        family=FAMILY,
        project="ai-forever/MoVQGAN",
        files=(weights.where,),
        code_licence="Apache-2.0",
        weights_licence="see the model page, ai-forever/MoVQGAN",
    )
    size = arguments.get("resolution")
    bottleneck = VQConfig(codebook_size=codes)
    return read_vqgan(weights, NAMES, bottleneck, origin, image_size=size if isinstance(size, int) else None)
