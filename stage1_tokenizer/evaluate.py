"""How well an image tokenizer keeps pictures: `tessera evaluate tokenizer MODEL DATA`."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from common.data import ImageFolder
from common.metrics import code_counts, perplexity, psnr
from stage1_tokenizer.autoencoder import Autoencoder


@torch.inference_mode()
def evaluate(model: str | Path, data: str | Path, split: str | None = None, batch_size: int = 64) -> dict[str, Any]:
    """Figures over every picture of `data` (of its `split`), each encoded and decoded at the tokenizer's own size.

    PSNR in dB is the mean over pictures of 8-bit pictures; `codes_used` is the share of the codebook that occurs at
    all, `perplexity` the exponential of the entropy of code use; both are means over the codebooks, and left out for a
    continuous tokenizer. Raises InputError for a wrong model or data folder, or a broken picture.
    """
    tokenizer = Autoencoder.from_pretrained(model)
    images = ImageFolder(data, tokenizer.image_size, split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer.to(device)
    counts = torch.zeros((), dtype=torch.int64, device=device)  # (Q, K) once there are codes
    figures, start = [], time.perf_counter()
    for first in tqdm(range(0, len(images), batch_size), unit="batch", disable=not sys.stderr.isatty()):
        batch = torch.stack([images.image(i) for i in range(first, min(first + batch_size, len(images)))]).to(device)
        if tokenizer.continuous:
            decoded = tokenizer.decode_latents(tokenizer.encode_latents(batch))
        else:
            codes = tokenizer.encode(batch)
            counts = counts + code_counts(codes, tokenizer.codebook_size)
            decoded = tokenizer.decode(codes)
        figures.append(psnr(decoded, batch).cpu())
    seconds = time.perf_counter() - start
    of_codes: dict[str, float] = {}
    if not tokenizer.continuous:
        used = round(float((counts > 0).float().mean()), 4)
        of_codes = {"codes_used": used, "perplexity": round(perplexity(counts), 1)}
    return {
        "model": str(model),
        "data": str(data),
        "split": split or "all",
        "pictures": len(images),
        "image_size": tokenizer.image_size,
        "psnr": round(float(torch.cat(figures).mean()), 3),
        **of_codes,
        "images_per_second": round(len(images) / seconds, 1),
    }
