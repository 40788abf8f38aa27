"""What a data folder holds, found before any GPU hour: images, captions, broken files, duplicates."""

import hashlib
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tessera.data.folder import Item, read_folder
from tessera.errors import InputError
from tessera.images import open_image

NAMED = 10  # broken files and duplicates that are named; the rest are counted


def check(folder: str | Path, split: str | None = None, images_only: bool = False) -> dict[str, Any]:
    """Reads every image of `folder` and counts what training would meet.

    Raises InputError when nothing can be used: no images, none readable, or no captions (fine with `images_only`,
    which is what a tokenizer needs).
    """
    items, left_out, without_text = read_folder(Path(folder), split)
    captions = [caption for item in items for caption in item.captions]
    if not captions and not images_only:
        raise InputError(
            f"{folder} has pictures but no captions; {without_text}, or give --images-only, which is enough for a "
            "tokenizer"
        )
    sizes, broken, copies = _read_all(items)
    if not sizes:
        raise InputError(f"{folder}: none of its {len(items)} pictures can be read; the first: {broken[0]}")
    return {
        "folder": str(folder),
        "pictures": len(sizes),
        "broken": len(broken),
        "left_out": len(left_out),
        "duplicates": len(copies),
        "with_captions": sum(1 for item in items if item.captions),
        "captions": len(captions),
        "different_captions": len(set(captions)),
        "caption_characters": _spread([len(caption) for caption in captions]),
        "shorter_side": _spread([min(size) for size in sizes]),
        "kinds": dict(Counter(item.kind for item in items if item.kind).most_common()),
        "broken_files": broken[:NAMED],
        "left_out_files": left_out[:NAMED],
        "duplicate_files": copies[:NAMED],
    }


def _read_all(items: list[Item]) -> tuple[list[tuple[int, int]], list[str], list[str]]:
    """Sizes of the readable images, a sentence per broken one, a line per image that repeats an earlier one."""
    sizes, broken, copies = [], [], []
    first_with: dict[str, Path] = {}
    for item in tqdm(items, "reading", unit="picture", disable=not sys.stderr.isatty()):
        try:
            image = open_image(item.path)
        except InputError as error:
            broken.append(str(error))
            continue
        sizes.append(image.size)
        pixels = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
        if pixels in first_with:
            copies.append(f"{item.path} equals {first_with[pixels]}")
        first_with.setdefault(pixels, item.path)
    return sizes, broken, copies


def _spread(values: list[int]) -> dict[str, float]:
    """Smallest, median and largest value; empty when there are none."""
    return {"min": min(values), "median": statistics.median(values), "max": max(values)} if values else {}
