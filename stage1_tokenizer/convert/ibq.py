"""IBQ's tokenizers (Shi et al. 2024, arXiv 2412.02692), of TencentARC/SEED-Voken and of Emu3.5: taming's network.

They have taming's names, so that nothing but their settings tells them from it. A code is the largest of the softmax of
dot products, and not the nearest vector. SEED-Voken's checkpoints hold a moving average too, which it evaluates.
"""

from collections.abc import Sequence
from pathlib import Path

from stage1_tokenizer.convert.taming import (
    FILES,
    SETTINGS,
    is_ibq,
    model_settings,
    open_checkpoint,
    read_taming,
    target,
)
from stage1_tokenizer.convert.vqgan import TAMING, Converted, refuse_other_families
from tessera.config import Origin
from tessera.errors import InputError

FAMILY = "ibq-vq"


def read(sources: Sequence[Path]) -> Converted:
    """From a checkpoint, with its YAML if that is given, or from the folder of both."""
    weights, settings = open_checkpoint(sources, FILES, SETTINGS)
    if target(settings) and not is_ibq(settings):
        raise InputError(
            f"{weights.where} is of {target(settings)} and not an IBQ tokenizer; convert it as taming-vqgan"
        )
    arguments = model_settings(settings)
    if arguments.get("remap") or arguments.get("cosine_similarity") or arguments.get("l2_normalize"):
        raise InputError(f"{weights.where} renumbers codes or compares directions; only plain IBQ can be converted")
    refuse_other_families(weights, FAMILY, TAMING.codebook)
    origin = Origin(
        family=FAMILY,
        project="TencentARC/SEED-Voken",
        files=(weights.where,),
        code_licence="Apache-2.0",
        weights_licence="see the model page",
    )
    return read_taming(weights, FAMILY, origin, arguments, metric="dot-product")
