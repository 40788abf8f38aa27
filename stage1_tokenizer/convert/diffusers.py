"""diffusers' `VQModel`: the `vqvae/` or `movq/` folder of a pipeline, or such a folder itself.

Its `decode` quantizes latents; ours takes codes. Spatial norms make the decoder MoVQ's.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stage1_tokenizer.bottlenecks import VQConfig
from stage1_tokenizer.convert.vqgan import Converted, Names, read_vqgan, refuse_other_families
from tessera.config import Origin
from tessera.errors import InputError
from tessera.weights.foreign import Weights, by_checkpoint, find_files, read_settings, read_tensors

FAMILY = "diffusers-vq"
NAMES = Names(
    encoder_block="encoder.down_blocks.{level}.resnets.{block}",
    encoder_attention="encoder.down_blocks.{level}.attentions.{block}",
    downsample="encoder.down_blocks.{level}.downsamplers.0.conv",
    decoder_block="decoder.up_blocks.{level}.resnets.{block}",
    decoder_attention="decoder.up_blocks.{level}.attentions.{block}",
    upsample="decoder.up_blocks.{level}.upsamplers.0.conv",
    low_first=True,
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    shortcut="conv_shortcut",
    attention=("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    norm_out="conv_norm_out",
)
OLD_ATTENTION = ("group_norm", "query", "key", "value", "proj_attn")  # of files written before diffusers 0.15
FOLDERS = ("", "vqvae/", "movq/", "vqmodel/")
FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-*-of-*.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model-*-of-*.bin",
    "*.safetensors",
    "*.bin",
)
DEFAULT_SAMPLE_SIZE = 32  # of the class; published models leave it, although they are for larger images


def read(sources: Sequence[Path]) -> Converted:
    """From a folder with `config.json`, or from that file and the weights."""
    configs = find_files(sources, [f"{folder}config.json" for folder in FOLDERS])
    configs = [path for path in configs if path.suffix == ".json" and not path.name.endswith(".index.json")]
    found = find_files(sources, [folder + file for folder in FOLDERS for file in FILES])
    found = by_checkpoint(path for path in found if path not in configs)
    if len(found) != 1 or len(configs) != 1:
        raise InputError("a VQModel is needed: a folder with config.json and diffusion_pytorch_model.safetensors")
    settings = read_settings(configs[0])
    _check(settings, configs[0])
    weights = Weights(read_tensors(found), found[0].name)
    refuse_other_families(weights, FAMILY, NAMES.encoder_block.format(level=0, block=0) + ".conv1.weight")
    old = any(".proj_attn." in name for name in weights.tensors)
    names = NAMES._replace(
        attention=OLD_ATTENTION if old else NAMES.attention, modulated=settings.get("norm_type") == "spatial"
    )
    origin = Origin(
        family=FAMILY,
        project=str(settings.get("_name_or_path") or "huggingface/diffusers"),
        files=(configs[0].name, found[0].name),
        code_licence="Apache-2.0",
        weights_licence="see the model page",
    )
    bottleneck = VQConfig(codebook_size=weights.shape(names.codebook)[0])
    size, groups = settings.get("sample_size"), settings.get("norm_num_groups", 32)
    size = size if isinstance(size, int) and size != DEFAULT_SAMPLE_SIZE else None
    return read_vqgan(weights, names, bottleneck, origin, image_size=size, norm_groups=groups)


def _check(settings: dict[str, Any], path: Path) -> None:
    """Refuses what the weights do not show."""
    kind = settings.get("_class_name", "VQModel")
    if kind != "VQModel":
        raise InputError(f"{path} is of a {kind}, not of a VQModel")
    if settings.get("norm_type", "group") not in ("group", "spatial"):
        raise InputError(f"{path} asks for {settings['norm_type']} norms; only group and spatial ones can be converted")
    if settings.get("act_fn", "silu") not in ("silu", "swish"):
        raise InputError(f"{path} asks for the activation {settings['act_fn']}; only silu can be converted")
    groups = settings.get("norm_num_groups", 32)
    if not isinstance(groups, int) or groups < 1:
        raise InputError(f"{path} must have a positive norm_num_groups, got {groups}")
