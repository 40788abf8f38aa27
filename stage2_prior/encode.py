"""Encodes a data folder once, on any number of processes: `tessera encode RECIPE.yaml`."""

import json
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from pydantic import Field
from safetensors.torch import save_file
from tqdm import tqdm

from common.config import Config, read_recipe
from common.data import DataConfig, ImageFolder, class_names, read_items
from common.errors import InputError
from common.images import read_map
from common.weights import write_json
from stage1_tokenizer import Autoencoder
from stage2_prior.codes import CAPTIONS, META, CodesMeta, SegmentationMeta, shard_name


class EncodeRecipe(Config):
    data: DataConfig
    image_tokenizer: Path
    segmentation_tokenizer: Path | None = None  # of the pictures' segmentation maps, for a prior that draws from them
    output: Path
    batch_size: int = Field(64, gt=0)
    shard_rows: int = Field(8192, gt=0)


@torch.inference_mode()
def encode(recipe_path: str | Path, overrides: list[str] | None = None) -> Path:
    """Writes the codes of a recipe's pictures; returns their folder.

    Raises InputError for a broken picture, and when the folder holds codes of another tokenizer or of other data.
    """
    recipe = read_recipe(EncodeRecipe, recipe_path, overrides)
    state = PartialState()
    tokenizer = _tokenizer("image_tokenizer", recipe.image_tokenizer).to(state.device)
    map_tokenizer = None
    if recipe.segmentation_tokenizer is not None:
        map_tokenizer = _tokenizer("segmentation_tokenizer", recipe.segmentation_tokenizer).to(state.device)
    data = ImageFolder(recipe.data.folder, tokenizer.image_size, recipe.data.split)
    if map_tokenizer is not None:
        bare = next((item for item in data.items if item.segmentation is None), None)
        if bare is not None:
            raise InputError(f"{bare.path} has no segmentation map; name one in 'segmentation' of the metadata")
    names = class_names(read_items(recipe.data.folder))  # of all splits, so that each numbers them alike
    numbers = {name: number for number, name in enumerate(names)}
    meta = CodesMeta(
        tokenizer_fingerprint=tokenizer.fingerprint,
        codebook_size=tokenizer.codebook_size,
        code_shape=tokenizer.code_shape,
        rows=len(data),
        shard_rows=recipe.shard_rows,
        class_names=names,
        segmentation=None if map_tokenizer is None else SegmentationMeta(
            tokenizer_fingerprint=map_tokenizer.fingerprint,
            codebook_size=map_tokenizer.codebook_size,
            code_shape=map_tokenizer.code_shape,
        ),
    )  # fmt: skip
    folder = recipe.output
    _check_folder(folder, meta)
    if state.is_main_process:
        rows = [{"text": item.captions, "weight": item.weight} for item in data.items]
        if names:
            rows = [row | {"label": numbers[item.label]} for row, item in zip(rows, data.items, strict=True)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / CAPTIONS).write_text(text, encoding="utf-8")
        write_json(folder / META, meta.model_dump(mode="json"))

    done, began = 0, time.perf_counter()
    missing = [i for i in range(meta.shards) if not (folder / shard_name(i)).is_file()]
    bar = tqdm(total=len(missing[state.process_index :: state.num_processes]) * meta.shard_rows, unit="image",
               disable=not state.is_main_process or not sys.stderr.isatty())  # fmt: skip
    for shard in missing[state.process_index :: state.num_processes]:
        first, last = shard * meta.shard_rows, min((shard + 1) * meta.shard_rows, meta.rows)
        parts, map_parts = [], []
        for start in range(first, last, recipe.batch_size):
            some = range(start, min(start + recipe.batch_size, last))
            images = torch.stack([data.image(i) for i in some])
            parts.append(tokenizer.encode(images.to(state.device)).int().cpu())
            if map_tokenizer is not None:
                side, channels = map_tokenizer.image_size, map_tokenizer.config.trunk.image_channels
                paths = [path for path in (data.items[i].segmentation for i in some) if path is not None]
                maps = torch.stack([read_map(path, side, channels) for path in paths])
                map_parts.append(map_tokenizer.encode(maps.to(state.device)).int().cpu())
            bar.update(len(images))
            done += len(images)
        part = folder / f".{shard_name(shard)}"
        tensors = {"codes": torch.cat(parts)}
        save_file(tensors | {"segmentation": torch.cat(map_parts)} if map_parts else tensors, part)
        part.replace(folder / shard_name(shard))
    bar.close()
    seconds = time.perf_counter() - began
    if state.is_main_process:
        print(f"{folder}: {done} images in {seconds:.1f} s, {done / seconds:.1f} images per second", file=sys.stderr)
    state.wait_for_everyone()
    return folder


def _tokenizer(key: str, folder: Path) -> Autoencoder:
    tokenizer = Autoencoder.from_pretrained(folder)
    if tokenizer.continuous:
        raise InputError(f"{key}: {folder} is continuous and has no codes; name one with a codebook")
    return tokenizer


def _check_folder(folder: Path, meta: CodesMeta) -> None:
    """Makes the folder, or sees that what is in it is the same work begun before."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}; choose another output") from None
    if (folder / META).is_file():
        before = CodesMeta.model_validate_json((folder / META).read_text())
        if before != meta:
            raise InputError(f"{folder} holds codes of another tokenizer or other data; remove it or change output")
