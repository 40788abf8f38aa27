"""Encodes a data folder, on any number of processes: `tessera encode RECIPE.yaml`.

Started again it does what is missing or has changed: an image's codes are known by the content of its file, so they
are taken over where it lies elsewhere in the data now, and made anew where it was replaced. Captions, weights and
labels are always those of the data now.
"""

import json
import logging
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from stage1_tokenizer import Autoencoder
from stage2_prior.codes import CAPTIONS, META, CodesMeta, SegmentationMeta, shard_name
from tessera import logs
from tessera.config import Config, read_recipe, validate
from tessera.data.folder import Item, class_names, read_items
from tessera.data.source import DataConfig, ImageFolder, Unreadable
from tessera.errors import InputError
from tessera.files import read_json
from tessera.hardware import has_accelerator
from tessera.images import read_map
from tessera.weights.lock import FolderLock
from tessera.weights.writing import MARK, is_ours, new_file, refuse_data_folder, write_json, write_text

logger = logging.getLogger("stage2_prior")

DIGEST = 16  # bytes


class EncodeRecipe(Config):
    data: DataConfig
    image_tokenizer: Path
    segmentation_tokenizer: Path | None = None  # of the images' segmentation maps, for a prior that draws from them
    output: Path
    batch_size: int = Field(64, gt=0)
    shard_rows: int = Field(8192, gt=0)


class Tokenizers(NamedTuple):
    """What makes codes of the images, and of their segmentation maps where these are encoded too."""

    images: Autoencoder
    maps: Autoencoder | None

    @property
    def fingerprint(self) -> str:
        """Changes when codes do, or the grid they are on."""
        return " ".join(f"{one.fingerprint} {one.code_shape}" for one in (self.images, self.maps) if one is not None)


class Shard(NamedTuple):
    """One shard's tensors, and what they were made from."""

    tensors: dict[str, Tensor]
    tokenizers: str
    wanted: str  # fingerprint of the files it is for, those that could not be read among them


@torch.inference_mode()
def encode(recipe_path: str | Path, overrides: list[str] | None = None) -> Path:
    """Writes the codes of a recipe's images; returns their folder. Broken images are left out, counted and named.

    Raises InputError for too many broken images, and when the folder holds codes of another tokenizer or files that
    are not ours.
    """
    logs.show()
    recipe = read_recipe(EncodeRecipe, recipe_path, overrides)
    state = PartialState(cpu=not has_accelerator())
    tokenizers = Tokenizers(
        _tokenizer("image_tokenizer", recipe.image_tokenizer).to(state.device),
        None
        if recipe.segmentation_tokenizer is None
        else _tokenizer("segmentation_tokenizer", recipe.segmentation_tokenizer).to(state.device),
    )
    data = ImageFolder(recipe.data.folder, tokenizers.images.image_size, recipe.data.split)
    if tokenizers.maps is not None:
        bare = next((item for item in data.items if item.segmentation is None), None)
        if bare is not None:
            raise InputError(f"{bare.path} has no segmentation map; name one in 'segmentation' of the metadata")
    refuse_data_folder(recipe.output, recipe.data.folder, "output")
    names = class_names(read_items(recipe.data.folder))  # of all splits, so that each numbers them alike
    meta = _meta(tokenizers, len(data), recipe.shard_rows, names)
    folder = recipe.output
    with _locked(folder, state.is_main_process):
        _check_folder(folder, meta, tokenizers.fingerprint)
        state.wait_for_everyone()
        if state.is_main_process and data.left_out:
            logger.info("%s", data.left_out)
        done, kept, seconds = _write_shards(folder, meta, data, tokenizers, recipe.batch_size, state)
        state.wait_for_everyone()
        if state.is_main_process:
            _settle(folder, meta, _captions(data.items, names))
            rate = f"{done} images in {seconds:.1f} s, {done / seconds:.1f} images per second"
            logger.info("%s: %s%s", folder, rate, f"; {kept} had their codes" if kept else "")
        state.wait_for_everyone()
    return folder


def _write_shards(
    folder: Path, meta: CodesMeta, data: ImageFolder, tokenizers: Tokenizers, batch_size: int, state: PartialState
) -> tuple[int, int, float]:
    """Writes this process's shards that are not there yet beside those that are; returns how many images it encoded,
    how many had their codes already, and the seconds."""
    done, kept, began, unreadable = 0, 0, time.perf_counter(), Unreadable(len(data))
    known: Known | None = None
    shards = range(state.process_index, meta.shards, state.num_processes)
    bar = tqdm(total=sum(len(_items_of(shard, meta)) for shard in shards), unit="image",
               disable=not state.is_main_process or not sys.stderr.isatty())  # fmt: skip
    for shard in shards:
        wanted = _items_of(shard, meta)
        digests = [_digest(data.items[i], tokenizers.maps is not None) for i in wanted]
        asked = sha256(b"".join(digests)).hexdigest()[:16]
        if _is_done(folder, shard, tokenizers.fingerprint, asked):
            bar.update(len(wanted))
            kept += len(wanted)
            continue
        known = known or Known(folder, tokenizers.fingerprint)
        rows: dict[int, dict[str, Tensor]] = {}
        missing = []
        for i, digest in zip(wanted, digests, strict=True):
            found = known.row(digest)
            if found is None:
                missing.append(i)
            else:
                rows[i] = found
        bar.update(len(rows))
        kept += len(rows)
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            encoded, skipped = _encode(data, batch, tokenizers, state.device)
            for sentence in unreadable.add(skipped):
                logger.warning("skipped: %s", sentence)
            rows |= encoded
            done += len(encoded)
            bar.update(len(batch))
        _write(folder / staged_name(shard), rows, dict(zip(wanted, digests, strict=True)), tokenizers, asked)
    bar.close()
    return done, kept, max(time.perf_counter() - began, 1e-9)


def _encode(
    data: ImageFolder, indices: Sequence[int], tokenizers: Tokenizers, device: torch.device
) -> tuple[dict[int, dict[str, Tensor]], list[str]]:
    """The codes of the images (and maps) that can be read, and a sentence for each that cannot."""
    images, places, skipped = data.readable(indices)
    found, maps = [indices[place] for place in places], []
    if tokenizers.maps is not None:
        side, channels = tokenizers.maps.image_size, tokenizers.maps.config.trunk.image_channels
        kept = []
        for place, i in enumerate(found):
            path = data.items[i].segmentation
            assert path is not None
            try:
                maps.append(read_map(path, side, channels))
                kept.append(place)
            except InputError as error:
                skipped.append(str(error))
        images, found = images[kept], [found[place] for place in kept]
    if not found:
        return {}, skipped
    codes = {"codes": tokenizers.images.encode(images.to(device)).int().cpu()}
    if tokenizers.maps is not None:
        codes["segmentation"] = tokenizers.maps.encode(torch.stack(maps).to(device)).int().cpu()
    return {i: {name: rows[n] for name, rows in codes.items()} for n, i in enumerate(found)}, skipped


class Known:
    """The codes that the folder's shards hold already, by the content of the images."""

    def __init__(self, folder: Path, tokenizers: str) -> None:
        self._shards: list[dict[str, Tensor]] = []
        self._places: dict[bytes, tuple[int, int]] = {}
        for path in sorted([*folder.glob("codes-*.safetensors"), *folder.glob("next-*.safetensors")]):
            shard = _read(path)
            if shard is None or shard.tokenizers != tokenizers or "pictures" not in shard.tensors:
                continue
            for row, digest in enumerate(shard.tensors["pictures"].numpy()):
                self._places[digest.tobytes()] = len(self._shards), row
            self._shards.append(shard.tensors)

    def row(self, digest: bytes) -> dict[str, Tensor] | None:
        if digest not in self._places:
            return None
        shard, row = self._places[digest]
        return {
            name: self._shards[shard][name][row] for name in ("codes", "segmentation") if name in self._shards[shard]
        }


def staged_name(shard: int) -> str:
    """Of a new shard, until all are there: a folder has the codes of one state of the data."""
    return f"next-{shard:05d}.safetensors"


def _settle(folder: Path, meta: CodesMeta, captions: str) -> None:
    """Puts the new shards in place of the old, with the captions that belong to them. Until the end there is no
    `meta.json`, so a folder that was left half-way is not taken for a whole one."""
    staged = [shard for shard in range(meta.shards) if (folder / staged_name(shard)).is_file()]
    extra = _shards_beyond(folder, meta.shards)
    content = meta.model_dump(mode="json")
    if not staged and not extra and _same(folder, content, captions):
        return
    (folder / META).unlink(missing_ok=True)
    for path in extra:
        path.unlink()
    for shard in staged:
        (folder / staged_name(shard)).replace(folder / shard_name(shard))
    write_text(folder / CAPTIONS, captions)
    write_json(folder / META, content)


def _shards_beyond(folder: Path, count: int) -> list[Path]:
    """Shards of ours, staged or in place, with numbers from `count` on."""
    numbered = [(re.fullmatch(r"(?:codes|next)-(\d+)\.safetensors", path.name), path) for path in folder.iterdir()]
    return [path for match, path in numbered if match and int(match[1]) >= count and is_ours(path)]


def _same(folder: Path, content: object, captions: str) -> bool:
    try:
        same_meta: bool = json.loads((folder / META).read_text(encoding="utf-8")) == content
        return same_meta and (folder / CAPTIONS).read_text(encoding="utf-8") == captions
    except (OSError, ValueError):
        return False


def _captions(items: Sequence[Item], names: tuple[str, ...]) -> str:
    numbers = {name: number for number, name in enumerate(names)}
    rows: Iterator[dict[str, object]] = (
        {"text": item.captions, "weight": item.weight} | ({"label": numbers[item.label]} if names else {})
        for item in items
    )
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _items_of(shard: int, meta: CodesMeta) -> range:
    return range(shard * meta.shard_rows, min((shard + 1) * meta.shard_rows, meta.rows))


def _digest(item: Item, with_map: bool) -> bytes:
    """Of the content of an image's file, and of its map's; files that are not there have a digest of their own."""
    digest = sha256()
    for path in (item.path, *((item.segmentation,) if with_map and item.segmentation else ())):
        try:
            digest.update(path.read_bytes())
        except OSError as error:
            digest.update(f"unreadable {error.errno}".encode())
    return digest.digest()[:DIGEST]


def _write(
    path: Path, rows: dict[int, dict[str, Tensor]], digests: dict[int, bytes], tokenizers: Tokenizers, wanted: str
) -> None:
    items = sorted(rows)
    shape = (0, *tokenizers.images.code_shape)
    tensors = {
        "codes": torch.stack([rows[i]["codes"] for i in items]) if items else torch.empty(shape, dtype=torch.int32),
        "items": torch.tensor(items, dtype=torch.int64),
        "pictures": torch.tensor([list(digests[i]) for i in items], dtype=torch.uint8).view(-1, DIGEST),
    }
    if tokenizers.maps is not None:
        shape = (0, *tokenizers.maps.code_shape)
        maps = [rows[i]["segmentation"] for i in items]
        tensors["segmentation"] = torch.stack(maps) if maps else torch.empty(shape, dtype=torch.int32)
    with new_file(path) as part:
        save_file(tensors, part, {MARK: json.dumps({"tokenizers": tokenizers.fingerprint, "wanted": wanted})})


def _read(path: Path) -> Shard | None:
    """A shard of ours, None where it is damaged."""
    try:
        with safe_open(path, "pt") as opened:
            facts = json.loads((opened.metadata() or {}).get(MARK, "{}"))
        return Shard(load_file(path), facts.get("tokenizers", ""), facts.get("wanted", ""))
    except (SafetensorError, OSError, ValueError, AttributeError):
        return None


def _is_done(folder: Path, shard: int, tokenizers: str, wanted: str) -> bool:
    """Whether a shard, staged or in place, holds the codes of these very files."""
    for name in (staged_name(shard), shard_name(shard)):
        path = folder / name
        if path.is_file():
            found = _read(path)
            return found is not None and found.tokenizers == tokenizers and found.wanted == wanted
    return False


def _meta(tokenizers: Tokenizers, rows: int, shard_rows: int, names: tuple[str, ...]) -> CodesMeta:
    images, maps = tokenizers
    return CodesMeta(
        tokenizer_fingerprint=images.fingerprint,
        codebook_size=images.codebook_size,
        code_shape=images.code_shape,
        rows=rows,
        shard_rows=shard_rows,
        class_names=names,
        segmentation=None if maps is None else SegmentationMeta(
            tokenizer_fingerprint=maps.fingerprint,
            codebook_size=maps.codebook_size,
            code_shape=maps.code_shape,
        ),
    )  # fmt: skip


def _tokenizer(key: str, folder: Path) -> Autoencoder:
    tokenizer = Autoencoder.from_pretrained(folder)
    if tokenizer.continuous:
        raise InputError(f"{key}: {folder} is continuous and has no codes; name one with a codebook")
    return tokenizer


@contextmanager
def _locked(folder: Path, is_main: bool) -> Iterator[None]:
    lock = FolderLock(folder) if is_main else None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _check_folder(folder: Path, meta: CodesMeta, tokenizers: str) -> None:
    """Sees that the folder holds nothing, or codes of the same tokenizers. Raises InputError."""
    shards = [*folder.glob("codes-*.safetensors"), *folder.glob("next-*.safetensors")]
    if (folder / META).is_file():
        before = validate(CodesMeta, read_json(folder / META, "choose another output"), where=str(folder / META))
        made_with = ("tokenizer_fingerprint", "codebook_size", "code_shape", "segmentation")
        other = any(getattr(before, key) != getattr(meta, key) for key in made_with)
    else:
        foreign = [path for path in shards if not is_ours(path)]
        foreign += [folder / CAPTIONS] if (folder / CAPTIONS).exists() and not shards else []
        if foreign:
            raise InputError(f"{foreign[0]} is in the way: Tessera did not write it; choose another output")
        found = [_read(path) for path in shards]
        other = any(shard is not None and shard.tokenizers != tokenizers for shard in found)
    if other:
        raise InputError(f"{folder} holds codes of another tokenizer; remove it or change output")
