"""What a data folder says: images with captions, weights, labels and segmentation maps, without opening an image.

Two layouts are read: Hugging Face's imagefolder (`metadata.jsonl` or `metadata.csv` beside the images, with
`file_name`, `text` and optionally `split`, `weight`, `label`, the name or number of a class, and `segmentation`, the
file of a segmentation map), and sidecar captions (`a.jpg` with `a.txt`, a caption a line). Splits are a field of the
metadata, or subfolders called train, test and validation (or as `datasets` also reads them: training, testing, eval,
evaluation, valid, val, dev), each in either layout.

Links are followed. Hidden files and folders, and those that systems keep for themselves, are passed over; so are
images that Tessera wrote, which lie there where a run or its output is kept inside the folder. Files that look like
images and are not read are named in `Contents.left_out`.
"""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import features

from tessera.errors import InputError, nearest
from tessera.files import read_json_lines, read_lines, read_text
from tessera.images import written_by_tessera

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif")
OTHER_PICTURES = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".eps", ".ico", ".tga", ".exr", ".hdr", ".dng",
                  ".cr2", ".cr3", ".nef", ".arw", ".raw")  # fmt: skip
METADATA = ("metadata.jsonl", "metadata.csv")
SPLITS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
LIKELY = {"text": ("caption", "captions", "prompt", "description"), "file_name": ("filename", "file", "image", "path")}
MOST_CLASSES = 100_000


class Item(NamedTuple):
    path: Path
    captions: tuple[str, ...]  # equally true descriptions; may be empty
    weight: float  # how often the image is drawn, relative to the others
    kind: str  # free label from the metadata, "" when there is none
    label: str = ""  # name or number of its class, "" when it has none
    segmentation: Path | None = None  # image of its segmentation map


class Contents(NamedTuple):
    items: list[Item]
    left_out: list[str]  # a sentence for each file that looks like an image of the user's and is not among them
    without_text: str  # why there are no captions, where there are none: a clause for messages


class _Row(NamedTuple):
    where: str  # file and line, for messages
    folder: Path  # that `file_name` is relative to
    values: dict[str, Any]
    split: str  # where the values name none


def read_items(folder: Path, split: str | None = None) -> list[Item]:
    """Every image of `folder` (and of `split`, if given). Raises InputError as `read_folder`."""
    return read_folder(folder, split).items


def read_folder(folder: Path, split: str | None = None) -> Contents:
    """What is in `folder` (and of `split`, if given).

    Raises InputError when there are no images or no such split, and for the first line of metadata that is wrong.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a folder of pictures")
    left_out: list[str] = []
    rows = list(_rows(folder, left_out))
    if not rows:
        more = f"; {_named(left_out)}" if left_out else ""
        raise InputError(f"{folder} has no pictures ({', '.join(SUFFIXES)}) and no metadata.jsonl{more}")
    if split is not None:
        splits = [_split(row) for row in rows]
        wanted = split if split in splits else SPLITS.get(split.lower(), split)
        if wanted not in splits:
            raise InputError(f"{folder} has no split '{split}'{nearest(split, sorted(set(splits)))}")
        rows = [row for row, name in zip(rows, splits, strict=True) if name == wanted]
    return Contents([_item(row) for row in rows], left_out, _without_text(folder, rows))


def class_names(items: Sequence[Item]) -> tuple[str, ...]:
    """The names of all classes in the order of their numbers: 0, 1, ... where labels are numbers, else the alphabet's.

    Empty where nothing is labelled. Raises InputError when only some of the images are.
    """
    labels = {item.label for item in items}
    if "" in labels:
        if len(labels) > 1:
            bare = next(item for item in items if not item.label)
            raise InputError(f"{bare.path} has no label and others have; label all pictures or none")
        return ()
    if not all(label.isdecimal() and str(int(label)) == label for label in labels):
        return tuple(sorted(labels))
    highest = max(int(label) for label in labels)
    if highest >= MOST_CLASSES:
        raise InputError(f"the label {highest} is too high, classes are numbered from 0 on; number them without gaps")
    return tuple(str(number) for number in range(highest + 1))


def describe_left_out(left_out: Sequence[str]) -> str:
    """One sentence about files that are left out; empty where there are none."""
    return f"left out: {_named(left_out)}" if left_out else ""


def _named(sentences: Sequence[str], most: int = 3) -> str:
    more = f", and {len(sentences) - most:,} more" if len(sentences) > most else ""
    return f"{len(sentences):,} file{'s' if len(sentences) > 1 else ''}: {', '.join(sentences[:most])}{more}"


# Rows -----------------------------------------------------------------------------------------------------------------


def _rows(folder: Path, left_out: list[str], split: str = "train") -> Iterator[_Row]:
    """The rows of a folder in either layout, or of the split folders in it."""
    jsonl, table = (folder / name for name in METADATA)
    if jsonl.is_file():
        for where, values in read_json_lines(jsonl):
            if not isinstance(values, dict):
                raise InputError(f"{where}: must be an object with 'file_name' and 'text'")
            yield _Row(where, folder, values, _split_of_name(values, split))
    elif table.is_file():
        for where, values in _csv_rows(table):
            yield _Row(where, folder, values, _split_of_name(values, split))
    else:
        splits = _split_folders(folder)
        for inner, name in splits:
            yield from _rows(inner, left_out, name)
        if not splits:
            yield from _sidecar_rows(folder, left_out, split)


def _split_folders(folder: Path) -> list[tuple[Path, str]]:
    """The subfolders that are splits, and which: where every subfolder that is to be read is one, and no image lies
    beside them. A folder `train` beside `car` and `bus` holds images of trains."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not _hidden(path.name):
            if path.name.lower() not in SPLITS:
                return []
            found.append((path, SPLITS[path.name.lower()]))
        elif path.suffix.lower() in SUFFIXES and not _hidden(path.name):
            return []
    return found


def _split_of_name(values: dict[str, Any], split: str) -> str:
    """The split that the beginning of `file_name` says, as in train/0001.png; `split` where it says none."""
    name = values.get("file_name")
    first = PurePosixPath(name).parts[:1] if isinstance(name, str) and "/" in name else ()
    return SPLITS.get(first[0].lower(), split) if first else split


def _split(row: _Row) -> str:
    given = row.values.get("split")
    return row.split if given is None else str(given)


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    text = read_text(path)
    header = text[: text.find("\n")] if "\n" in text else text
    counts = {mark: header.count(mark) for mark in ",;\t"}
    delimiter = max(counts, key=lambda mark: counts[mark]) if any(counts.values()) else ","
    before = csv.field_size_limit(2**31 - 1)  # a caption may be of any length
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error as error:
        raise InputError(f"{path} is not a table ({error}); save it as CSV again") from None
    finally:
        csv.field_size_limit(before)
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _sidecar_rows(folder: Path, left_out: list[str], split: str) -> Iterator[_Row]:
    can_avif = "avif" in features.get_supported()  # `check` warns of what an older Pillow has not heard of
    names = _walk(folder)
    present = set(names)
    for name in names:
        stem, suffix = os.path.splitext(name)
        suffix, path = suffix.lower(), folder / name
        if suffix in OTHER_PICTURES or (suffix == ".avif" and not can_avif):
            left_out.append(f"{path} ({suffix} is not read)")
        elif suffix in SUFFIXES:
            text = read_lines(folder / f"{stem}.txt") if f"{stem}.txt" in present else []
            if suffix == ".png" and not text and _ours(path):
                left_out.append(f"{path} (written by Tessera)")
                continue
            yield _Row(str(path), folder, {"file_name": name, "text": text}, split)


def _walk(folder: Path) -> list[str]:
    """The names of all files below `folder`, with / between folders, through links too, but for hidden ones; in the
    order of their folders and names."""
    found: list[str] = []

    def into(place: str, prefix: str, above: frozenset[tuple[int, int]]) -> None:
        with os.scandir(place) as entries:
            for entry in entries:
                if _hidden(entry.name):
                    continue
                if entry.is_dir():
                    status = os.stat(entry.path)
                    identity = (status.st_dev, status.st_ino)
                    if identity not in above:  # a link to a folder that it lies in would have no end
                        into(entry.path, f"{prefix}{entry.name}/", above | {identity})
                elif entry.is_file():
                    found.append(prefix + entry.name)

    status = folder.stat()
    try:
        into(str(folder), "", frozenset({(status.st_dev, status.st_ino)}))
    except OSError as error:
        raise InputError(f"cannot read {error.filename or folder}: {error.strerror}; mend its permissions") from None
    return sorted(found, key=lambda name: name.split("/"))


def _ours(path: Path) -> bool:
    try:
        return written_by_tessera(path)
    except OSError:  # reading it will say so
        return False


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM_FOLDERS


# Items ----------------------------------------------------------------------------------------------------------------


def _item(row: _Row) -> Item:
    where, values = row.where, row.values
    name, text = values.get("file_name"), values.get("text")
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: 'file_name' is missing{_likely(values, 'file_name')}")
    captions = [text] if isinstance(text, str) else [] if text is None else text
    if not isinstance(captions, list) or not all(isinstance(caption, str | None) for caption in captions):
        raise InputError(f"{where}: 'text' must be a caption or a list of captions")
    try:
        weight = float(values.get("weight") or 1.0)
    except (TypeError, ValueError):
        weight = -1.0
    if not 0 < weight < float("inf"):
        raise InputError(f"{where}: 'weight' must be a number above 0, got {values['weight']!r:.40}")
    label, map_name = values.get("label"), values.get("segmentation")
    label = "" if label is None else label
    if not isinstance(label, str | int) or isinstance(label, bool) or isinstance(label, int) and label < 0:
        raise InputError(f"{where}: 'label' must be a name or a number from 0 on, got {label!r:.40}")
    if not isinstance(map_name, str | None):
        raise InputError(f"{where}: 'segmentation' must be the file of a map, got {map_name!r:.40}")
    return Item(
        _inside(row.folder, where, "file_name", name),
        tuple(caption for caption in captions if caption and caption.strip()),
        weight,
        str(values.get("kind") or ""),
        str(label).strip(),
        _inside(row.folder, where, "segmentation", map_name) if map_name else None,
    )


def _inside(folder: Path, where: str, field: str, name: str) -> Path:
    """The file `name` of the folder; a link there may lead anywhere, a name may not."""
    path = folder / name
    if not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(folder)):
        raise InputError(f"{where}: '{field}' {name} leads out of the folder")
    return path


def _without_text(folder: Path, rows: Sequence[_Row]) -> str:
    found = next((hint for row in rows[:100] if (hint := _likely(row.values, "text"))), "")
    return f"its metadata has no 'text'{found}" if found else "add metadata.jsonl or .txt files beside them"


def _likely(values: dict[str, Any], field: str) -> str:
    """Which field of another name seems to be meant."""
    by_lower_case = {str(name).lower(): str(name) for name in values if name is not None}
    found = next((by_lower_case[name] for name in LIKELY[field] if name in by_lower_case), None)
    return f", but '{found}'; rename it to '{field}'" if found else ""
