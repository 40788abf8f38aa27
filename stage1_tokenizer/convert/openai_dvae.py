"""OpenAI's discrete VAE of DALL-E (Ramesh et al. 2021): the pickled modules `encoder.pkl` and `decoder.pkl`.

The modules are never executed, their tensors are taken out. The encoder's last convolution becomes the projection of a
Gumbel bottleneck and the decoder's first one, which reads one-hot codes, its codebook: row k is column k plus the bias.
"""

from collections.abc import Sequence
from pathlib import Path

from stage1_tokenizer.autoencoder import AutoencoderConfig
from stage1_tokenizer.bottlenecks import GumbelConfig
from stage1_tokenizer.convert.vqgan import Converted, needed_shapes, refuse_other_families
from stage1_tokenizer.dvae import DVAETrunkConfig
from tessera.config import Origin
from tessera.errors import InputError
from tessera.weights.foreign import Weights, find_files, read_tensors

FAMILY = "openai-dvae"
BLOCK = "blocks.group_{group}.block_{block}"


def read(sources: Sequence[Path]) -> Converted:
    """From both files, in any order, or from their folder."""
    found = [path for pattern in ("encoder.pkl", "decoder.pkl") for path in find_files(sources, (pattern,))]
    halves: dict[str, Weights] = {}
    for path in dict.fromkeys(found):
        weights = Weights(read_tensors([path]), path.name)
        refuse_other_families(weights, FAMILY, "blocks.input.w")
        kernel = weights.shape("blocks.input.w")[-1]  # the encoder reads pixels, the decoder single codes
        halves["encoder" if kernel > 1 else "decoder"] = weights
    if len(halves) != 2:
        raise InputError("two files are needed, encoder.pkl and decoder.pkl of cdn.openai.com/dall-e, or their folder")
    encoder, decoder = halves["encoder"], halves["decoder"]
    codes = _check(encoder, decoder)
    config = AutoencoderConfig(
        trunk=_trunk(encoder, decoder),
        bottleneck=GumbelConfig(codebook_size=codes),
        pixels="logit-laplace",
        origin=Origin(
            family=FAMILY,
            project="openai/DALL-E",
            files=(encoder.where, decoder.where),
            code_licence="Modified MIT",
            weights_licence="Modified MIT",
        ),
    )
    shapes = needed_shapes(config)
    codebook = shapes.pop("bottleneck.codebook")
    wanted = {ours: _theirs(ours) for ours in shapes}
    shapes |= {"first.weight": (codebook[1], codebook[0], 1, 1), "first.bias": (codebook[1],)}
    from_encoder = {ours: names for ours, names in wanted.items() if not ours.startswith("decoder.")}
    from_decoder = {ours: names for ours, names in wanted.items() if ours.startswith("decoder.")}
    from_decoder |= {"first.weight": ("blocks.input.w",), "first.bias": ("blocks.input.b",)}
    state = encoder.assemble(from_encoder, shapes) | decoder.assemble(from_decoder, shapes)
    columns, bias = state.pop("first.weight"), state.pop("first.bias")
    return Converted(config, state | {"bottleneck.codebook": (columns[:, :, 0, 0] + bias[:, None]).T.contiguous()})


def _check(encoder: Weights, decoder: Weights) -> int:
    """The number of codes, on which both halves agree."""
    codes, read_codes = encoder.shape("blocks.output.conv.w")[0], decoder.shape("blocks.input.w")[1]
    if codes != read_codes:
        raise InputError(f"{encoder.where} gives {codes} codes but {decoder.where} reads {read_codes}; give a pair")
    if encoder.shape("blocks.input.w")[1] != 3 or decoder.shape("blocks.output.conv.w")[0] != 6:
        raise InputError(f"{encoder.where} and {decoder.where} are not for RGB pictures; only those can be converted")
    return codes


def _trunk(encoder: Weights, decoder: Weights) -> DVAETrunkConfig:
    widths: list[int] = []
    while (name := _last(len(widths) + 1, 1)) in encoder:
        widths.append(encoder.shape(name)[0])
    if not widths:
        encoder.shape(_last(1, 1))  # says that it is missing
    blocks = 0
    while _last(1, blocks + 1) in encoder:
        blocks += 1
    unit = widths[0]
    if any(width % unit for width in widths):
        raise InputError(f"{encoder.where} has groups of widths {widths}, which are not multiples of the first")
    return DVAETrunkConfig(
        type="dvae",
        channels=unit,
        multipliers=tuple(width // unit for width in widths),
        blocks=blocks,
        decoder_channels=decoder.shape("blocks.input.w")[0],
    )


def _last(group: int, block: int) -> str:
    return BLOCK.format(group=group, block=block) + ".res_path.conv_4.w"


def _theirs(ours: str) -> tuple[str, ...]:
    """`encoder.groups.0.1.convs.2.weight` is `blocks.group_1.block_2.res_path.conv_3.w`."""
    *path, kind = ours.split(".")
    letter = {"weight": "w", "bias": "b"}[kind]
    match path:
        case ["encoder", "conv_in"]:
            return (f"blocks.input.{letter}",)
        case ["bottleneck", "projection"] | ["decoder", "conv_out"]:
            return (f"blocks.output.conv.{letter}",)
        case [_, "groups", group, block, *part]:
            inside = "id_path" if part == ["shortcut"] else f"res_path.conv_{int(part[1]) + 1}"
            return (f"{BLOCK.format(group=int(group) + 1, block=int(block) + 1)}.{inside}.{letter}",)
    raise AssertionError(f"{ours} has no counterpart")
