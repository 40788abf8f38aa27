"""What the VQGAN families share: the same network under other names (Esser et al. 2021 and its descendants).

A family says how it names the parts; every size is read from the shapes of the weights: widths, levels, blocks, where
attention sits, channels of latents and codes. Each of our parameters is then one of theirs, or three where ours fuses
queries, keys and values into one convolution.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.convolutions import TrunkConfig
from tessera.config import Origin
from tessera.errors import InputError
from tessera.weights.foreign import Weights

DEFAULT_SIZE = 256  # pixels a side, where a checkpoint does not say
LARGEST_SIZE = 2**14  # that settings may say: grids of codes and tables of positions are made of it


class Converted(NamedTuple):
    config: AutoencoderConfig
    weights: dict[str, Tensor]  # the parameters under our names


class Names(NamedTuple):
    """How a family names the modules; `{level}` and `{block}` are numbers, levels of the encoder from high to low."""

    encoder_block: str = "encoder.down.{level}.block.{block}"
    encoder_attention: str = "encoder.down.{level}.attn.{block}"
    downsample: str = "encoder.down.{level}.downsample.conv"
    decoder_block: str = "decoder.up.{level}.block.{block}"
    decoder_attention: str = "decoder.up.{level}.attn.{block}"
    upsample: str = "decoder.up.{level}.upsample.conv"
    low_first: bool = False  # the decoder's levels are numbered from low resolution, as ours are
    middle: tuple[str, str, str] = ("mid.block_1", "mid.attn_1", "mid.block_2")  # within encoder and decoder
    shortcut: str = "nin_shortcut"  # within a block
    attention: tuple[str, str, str, str, str] = ("norm", "q", "k", "v", "proj_out")
    norm_out: str = "norm_out"
    codebook: str = "quantize.embedding.weight"
    modulated: bool = False  # the decoder's norms, as MoVQ's
    modulated_attention_norm: str = "spatial_norm"
    modulated_norm: tuple[str, str, str] = ("norm_layer", "conv_y", "conv_b")  # within such a norm


TAMING = Names()
SPATIAL = "decoder.norm_out.norm_layer.weight"  # of a decoder with MoVQ's norms under taming's names
SIGNS = {  # the beginnings of names that tell a family
    "encoder.conv_blocks.": "llamagen-vq",
    "gen_vision_model.": "janus-vq",
    "model.vqmodel.": "janus-vq",
    "vqmodel.": "janus-vq",
    "encoder.down_blocks.": "diffusers-vq",
    "blocks.group_": "openai-dvae",
    "encoder.down.": "taming-vqgan",
    "first_stage_model.": "taming-vqgan",
    "decoder.up.": "min-dalle-detoker",
}


def read_vqgan(
    weights: Weights,
    names: Names,
    bottleneck: BottleneckConfig,
    origin: Origin,
    *,
    image_size: int | None = None,
    image_channels: int = 3,
    norm_groups: int = 32,
    norm_eps: float = 1e-6,
) -> Converted:
    """The config that the shapes ask for, and the weights under our names.

    `bottleneck` has the codebook's size already. An `image_size` that the factor does not divide is rounded down.
    """
    trunk = _trunk(weights, names, image_channels, norm_groups, norm_eps)
    if image_size is not None and not 0 < image_size <= LARGEST_SIZE:
        raise InputError(f"the settings say pictures of {image_size} pixels a side; check the file, or leave it out")
    size = max((image_size or DEFAULT_SIZE) // trunk.factor, 1) * trunk.factor
    config = AutoencoderConfig(image_size=size, trunk=trunk, bottleneck=bottleneck, origin=origin)
    modules = dict(_modules(trunk, names))
    if names.modulated:
        modules |= dict(_modulated(modules, names))
    wanted, shapes = {}, {}
    for ours, shape in needed_shapes(config).items():
        module, _, kind = ours.rpartition(".")
        wanted[ours] = (
            (names.codebook,) if kind == "codebook" else tuple(f"{theirs}.{kind}" for theirs in modules[module])
        )
        shapes[ours] = shape
    return Converted(config, weights.assemble(wanted, shapes))


def build(config: AutoencoderConfig, weights: dict[str, Tensor]) -> Autoencoder:
    """The model of `config` with `weights`, in eval mode; its codebook counts as started, its schedules as over."""
    with torch.device("meta"):
        model = Autoencoder(config)
    counters = {
        name: torch.full(value.shape, {"started": True, "steps": 2**31}.get(name.split(".")[-1], 0), dtype=value.dtype)
        for name, value in model.named_buffers()
    }
    model.load_state_dict(weights | counters, strict=True, assign=True)
    return model.eval()


def needed_shapes(config: AutoencoderConfig) -> dict[str, tuple[int, ...]]:
    """Our parameters with their shapes."""
    with torch.device("meta"):
        model = Autoencoder(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def refuse_other_families(weights: Weights, family: str, needed: str) -> None:
    """Raises InputError unless `weights` has the name `needed`, which every checkpoint of the family has."""
    if needed in weights:
        return
    kinds = (kind for sign, kind in SIGNS.items() if any(name.startswith(sign) for name in weights.tensors))
    hint = next((f"it looks like {kind}" for kind in kinds if kind != family), "check the family and the file")
    inside = next((name.removesuffix(needed) for name in weights.tensors if name.endswith(f".{needed}")), None)
    if inside:
        hint = f"there is one inside '{inside}', so save what is in there under its own names"
    raise InputError(f"{weights.where} is not a checkpoint of {family}: it has no '{needed}'; {hint}")


def _trunk(weights: Weights, names: Names, image_channels: int, norm_groups: int, norm_eps: float) -> TrunkConfig:
    both = names.encoder_block.format(level=0, block=0) + ".conv1.weight" in weights
    encoder = _widths(weights, names.encoder_block) if both else []
    decoder = _widths(weights, names.decoder_block)
    if not decoder:
        weights.shape(names.decoder_block.format(level=0, block=0) + ".conv1.weight")  # says that it is missing
    decoder = decoder[::-1] if names.low_first else decoder
    if both and len(encoder) != len(decoder):
        raise InputError(f"{weights.where} has {len(encoder)} levels in its encoder but {len(decoder)} in its decoder")
    _check_channels(weights, both, image_channels)
    stem = weights.shape("encoder.conv_in.weight")[0] if both else 0
    unit = math.gcd(*encoder, *decoder)
    multipliers = tuple(width // unit for width in encoder or decoder)
    decoder_multipliers = tuple(width // unit for width in decoder)
    return TrunkConfig(
        encoder="convolutional" if both else "none",
        decoder="modulated" if names.modulated else "convolutional",
        image_channels=image_channels,
        channels=unit,
        multipliers=multipliers,
        decoder_multipliers=None if decoder_multipliers == multipliers else decoder_multipliers,
        stem_channels=None if stem in (0, unit * multipliers[0]) else stem,
        encoder_blocks=_count(weights, names.encoder_block, level=0) if both else 1,
        decoder_blocks=_count(weights, names.decoder_block, level=0),
        attention=f"decoder.{names.middle[1]}.{names.attention[1]}.weight" in weights,
        encoder_attention=tuple(_attended(weights, names, names.encoder_attention, len(encoder), False)),
        decoder_attention=tuple(_attended(weights, names, names.decoder_attention, len(decoder), names.low_first)),
        latent_dim=weights.shape("decoder.conv_in.weight")[1],
        code_dim=weights.shape("post_quant_conv.weight")[1],
        norm_groups=norm_groups,
        norm_eps=norm_eps,
    )


def _check_channels(weights: Weights, both: bool, image_channels: int) -> None:
    """Refuses what reads or draws other channels, and what gives a mean and a variance instead of codes."""
    colours = weights.shape("decoder.conv_out.weight")[0]
    if both:
        taken, given = weights.shape("decoder.conv_in.weight")[1], weights.shape("encoder.conv_out.weight")[0]
        if given == 2 * taken:
            raise InputError(f"{weights.where} is a VAE without codes (double_z); give a tokenizer with a codebook")
        colours = max(colours, weights.shape("encoder.conv_in.weight")[1])
    if colours != image_channels:
        raise InputError(f"{weights.where} is for pictures of {colours} channels; only RGB pictures can be converted")


def _widths(weights: Weights, block: str) -> list[int]:
    """Of the levels, in the checkpoint's order."""
    found: list[int] = []
    while (name := block.format(level=len(found), block=0) + ".conv1.weight") in weights:
        found.append(weights.shape(name)[0])
    return found


def _count(weights: Weights, block: str, level: int) -> int:
    number = 0
    while block.format(level=level, block=number) + ".conv1.weight" in weights:
        number += 1
    return number


def _attended(weights: Weights, names: Names, attention: str, levels: int, low_first: bool) -> Iterator[int]:
    """Levels, counted from high resolution, whose blocks are followed by attention."""
    for level in range(levels):
        theirs = levels - 1 - level if low_first else level
        if f"{attention.format(level=theirs, block=0)}.{names.attention[1]}.weight" in weights:
            yield level


def _modules(trunk: TrunkConfig, names: Names) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our modules and theirs. More than the model has: not every block has a shortcut, not every level resamples."""
    depth = len(trunk.multipliers)
    for level in range(depth):
        attended, blocks = level in trunk.encoder_attention, trunk.encoder_blocks
        ours = f"encoder.levels.{level}"
        for block in range(blocks):
            here = {"level": level, "block": block}
            yield from _block(f"{ours}.{block * (1 + attended)}", names.encoder_block.format(**here), names)
            if attended:
                yield from _attention(f"{ours}.{2 * block + 1}", names.encoder_attention.format(**here), names)
        yield f"{ours}.{blocks * (1 + attended)}.conv", (names.downsample.format(level=level),)

        attended, blocks = level in trunk.decoder_attention, trunk.decoder_blocks
        ours, theirs = f"decoder.levels.{depth - 1 - level}", depth - 1 - level if names.low_first else level
        for block in range(blocks):
            here = {"level": theirs, "block": block}
            yield from _block(f"{ours}.{block * (1 + attended)}", names.decoder_block.format(**here), names)
            if attended:
                yield from _attention(f"{ours}.{2 * block + 1}", names.decoder_attention.format(**here), names)
        yield f"{ours}.{blocks * (1 + attended)}.conv", (names.upsample.format(level=theirs),)

    for half in ("encoder", "decoder"):
        first, attention, second = (f"{half}.{part}" for part in names.middle)
        yield from _block(f"{half}.middle.0", first, names)
        yield from _attention(f"{half}.middle.1", attention, names)
        yield from _block(f"{half}.middle.{2 if trunk.attention else 1}", second, names)
        yield f"{half}.norm_out", (f"{half}.{names.norm_out}",)
        yield from ((f"{half}.{part}", (f"{half}.{part}",)) for part in ("conv_in", "conv_out"))
    yield "encoder.quant_conv", ("quant_conv",)
    yield "decoder.post_quant_conv", ("post_quant_conv",)
    yield "bottleneck.projection", ("quantize.proj",)


def _modulated(modules: dict[str, tuple[str, ...]], names: Names) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The three modules of each modulated norm, for every norm of the decoder."""
    for ours, theirs in modules.items():
        parent, _, last = ours.rpartition(".")
        if ours.startswith("decoder.") and "norm" in last:
            name = theirs[0]
            if name.endswith(f".{names.attention[0]}") and parent != "decoder":
                name = f"{name.rpartition('.')[0]}.{names.modulated_attention_norm}"
            for part, inside in zip(("norm", "scale", "shift"), names.modulated_norm, strict=True):
                yield f"{ours}.{part}", (f"{name}.{inside}",)


def _block(ours: str, theirs: str, names: Names) -> Iterator[tuple[str, tuple[str, ...]]]:
    for part in ("norm1", "conv1", "norm2", "conv2"):
        yield f"{ours}.{part}", (f"{theirs}.{part}",)
    yield f"{ours}.shortcut", (f"{theirs}.{names.shortcut}",)


def _attention(ours: str, theirs: str, names: Names) -> Iterator[tuple[str, tuple[str, ...]]]:
    norm, q, k, v, out = (f"{theirs}.{part}" for part in names.attention)
    yield f"{ours}.norm", (norm,)
    yield f"{ours}.qkv", (q, k, v)
    yield f"{ours}.out", (out,)
