"""minDALL-E's first stage (Kakao Brain 2021): taming's VQGAN under taming's names, file `stage1_last.ckpt`."""

from collections.abc import Sequence
from pathlib import Path

from stage1_tokenizer.convert.taming import open_checkpoint, read_taming
from stage1_tokenizer.convert.vqgan import Converted
from tessera.config import Origin
from tessera.weights.foreign import section

FAMILY = "mindalle-vqgan"


def read(sources: Sequence[Path]) -> Converted:
    """From `stage1_last.ckpt`, with `config.yaml` if that is given, or from the unpacked folder `1.3B`."""
    weights, settings = open_checkpoint(
        sources, ("stage1*.ckpt",), ("config.yaml",), lambda settings: section(settings, "stage1")
    )
    origin = Origin(
        family=FAMILY,
        project="kakaobrain/minDALL-E",
        files=(weights.where,),
        code_licence="Apache-2.0",
        weights_licence="none stated for this stage (the prior's is CC-BY-NC-SA-4.0)",
    )
    return read_taming(weights, FAMILY, origin, section(settings, "stage1", "hparams") | section(settings, "stage1"))
