"""Editing: which codes of an image stay, and the prior of those that are missing.

Letters: Q codebooks, h w code grid, T = Q·h·w codes an image.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from pipelines.bundle import Bundle
from pipelines.request import MISSING, whole_number
from stage2_prior import flatten_codes
from stage2_prior.base import Prior
from stage2_prior.infill import InfillPrior
from tessera.errors import InputError
from tessera.images import fit, to_tensor, white_cells


def codes_of_top(bundle: Bundle, image: Image.Image, rows: int | None = None) -> Tensor:
    """The codes (n,) of the upper `rows` of the code grid (by default half) of an image, for `first_codes`.

    The image is scaled and cut to the tokenizer's size. Raises InputError unless 1 <= rows < h.
    """
    height = bundle.image_tokenizer.code_shape[1]
    rows = height // 2 if rows is None else whole_number("top_rows", rows)
    if rows >= height:
        raise InputError(f"top_rows must be below {height}, the rows of codes in an image, got {rows}")
    return flatten_codes(encode(bundle, image)[:, :, :rows])[0]


def codes_outside(bundle: Bundle, image: Image.Image, mask: Image.Image) -> Tensor:
    """The codes (T,) of an image, -1 in every cell of the code grid that its mask is white in, for `known_codes`.

    Both are scaled and cut to the tokenizer's size; one white pixel (`white_cells`) is enough. Raises InputError
    when their sizes differ, or nothing is white.
    """
    if image.size != mask.size:
        (width, height), (wide, high) = image.size, mask.size
        raise InputError(
            f"the image has {width}x{height} pixels and its mask {wide}x{high}; a mask has one for each of them"
        )
    white = white_cells(mask, bundle.image_tokenizer.code_shape[1:])
    if not white.any():
        raise InputError(
            "the mask is black all over the square that is sampled, so everything stays; paint white what is to be "
            "sampled anew"
        )
    return flatten_codes(encode(bundle, image).masked_fill(white.to(bundle.device), MISSING))[0]


def encode(bundle: Bundle, image: Image.Image) -> Tensor:
    """The codes (1, Q, h, w) of an image, scaled and cut to the tokenizer's size."""
    pixels = to_tensor(fit(image.convert("RGB"), bundle.image_tokenizer.image_size))
    return bundle.image_tokenizer.encode(pixels[None].to(bundle.device))


def prior_of_missing(prior: Prior, known_codes: Sequence[int]) -> InfillPrior:
    """The prior of the codes that are MISSING among these (T,). Raises InputError when they are not an image's."""
    codes = torch.tensor(known_codes, dtype=torch.int64, device=next(prior.parameters()).device)
    if codes.shape != (prior.length,):
        raise InputError(
            f"known_codes must be {prior.length} whole numbers, {MISSING} for missing ones, got {len(codes)}"
        )
    grid = prior.grid(codes[None])[0]  # (Q, h, w)
    missing = grid == MISSING
    if (missing.any(0) != missing.all(0)).any():
        raise InputError("known_codes must have all codebooks of a position or none of them")
    return InfillPrior(prior, grid, ~missing[0])
