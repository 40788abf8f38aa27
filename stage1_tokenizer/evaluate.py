"""How well an image tokenizer keeps images: `tessera evaluate tokenizer MODEL DATA`."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stage1_tokenizer.autoencoder import Autoencoder
from stage1_tokenizer.features import inception
from stage1_tokenizer.losses.perceptual import LPIPS, CLIPFeatures
from tessera.data.source import ImageFolder, Unreadable
from tessera.errors import InputError
from tessera.files import read_json_lines
from tessera.metrics import frechet_distance, perplexity, psnr, ssim
from tessera.weights.writing import write_text

logger = logging.getLogger("stage1_tokenizer")

FEWEST = 2  # images that a Fréchet distance can be measured on
LEFT_OUT = {
    "ssim": "needs torchmetrics: pip install 'tessera[metrics]'",
    "lpips": "give --lpips FILE, torchvision's vgg16-397923af.pth",
    "rfid": "give --inception FILE, weights-inception-2015-12-05-6726825d.pth of torch-fidelity's releases",
    "clip_distance, clip_frechet": "give --clip FOLDER, a CLIP with a ResNet image tower, as the reranker of a bundle",
}


class Measures:
    """The figures of one evaluation, image by image, and features of both sides for the Fréchet distances."""

    def __init__(self, clip: Path | None, lpips: Path | None, inception_weights: Path | None, device: str) -> None:
        self.clip = CLIPFeatures(clip, (0, 1, 2, 3)).to(device) if clip else None
        self.lpips = LPIPS("vgg", lpips).to(device) if lpips else None
        self.inception = inception(inception_weights).to(device) if inception_weights else None
        self.ssim = _has_torchmetrics()
        self.figures: dict[str, list[float]] = {}
        self._features: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def add(self, decoded: Tensor, images: Tensor) -> None:
        """Measures a batch of reconstructions, (B, 3, H, W) in [-1, 1], against the images."""
        self._note("psnr", psnr(decoded, images))
        if self.ssim:
            self._note("ssim", ssim(decoded, images))
        for name, distance in (("lpips", self.lpips), ("clip_distance", self.clip)):
            if distance is not None:
                pairs = zip(decoded.split(1), images.split(1), strict=True)
                self._note(name, torch.stack([distance(*pair) for pair in pairs]))
        if self.clip is not None:
            self._keep("clip_frechet", self.clip.embed, decoded, images)
        if self.inception is not None:
            self._keep("rfid", self.inception, decoded, images)

    def report(self) -> dict[str, Any]:
        """Means over images, distances between the sets, and what was left out for want of weights."""
        means = {name: round(sum(values) / len(values), 4) for name, values in self.figures.items()}
        sets = {name: frechet_distance(torch.cat(a), torch.cat(b)) for name, (a, b) in self._features.items()}
        found = means | {name: round(value, 4) for name, value in sets.items()}
        return found | {"left_out": {k: why for k, why in LEFT_OUT.items() if not set(k.split(", ")) & found.keys()}}

    def _note(self, name: str, values: Tensor) -> None:
        self.figures.setdefault(name, []).extend(values.float().cpu().tolist())

    def _keep(self, name: str, extract: Any, decoded: Tensor, images: Tensor) -> None:
        pair = self._features.setdefault(name, ([], []))
        for kept, pictures in zip(pair, (decoded, images), strict=True):
            kept.append(extract(pictures).float().cpu())


@torch.inference_mode()
def evaluate(
    model: str | Path,
    data: str | Path,
    split: str | None = None,
    batch_size: int = 64,
    *,
    clip: Path | None = None,
    lpips: Path | None = None,
    inception_weights: Path | None = None,
    per_image: Path | None = None,
) -> dict[str, Any]:
    """Figures over every image of `data` (of its `split`), each encoded and decoded at the tokenizer's own size.

    Means over 8-bit images: `psnr` in dB, `ssim`, `lpips` (VGG), `clip_distance` (unit-normalised features of `clip`,
    a tower of one's own). Between the sets of images and of reconstructions: `rfid` (2048 features of the Inception
    of Heusel et al. 2017) and `clip_frechet` (embeddings of `clip`). `codes_used` is the share of the codebook that
    occurs at all, `perplexity` the exponential of the entropy of code use; both are means over the codebooks, and left
    out for a continuous tokenizer. What needs weights that were not given is named in `left_out`. `per_image` receives
    a JSON line for each image that can be read; broken ones are skipped and named. Raises InputError for a wrong
    model, data folder or weights, too many broken images, or a file `per_image` that holds something else.
    """
    if per_image is not None:
        _refuse_other(per_image)
    tokenizer = Autoencoder.from_pretrained(model)
    images = ImageFolder(data, tokenizer.image_size, split)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer.to(device)
    if (clip or inception_weights) and len(images) < FEWEST:
        raise InputError(f"{data} has {len(images)} picture, a Fréchet distance needs at least {FEWEST}; give more")
    measures = Measures(clip, lpips, inception_weights, device)
    counts = torch.zeros((), dtype=torch.int64, device=device)  # (codebooks, K) once there are codes
    seconds, measured, unreadable = 0.0, list[int](), Unreadable(len(images))
    for first in tqdm(range(0, len(images), batch_size), unit="batch", disable=not sys.stderr.isatty()):
        indices = range(first, min(first + batch_size, len(images)))
        batch, places, skipped = images.readable(indices)
        for sentence in unreadable.add(skipped):
            logger.warning("skipped: %s", sentence)
        if not places:
            continue
        measured += [indices[place] for place in places]
        batch, start = batch.to(device), time.perf_counter()
        if tokenizer.continuous:
            decoded = tokenizer.decode_latents(tokenizer.encode_latents(batch))
        else:
            codes = tokenizer.encode(batch)
            counts = counts + tokenizer.bottleneck.count(codes)
            decoded = tokenizer.decode(codes)
        seconds += time.perf_counter() - start
        measures.add(decoded, batch)
    of_codes: dict[str, float] = {}
    if not tokenizer.continuous:
        used = round(float((counts > 0).float().mean()), 4)
        of_codes = {"codes_used": used, "perplexity": round(perplexity(counts), 1)}
    if per_image is not None:
        _write_lines(per_image, images, measured, measures.figures)
    return {
        "model": str(model),
        "data": str(data),
        "split": split or "all",
        "pictures": len(measured),
        "unreadable": len(unreadable.sentences),
        "image_size": tokenizer.image_size,
        "resize": "shorter side by Lanczos, middle square, none where it fits",
        **of_codes,
        **measures.report(),
        "images_per_second": round(len(measured) / seconds, 1),  # encoded and decoded, without reading and measuring
    }


def _refuse_other(path: Path) -> None:
    """Raises InputError when there is something that no earlier evaluation wrote: its lines have other keys."""
    if not os.path.lexists(path):
        return
    try:
        rows = [row for _, row in read_json_lines(path)]
    except InputError:
        rows = [None]
    if not all(isinstance(row, dict) and {"file_name", "psnr"} <= row.keys() for row in rows):
        raise InputError(f"{path} is there and no evaluation wrote it; choose another file")


def _write_lines(path: Path, images: ImageFolder, measured: list[int], figures: dict[str, list[float]]) -> None:
    names = [str(images.items[i].path.relative_to(images.folder)) for i in measured]
    rows = [dict(zip(figures, row, strict=True)) for row in zip(*figures.values(), strict=True)]
    lines = [json.dumps({"file_name": name, **row}) for name, row in zip(names, rows, strict=True)]
    write_text(path, "".join(line + "\n" for line in lines))


def _has_torchmetrics() -> bool:
    from importlib.util import find_spec

    return find_spec("torchmetrics") is not None
