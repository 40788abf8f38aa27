"""The image tokenizer of Chameleon (Chameleon Team 2024): taming's VQGAN, files `vqgan.ckpt` and `vqgan.yaml`.

Anole, Lumina-mGPT and Liquid use the same files. transformers' layout of Chameleon (`model.vqmodel.*`) has the encoder
and no decoder, so no image could be made with it, and it is refused.
"""

from collections.abc import Sequence
from pathlib import Path

from stage1_tokenizer.convert.taming import (
    FILES,
    IBQ_INSTEAD,
    SETTINGS,
    is_ibq,
    model_settings,
    open_checkpoint,
    read_taming,
    says_ibq,
)
from stage1_tokenizer.convert.vqgan import Converted
from tessera.config import Origin
from tessera.errors import InputError
from tessera.weights.foreign import Weights

FAMILY = "chameleon-vq"
OWN_FILES = ("vqgan.ckpt", "tokenizer/vqgan.ckpt", "vqgan*.ckpt", *FILES)
OWN_SETTINGS = ("tokenizer/*.yaml", *SETTINGS)
IMAGE_SIZE = 512  # of the published one


def read(sources: Sequence[Path]) -> Converted:
    """From `vqgan.ckpt`, with `vqgan.yaml` if that is given, or from the folder of both."""
    weights, settings = open_checkpoint(sources, OWN_FILES, OWN_SETTINGS)
    if is_ibq(settings) or says_ibq(sources):
        raise InputError(f"{weights.where} is {IBQ_INSTEAD}")
    _refuse_transformers(weights)
    origin = Origin(
        family=FAMILY,
        project="facebookresearch/chameleon",
        files=(weights.where,),
        code_licence="Chameleon License",
        weights_licence="Chameleon Research License",
    )
    return read_taming(weights, FAMILY, origin, model_settings(settings), image_size=IMAGE_SIZE)


def _refuse_transformers(weights: Weights) -> None:
    inside = any("vqmodel.encoder." in name for name in weights.tensors)
    alone = "encoder.conv_in.weight" in weights and not any(name.startswith("decoder.") for name in weights.tensors)
    if inside or alone:
        raise InputError(
            f"{weights.where} is in transformers' layout of Chameleon, which leaves the decoder out; give vqgan.ckpt "
            "and vqgan.yaml of the original, in its folder tokenizer"
        )
