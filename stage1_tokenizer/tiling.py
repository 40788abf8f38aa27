"""Encoder and decoder tile by tile, for images too large for memory, equal to the whole up to rounding.

Convolutions look a few positions around them, so a tile with a margin as wide as that gives what the whole would give
inside. Two things depend on the whole image. Group norms: a level's tiles are computed once for each of its norms,
up to the norm whose mean and variance are needed next, and once more with all of them known. Attention: levels that
have it, and the trunk's deepest level, are computed whole, at the resolution of the codes (the factor's square fewer
positions than pixels). Only the levels' results are kept whole; the price is computing a level with n norms about n / 2
times. Deliberate difference from what others call tiling, which blends overlapping tiles with norms of their own: that
makes seams and other codes.

Letters: B batch, C channels, H W positions of a level.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage1_tokenizer.convolutions import Decoder, Encoder, SelfAttention, Upsample
from stage1_tokenizer.dvae import DVAEDecoder, DVAEEncoder
from stage1_tokenizer.movq import ModulatedAttention, ModulatedBlock, ModulatedNorm, MoVQDecoder
from stage1_tokenizer.patches import PatchEncoder
from tessera.errors import InputError

Layer = Callable[[Tensor], Tensor]


class Box(NamedTuple):
    """Rows and columns of a level's input, half-open."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, x: Tensor) -> Tensor:
        return x[:, :, self.top : self.bottom, self.left : self.right]


class Segment(NamedTuple):
    """A stretch of a trunk, from one level's result to the next one's."""

    run: Callable[[Tensor, Box], Tensor]  # the part of its input inside the box, and the box -> what comes of it
    parts: tuple[nn.Module, ...]  # that it is made of
    grain: int = 1  # input positions a side that belong together: boxes start and end at multiples of it
    reduction: int = 1  # input positions a side for one of the coarsest position inside


def encode_tiles(encoder: nn.Module, images: Tensor, tile: int) -> Tensor:
    """What `encoder(images)` gives, (B, D, h, w), with tiles of at most `tile` positions a side at each level."""
    return _through(_encoder_segments(encoder), images, tile)


def decode_tiles(decoder: nn.Module, latents: Tensor, tile: int) -> Tensor:
    """What `decoder(latents)` gives, (B, C, H, W), with tiles of at most `tile` positions a side at each level."""
    return _through(_decoder_segments(decoder, latents), latents, tile)


def _encoder_segments(encoder: nn.Module) -> list[Segment]:
    match encoder:
        case Encoder():
            p, (*levels, last) = encoder.patch_size, encoder.levels
            stem: list[Layer] = [partial(F.pixel_unshuffle, downscale_factor=p), encoder.conv_in]
            deepest: list[Layer] = [
                last,
                encoder.middle,
                encoder.norm_out,
                F.silu,
                encoder.conv_out,
                encoder.quant_conv,
            ]
            if not levels:
                return [_segment(*stem, *deepest, grain=p, reduction=p)]
            first = _segment(*stem, levels[0], grain=2 * p, reduction=p)
            return [first, *(_segment(level, grain=2) for level in levels[1:]), _segment(*deepest)]
        case DVAEEncoder():
            halve = partial(F.max_pool2d, kernel_size=2)
            groups: list[list[Layer]] = [[encoder.squeeze, encoder.conv_in, encoder.groups[0]]]
            groups += [[halve, group] for group in encoder.groups[1:]]
            groups[-1] += [F.relu, encoder.conv_out]
            return [_segment(*layers, grain=1 + (i > 0), reduction=1 + (i > 0)) for i, layers in enumerate(groups)]
        case PatchEncoder():
            return [_segment(encoder, grain=encoder.factor, reduction=encoder.factor)]
        case _:  # one that cannot encode says so itself
            return [_segment(encoder)]


def _decoder_segments(decoder: nn.Module, latents: Tensor) -> list[Segment]:
    """Each level with the doubling that leads to it, so that nothing is kept at the higher resolution."""
    match decoder:
        case Decoder():
            levels = _with_doublings(decoder.levels)
            start: list[Layer] = [decoder.post_quant_conv, decoder.conv_in, decoder.middle]
            end: list[Layer] = [
                decoder.norm_out,
                F.silu,
                decoder.conv_out,
                partial(F.pixel_shuffle, upscale_factor=decoder.patch_size),
            ]
            levels = [start + levels[0], *levels[1:]]
            levels[-1] += end
            return [_segment(*layers) for layers in levels]
        case MoVQDecoder():
            levels = _with_doublings(decoder.levels)
            begin: list[Layer] = [decoder.post_quant_conv, decoder.conv_in, *decoder.middle]
            levels = [begin + levels[0], *levels[1:]]
            levels[-1] += [decoder.norm_out, F.silu, decoder.conv_out]
            return [_modulated(layers, latents, 2 ** max(0, depth - 1)) for depth, layers in enumerate(levels)]
        case DVAEDecoder():
            double = partial(F.interpolate, scale_factor=2.0, mode="nearest")
            groups: list[list[Layer]] = [[decoder.conv_in, decoder.groups[0]]]
            groups += [[double, group] for group in decoder.groups[1:]]
            groups[-1] += [F.relu, decoder.conv_out]
            return [_segment(*layers) for layers in groups]
        case _:
            raise AssertionError(f"no tiles for {type(decoder).__name__}")


def _with_doublings(levels: Iterable[nn.Module]) -> list[list[Layer]]:
    """The layers of each level, with the Upsample that ends it moved to the start of the next."""
    found: list[list[Layer]] = [[]]
    for level in levels:
        assert isinstance(level, Iterable)
        for layer in level:
            found += [[]] if isinstance(layer, Upsample) else []
            found[-1].append(layer)
    return found


def _segment(*layers: Layer, grain: int = 1, reduction: int = 1) -> Segment:
    """One layer after the other."""

    def run(x: Tensor, box: Box) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return Segment(run, tuple(layer for layer in layers if isinstance(layer, nn.Module)), grain, reduction)


def _modulated(layers: list[Layer], latents: Tensor, scale: int) -> Segment:
    """Likewise, with the latents under the box for what reads them; `scale` positions a side for one of theirs."""

    def run(x: Tensor, box: Box) -> Tensor:
        below = Box(*(side // scale for side in box)).of(latents)
        for layer in layers:
            if isinstance(layer, ModulatedNorm | ModulatedBlock | ModulatedAttention):
                x = layer(x, below)
            else:
                x = layer(x)
        return x

    return Segment(run, tuple(layer for layer in layers if isinstance(layer, nn.Module)), grain=scale)


def _through(segments: list[Segment], x: Tensor, tile: int) -> Tensor:
    if tile < 1:
        raise InputError(f"tile must be at least 1, got {tile}")
    for segment in segments:
        x = _tiled(segment, x, tile)
    return x


def _tiled(segment: Segment, x: Tensor, tile: int) -> Tensor:
    """The segment's result for the whole of `x`, (B, C, H, W)."""
    height, width = x.shape[2:]
    whole = Box(0, height, 0, width)
    modules = [module for part in segment.parts for module in part.modules()]
    if max(height, width) <= tile or any(isinstance(m, SelfAttention | ModulatedAttention) for m in modules):
        return segment.run(x, whole)
    halo = segment.reduction * sum(m.kernel_size[0] // 2 for m in modules if isinstance(m, nn.Conv2d))
    halo, tile = (max(1, -(-size // segment.grain)) * segment.grain for size in (halo, tile))
    cores = [
        Box(top, min(top + tile, height), left, min(left + tile, width))
        for top in range(0, height, tile)
        for left in range(0, width, tile)
    ]
    with _norms([m for m in modules if isinstance(m, nn.GroupNorm)]) as known:
        while True:
            moments, result = _Moments(), None
            for core in cores:
                box = Box(
                    max(core.top - halo, 0),
                    min(core.bottom + halo, height),
                    max(core.left - halo, 0),
                    min(core.right + halo, width),
                )
                try:
                    out = segment.run(box.of(x).contiguous(memory_format=torch.channels_last), box)
                except _Unknown as unknown:
                    moments.add(unknown, _inside(core, box, unknown.x))
                    continue
                if result is None:
                    size = (
                        height * out.shape[2] // (box.bottom - box.top),
                        width * out.shape[3] // (box.right - box.left),
                    )
                    result = out.new_empty(*out.shape[:2], *size).contiguous(memory_format=torch.channels_last)
                _place(core, x, result).copy_(_inside(core, box, out))
            if result is not None:
                return result
            known[moments.norm] = moments.scale_and_shift()


def _inside(core: Box, box: Box, x: Tensor) -> Tensor:
    """The core's part of `x`, which came of the input in `box` at any resolution."""
    height, width = box.bottom - box.top, box.right - box.left
    rows = [(side - box.top) * x.shape[2] // height for side in (core.top, core.bottom)]
    columns = [(side - box.left) * x.shape[3] // width for side in (core.left, core.right)]
    return Box(*rows, *columns).of(x)


def _place(core: Box, x: Tensor, result: Tensor) -> Tensor:
    return _inside(core, Box(0, x.shape[2], 0, x.shape[3]), result)


class _Unknown(Exception):
    """A group norm was reached whose statistics over the whole image are not known yet."""

    def __init__(self, norm: nn.GroupNorm, x: Tensor) -> None:
        super().__init__()
        self.norm, self.x = norm, x


class _Moments:
    """Mean and variance of a group norm's input, gathered from tiles in double precision."""

    norm: nn.GroupNorm

    def __init__(self) -> None:
        self.count, self.sums, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, unknown: _Unknown, x: Tensor) -> None:
        self.norm = unknown.norm
        groups = x.unflatten(1, (unknown.norm.num_groups, -1))  # (B, groups, C / groups, H, W)
        mean = groups.double().mean((2, 3, 4))
        spread = (groups.double() - mean[:, :, None, None, None]).square().sum((2, 3, 4))
        number = groups[0, 0].numel()
        # Sums of squares around 0 would lose digits; those around each tile's mean are joined (Chan et al. 1979).
        total = self.count + number
        before = self.sums / max(1, self.count)
        self.squares = self.squares + spread + (mean - before).square() * self.count * number / total
        self.sums, self.count = self.sums + mean * number, total

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(B, C, 1, 1) each: the norm of x is x * scale + shift."""
        mean, variance = self.sums / self.count, self.squares / self.count  # (B, groups)
        group_size = self.norm.num_channels // self.norm.num_groups
        mean, rate = (m.repeat_interleave(group_size, 1) for m in (mean, torch.rsqrt(variance + self.norm.eps)))
        scale = rate * self.norm.weight.double()
        shift = self.norm.bias.double() - mean * scale
        return scale.float()[:, :, None, None], shift.float()[:, :, None, None]


@contextmanager
def _norms(norms: list[nn.GroupNorm]) -> Iterator[dict[nn.GroupNorm, tuple[Tensor, Tensor]]]:
    """Has `norms` use the scales and shifts that the given dictionary holds, and stop where it holds none."""
    known: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}

    def stop(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(norm, nn.GroupNorm)
        if norm not in known:
            raise _Unknown(norm, inputs[0])

    def replace(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        assert isinstance(norm, nn.GroupNorm)
        scale, shift = known[norm]
        return torch.addcmul(shift.to(output), inputs[0], scale.to(output))

    handles = [norm.register_forward_pre_hook(stop) for norm in norms]
    handles += [norm.register_forward_hook(replace) for norm in norms]
    try:
        yield known
    finally:
        for handle in handles:
            handle.remove()
