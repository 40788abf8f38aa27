"""Is the right thing in the image? An independent judge for worlds whose every part is known.

Where all that can be drawn is a known set of cut-out images (the references), alignment needs no learned model: cut
the region that a prompt names, and ask which reference it resembles most. Nothing here was trained, and nothing here
knows the models that are judged.

A region and a reference are compared by the same features, both relative to the background, so that an empty region
is the zero vector:

- the image in CIELAB (D65) minus the background, at 24x24;
- histograms of gradient orientations of its lightness: the gradient projected on 8 directions, what is negative cut
  off, summed over cells of 4x4. They are scaled to weigh as much as the colours, on average over the references.

References are rendered on the region's own background at the region's own size first. The nearest one in L2 wins, where
the region may be shifted by up to 2 pixels (of an image 64 wide). Then it must also *explain* the region: with f the
region and r the reference, |f - r| / min(|f|, |r|) stays below a limit. So an empty region (f = 0), the blurred mean of
many images and noise are called nothing, while a somewhat soft image passes. The same softness costs a small region
more than a whole image, so its limit is higher.

It is the judge of `tessera evaluate pipeline` for the emoji world (`pipelines/evaluate.py` has the protocol).

Letters: N images, S side of a region in pixels, R references, C features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from tessera.errors import InputError
from tessera.files import read_json_lines, read_json_object
from tessera.images import opened_image

GRID = 24  # side of the compared image
CELL = 4  # of GRID, side of a histogram's cell
DIRECTIONS = 8
LARGEST = 64  # a region with more pixels is brought down to this side first
SHIFTS = (-2, -1, 0, 1, 2)  # pixels of an image 64 wide
SHORTLIST = 48  # references, nearest without a shift, that are compared with all shifts
COLOUR_FEATURES = 3 * GRID**2
# Of |f - r| / min(|f|, |r|): real images stay below 0.01. Whole ones blurred by 2 pixels (of 64) mostly stay below
# 0.4, the mean of many lies above 0.5; half-size ones blurred by 1.5 pixels mostly below 0.55, means above 0.6.
WHOLE_LIMIT, HALF_LIMIT = 0.45, 0.55
WHITE = "white"

Box = tuple[float, float, float, float]


class Region(NamedTuple):
    box: Box  # left, top, right, bottom as fractions of the image's side; a square
    item: str  # the reference that should be seen there
    concept: str  # what it is a variant of


class Case(NamedTuple):
    """One line of the evaluation."""

    prompt: str
    split: str
    regions: tuple[Region, ...]
    background: str | None  # the name of a colour, None for white


class Seen(NamedTuple):
    item: str | None  # None: nothing that is known
    concept: str | None
    distance: float  # to the nearest reference, in units of the limit: 0 is equal, from 1 on it is not accepted


class Verdict(NamedTuple):
    seen: tuple[Seen, ...]  # region by region
    background: str | None  # the colour that was seen, where one was asked for
    exact: bool  # every region shows the item, and the background its colour
    concept: bool  # the same with concepts in place of items


class References(NamedTuple):
    """All references on one background at one size."""

    features: Tensor  # (R, C)
    energy: Tensor  # (R,) squared length of each row
    balance: float  # what the histograms were multiplied by


def read_cases(file: str | Path) -> list[Case]:
    """The prompts of an evaluation: JSON lines with prompt, split, regions (box, item, concept) and background."""
    cases = []
    for where, entry in read_json_lines(Path(file)):
        try:
            regions = tuple(Region(box_of(r["box"]), str(r["item"]), str(r["concept"])) for r in entry["regions"])
            cases.append(Case(str(entry["prompt"]), str(entry["split"]), regions, entry["background"]))
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(
                f"{where} is no evaluation prompt ({error!r}); a line holds prompt, split, "
                "regions (each with box, item and concept) and background"
            ) from None
    return cases


def load(prompts: Path, references: Path) -> tuple[list[Case], Judge]:
    """The cases and the judge of an evaluation recipe (`judge:` in the YAML)."""
    return read_cases(prompts), Judge(references)


def box_of(numbers: Sequence[float]) -> Box:
    left, top, right, bottom = map(float, numbers)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1 and math.isclose(right - left, bottom - top)):
        raise ValueError(f"box {list(numbers)} is no square within 0 and 1")
    return left, top, right, bottom


class Judge:
    """Names what stands in a region of an image.

    `folder` holds metadata.jsonl (file_name, item, concept, perhaps a name), the references as square RGBA images,
    and colours.json (colour name -> RGB in 0..255; "white" among them).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            lines = [line for _, line in read_json_lines(self.folder / "metadata.jsonl")]
            colours = read_json_object(self.folder / "colours.json")
            self.files = [self.folder / str(line["file_name"]) for line in lines]
            self.items = [str(line["item"]) for line in lines]
            self.concepts = [str(line["concept"]) for line in lines]
            self.names = [str(line.get("name", line["item"])) for line in lines]
            self.colours = {name: torch.tensor(rgb, dtype=torch.float32).view(3) for name, rgb in colours.items()}
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise InputError(
                f"{self.folder} holds no references ({error}); it needs metadata.jsonl, colours.json and pictures, "
                "as recipes/emoji/prepare.py writes them to OUT/glyphs"
            ) from None
        if WHITE not in self.colours or not self.files:
            raise InputError(f"{self.folder} needs the colour 'white' in colours.json and at least one reference")
        self._rendered = lru_cache(maxsize=None)(self._render)
        self._references = lru_cache(maxsize=32)(self._reference_features)

    def __call__(self, images: Tensor, case: Case) -> list[Verdict]:
        """Judge images drawn for one case. `images` is (N, 3, H, W), float in [-1, 1] or uint8, H = W."""
        pixels = to_pixels(images)
        if case.background is not None and case.background not in self.colours:
            known = ", ".join(self.colours)
            raise InputError(f"background {case.background!r} of {case.prompt!r} is unknown; known are {known}")
        backgrounds = [WHITE] * len(pixels) if case.background is None else self.backgrounds(pixels)
        seen = [self.look(pixels, region.box, backgrounds) for region in case.regions]
        verdicts = []
        for n, background in enumerate(backgrounds):
            row = tuple(column[n] for column in seen)
            coloured = case.background in (None, background)
            exact = all(s.item == region.item for s, region in zip(row, case.regions, strict=True))
            concept = all(s.concept == region.concept for s, region in zip(row, case.regions, strict=True))
            asked = None if case.background is None else background
            verdicts.append(Verdict(row, asked, exact and coloured, concept and coloured))
        return verdicts

    def check(self, cases: Sequence[Case]) -> None:
        """Raises InputError where a case asks for an item without a reference."""
        unknown = {region.item for case in cases for region in case.regions} - set(self.items)
        if unknown:
            raise InputError(
                f"the prompts ask for {len(unknown)} items that the judge has no reference of, {min(unknown)!r} first; "
                f"prepare {self.folder} and the prompts from one font"
            )

    def asked_for(self, case: Case, size: int) -> Image.Image:
        """The image that would have been right, size x size, made of the references."""
        red, green, blue = self.colours[case.background or WHITE].int().tolist()
        image = Image.new("RGBA", (size, size), (red, green, blue, 255))
        for region in case.regions:
            left, top, right, _ = (round(edge * size) for edge in region.box)
            with opened_image(self.files[self.items.index(region.item)]) as reference:
                glyph = reference.convert("RGBA").resize((right - left, right - left), Image.Resampling.LANCZOS)
            image.alpha_composite(glyph, (left, top))
        return image.convert("RGB")

    def label(self, case: Case) -> str:
        """The prompt, or in its place a name that the contact sheet's font can write."""
        readable = max(case.prompt, default="") < "\u3000"  # the font has no Chinese
        return case.prompt if readable else self.names[self.items.index(case.regions[0].item)]

    def backgrounds(self, pixels: Tensor) -> list[str]:
        """The named colour that most pixels of the outermost frame are nearest to; pixels (N, 3, H, W) in [0, 255]."""
        frame = torch.cat([pixels[:, :, 0], pixels[:, :, -1], pixels[:, :, :, 0], pixels[:, :, :, -1]], dim=-1)
        names = list(self.colours)
        palette = lab(torch.stack(list(self.colours.values())))  # (K, 3)
        distances = torch.cdist(lab(frame.transpose(1, 2)), palette)  # (N, 4W, K)
        votes = F.one_hot(distances.argmin(-1), len(names)).sum(1)  # (N, K)
        return [names[winner] for winner in votes.argmax(-1).tolist()]

    @torch.inference_mode()
    def look(self, pixels: Tensor, box: Box, backgrounds: Sequence[str]) -> list[Seen]:
        """What stands in the box of each image, given its background; pixels (N, 3, H, W) in [0, 255]."""
        width = pixels.shape[-1]
        left, top, right, bottom = (round(edge * width) for edge in box)
        crop = pixels[:, :, top:bottom, left:right]
        side = min(crop.shape[-1], LARGEST)
        if crop.shape[-1] > side:
            crop = F.interpolate(crop, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
        pixel = width / 64 * side / (right - left)  # of the crop, for one pixel of an image 64 wide

        seen: dict[int, Seen] = {}
        for background in dict.fromkeys(backgrounds):
            rows = [n for n, name in enumerate(backgrounds) if name == background]
            references = self._references(side, background)
            relative = self._relative(crop[rows], background)
            for start in range(0, len(rows), 64):  # bounds the memory that the shifts take
                found = self._nearest(relative[start : start + 64], references, pixel)
                seen.update(zip(rows[start : start + 64], found, strict=True))
        return [seen[n] for n in range(len(pixels))]

    def _nearest(self, relative: Tensor, references: References, pixel: float) -> list[Seen]:
        """The best of all references and shifts for crops (N, 3, S, S) in CIELAB relative to the background."""
        still = features(relative, (0.0,), references.balance)[:, 0]  # (N, C)
        squared = still.square().sum(-1, keepdim=True) + references.energy - 2 * still @ references.features.T  # (N, R)
        shortlist = squared.topk(min(SHORTLIST, squared.shape[1]), largest=False).indices  # (N, K)

        shifted = features(relative, tuple(pixel * shift for shift in SHIFTS), references.balance)  # (N, 25, C)
        energy = shifted.square().sum(-1)[:, :, None]  # (N, 25, 1)
        candidates = references.features[shortlist]  # (N, K, C)
        squared = energy + references.energy[shortlist][:, None] - 2 * shifted @ candidates.transpose(1, 2)
        best = squared.flatten(1).argmin(-1)
        rows = torch.arange(len(best))
        shift, chosen = best // shortlist.shape[1], shortlist[rows, best % shortlist.shape[1]]
        region, reference = shifted[rows, shift], references.features[chosen]  # (N, C) each
        smaller = torch.minimum(region.norm(dim=-1), reference.norm(dim=-1)).clamp(min=1e-3)
        limit = HALF_LIMIT if relative.shape[-1] <= 48 * pixel else WHOLE_LIMIT
        distance = (region - reference).norm(dim=-1) / smaller / limit
        return [
            Seen(self.items[r], self.concepts[r], d) if d < 1 else Seen(None, None, d)
            for r, d in zip(chosen.tolist(), distance.tolist(), strict=True)
        ]

    def _relative(self, pixels: Tensor, background: str) -> Tensor:
        """(N, 3, S, S) in [0, 255] -> CIELAB minus the background's."""
        return lab(pixels.movedim(1, -1)).movedim(-1, 1) - lab(self.colours[background])[:, None, None]

    def _render(self, side: int) -> Tensor:
        """(R, S, S, 4) uint8, premultiplied: colour times alpha, and alpha."""
        rendered = torch.empty(len(self.files), side, side, 4, dtype=torch.uint8)
        for number, file in enumerate(self.files):
            with opened_image(file) as picture:
                small = picture.convert("RGBA").convert("RGBa").resize((side, side), Image.Resampling.LANCZOS)
            rendered[number] = torch.from_numpy(np.array(small))
        return rendered

    def _reference_features(self, side: int, background: str) -> References:
        colour = self.colours[background]
        parts = []
        for glyphs in self._rendered(side).split(256):
            glyph = glyphs.float()
            pixels = (glyph[..., :3] + colour * (1 - glyph[..., 3:] / 255)).clamp(0, 255).round()
            parts.append(features(self._relative(pixels.movedim(-1, 1), background), (0.0,), 1.0)[:, 0])
        rows = torch.cat(parts)
        colours, histograms = rows[:, :COLOUR_FEATURES], rows[:, COLOUR_FEATURES:]
        balance = float((colours.square().sum() / histograms.square().sum().clamp(min=1e-6)).sqrt())
        rows = torch.cat([colours, histograms * balance], dim=-1)
        return References(rows, rows.square().sum(-1), balance)


def features(relative: Tensor, shifts: tuple[float, ...], balance: float) -> Tensor:
    """(N, 3, S, S) CIELAB relative to the background -> (N, M, C): M = len(shifts)^2 shifts, vertical ones outer.

    Colours are divided by GRID, so that squared lengths are means over pixels in CIELAB units.
    """
    weights = resampling(relative.shape[-1], shifts)  # (m, GRID, S)
    rows = torch.einsum("aiy,ncyx->nacix", weights, relative)
    small = torch.einsum("bjx,nacix->nabcij", weights, rows).flatten(1, 2)  # (N, M, 3, GRID, GRID)
    lightness = F.pad(small[:, :, 0], (1, 1, 1, 1), mode="replicate")
    across = (lightness[:, :, 1:-1, 2:] - lightness[:, :, 1:-1, :-2]) / 2
    down = (lightness[:, :, 2:, 1:-1] - lightness[:, :, :-2, 1:-1]) / 2
    angles = torch.arange(DIRECTIONS) * (2 * math.pi / DIRECTIONS)
    toward = across[:, :, None] * angles.cos()[:, None, None] + down[:, :, None] * angles.sin()[:, None, None]
    histograms = F.avg_pool2d(toward.relu().flatten(0, 1), CELL).unflatten(0, small.shape[:2])  # (N, M, 8, 6, 6)
    return torch.cat([small.flatten(2) / GRID, histograms.flatten(2) * balance], dim=-1)


@lru_cache(maxsize=64)
def resampling(side: int, shifts: tuple[float, ...]) -> Tensor:
    """(len(shifts), GRID, side): a triangle filter from `side` to GRID samples, shifted; zero comes in from outside."""
    scale = side / GRID
    margin = side  # more than any shift and filter reaches
    positions = torch.arange(-margin, side + margin).float()
    centres = (torch.arange(GRID) + 0.5) * scale - 0.5
    weights = [(1 - (positions - centres[:, None] - shift).abs() / max(scale, 1.0)).clamp(min=0) for shift in shifts]
    return torch.stack([(w / w.sum(-1, keepdim=True))[:, margin : margin + side] for w in weights])


def lab(pixels: Tensor) -> Tensor:
    """(..., 3) sRGB in [0, 255] -> CIELAB under D65 (L in 0..100); IEC 61966-2-1 and CIE 15."""
    value = pixels / 255
    linear = torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055).clamp(min=0) ** 2.4)
    to_xyz = torch.tensor(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ (to_xyz / to_xyz.sum(1, keepdim=True)).T  # white is (1, 1, 1)
    root = torch.where(xyz > 216 / 24389, xyz.clamp(min=1e-6) ** (1 / 3), xyz * (24389 / 27 / 116) + 16 / 116)
    x, y, z = root.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def to_pixels(images: Tensor) -> Tensor:
    """(N, 3, H, W), uint8 or float in [-1, 1] -> float in [0, 255], rounded as a saved image is."""
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise InputError(f"images must be (N, 3, H, W) with H = W, got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.float().cpu()
    finite = torch.nan_to_num(images.detach().float().cpu())
    return ((finite.clamp(-1, 1) + 1) * 127.5).round()
