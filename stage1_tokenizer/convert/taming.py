"""taming-transformers' VQGAN and GumbelVQ (Esser et al. 2021), from Lightning checkpoints.

Also the VQGANs of latent-diffusion (vq-f8), and the tokenizer inside a taming transformer's checkpoint. The reference
adds Gumbel noise even in evaluation; ours takes the largest logit. It does not clamp pictures to [-1, 1]; ours does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.checkpoints import Weights, find_files, read_settings, read_tensors, section
from common.config import Origin
from common.errors import InputError
from stage1_tokenizer.bottlenecks import BottleneckConfig, GumbelConfig, VQConfig
from stage1_tokenizer.convert.vqgan import TAMING, Converted, read_vqgan, refuse_other_families

FAMILY = "taming-vqgan"
INSIDE = "first_stage_model."  # of a transformer's checkpoint
IGNORED = r"loss\.|colorize$"  # discriminator and LPIPS; colours that show a map
GUMBEL = TAMING._replace(codebook="quantize.embed.weight")
FILES = ("*.ckpt", "ckpts/*.ckpt", "checkpoints/*.ckpt", "*.safetensors")
SETTINGS = ("*.yaml", "configs/*.yaml")


def read(sources: Sequence[Path]) -> Converted:
    """From a checkpoint, with its YAML if that is given, or from the folder of both."""
    weights, settings = open_checkpoint(sources, FILES, SETTINGS)
    origin = Origin(
        family=FAMILY,
        project="CompVis/taming-transformers",
        files=(weights.where,),
        code_licence="MIT",
        weights_licence="none stated apart from the code's",
    )
    return read_taming(weights, FAMILY, origin, model_settings(settings))


def model_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """`model.params` and what is below it in `ddconfig`, side by side."""
    return section(settings, "model", "params", "ddconfig") | section(settings, "model", "params")


def open_checkpoint(
    sources: Sequence[Path], files: Sequence[str], settings: Sequence[str]
) -> tuple[Weights, dict[str, Any]]:
    """The VQGAN's weights, and the settings beside them, empty when there are none."""
    configs = [path for path in find_files(sources, settings) if path.suffix in (".yaml", ".yml")]
    found = [path for path in find_files(sources, files) if path.suffix not in (".yaml", ".yml")]
    if len(found) != 1:
        listed = ", ".join(str(path) for path in found) or "none"
        raise InputError(f"one checkpoint is needed, a .ckpt file or its folder, and {listed} was found")
    tensors = read_tensors(found)
    inside = {name.removeprefix(INSIDE): t for name, t in tensors.items() if name.startswith(INSIDE)}
    return Weights(inside or tensors, found[0].name, IGNORED), read_settings(configs[0]) if configs else {}


def read_taming(
    weights: Weights, family: str, origin: Origin, settings: dict[str, Any], image_channels: int = 3
) -> Converted:
    """A checkpoint with taming's names; `settings` are compared with it as far as they go."""
    refuse_other_families(weights, family, TAMING.encoder_block.format(level=0, block=0) + ".conv1.weight")
    gumbel = GUMBEL.codebook in weights
    names = GUMBEL if gumbel else TAMING
    codes, dim = weights.shape(names.codebook)
    for key, value in {"n_embed": codes, "embed_dim": dim}.items():
        if settings.get(key, value) != value:
            raise InputError(
                f"the settings say {key} {settings[key]}, but {weights.where} has {value}; "
                "give the checkpoint and the settings that belong together"
            )
    bottleneck: BottleneckConfig = GumbelConfig(codebook_size=codes) if gumbel else VQConfig(codebook_size=codes)
    size = settings.get("resolution")
    return read_vqgan(
        weights,
        names,
        bottleneck,
        origin,
        image_size=size if isinstance(size, int) else None,
        image_channels=image_channels,
    )
