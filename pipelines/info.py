"""What a folder holds: a bundle, one of its parts, a training run, codes, or data. Weights are not loaded.

Parameters are counted from the headers of the safetensors files: 8 bytes of length, then JSON with names and shapes.
"""

import json
import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from stage2_prior.presets import parameters as count
from stage2_prior.presets import preset, presets
from tessera.data.folder import read_items
from tessera.errors import InputError
from tessera.files import parse_json, read_json_object, read_lines
from tessera.paths import expand, is_file, is_folder
from tessera.weights.folder import find_folder

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


def describe(name: str | Path) -> dict[str, Any]:
    """Kind, size and figures of a folder, a shipped bundle, a hub name, or a preset of a prior's sizes.

    Raises InputError for anything else.
    """
    if not is_folder(expand(name)) and str(name) in presets():
        config = preset(str(name))
        return {"kind": "preset", "parameters": count(config)} | config.model_dump(mode="json", exclude_defaults=True)
    folder = _find(name)
    report: dict[str, Any] = {"folder": str(folder), "kind": kind_of(folder)}
    match report["kind"]:
        case "bundle":
            report |= _bundle(folder)
        case "image tokenizer" | "prior" | "reranker" | "text tokenizer" | "LoRA":
            report |= _part(folder)
        case "data":
            report |= _data(folder)
        case "codes":
            report |= read_json_object(folder / "meta.json")
        case "training run":
            report |= _run(folder)
        case _:
            raise InputError(
                f"{folder} is not a bundle, a part of one, a training run, codes or a folder of pictures; "
                "a part holds config.json and model.safetensors"
            )
    return report | {"bytes": _bytes(folder)}


def kind_of(folder: Path) -> str | None:
    """What `folder` is by the files in it; None when it is nothing of ours."""
    if is_file(folder / "model_index.json"):
        return "bundle"
    if is_file(folder / "open_clip_config.json"):
        return "reranker"
    if is_file(folder / "adapter_config.json"):
        return "LoRA"
    if is_file(folder / "config.json"):
        kind = read_json_object(folder / "config.json").get("type")
        return "image tokenizer" if kind == "autoencoder" else "prior"
    if is_file(folder / "recipe.yaml") and is_folder(folder / "checkpoints"):
        return "training run"
    if is_file(folder / "meta.json"):
        return "codes"
    if is_file(folder / "tokenizer.json"):
        return "text tokenizer"
    try:
        return "data" if read_items(folder) else None
    except InputError:
        return None


def parameters(folder: Path) -> int:
    """Numbers in all safetensors files of `folder`, read from their headers."""
    return sum(math.prod(shape) for file in sorted(folder.glob("*.safetensors")) for shape in _shapes(file))


def _shapes(file: Path) -> list[list[int]]:
    """The shapes of the tensors in a safetensors file. Raises InputError when its header or length is wrong."""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length <= min(size - 8, MAX_HEADER):
                raise ValueError("its header is cut off")
            header = json.loads(opened.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        ends = [entry["data_offsets"][1] for entry in tensors]
        if max(ends, default=0) != size - 8 - length:
            raise ValueError("its length differs from what its header says")
        shapes = [entry["shape"] for entry in tensors]
        if not all(isinstance(side, int) and side >= 0 for shape in shapes for side in shape):
            raise ValueError("it has a shape that cannot be")
        return shapes
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise InputError(f"{file} is not a whole safetensors file ({error}); restore it") from None


def _bundle(folder: Path) -> dict[str, Any]:
    """Fingerprints, sampling defaults and parts; files are not compared with the index, loading does that."""
    from pipelines.bundle import PARTS, bundle_fingerprint, read_index

    index = read_index(folder)
    parts = {part: _part(folder / part) for part in PARTS if (folder / part).is_dir()}
    return {
        "fingerprint": bundle_fingerprint(folder),
        "written_by": f"tessera {index.tessera_version}",
        "parameters": sum(part.get("parameters", 0) for part in parts.values()),
        "sampling": index.sampling.model_dump(),
        "likelihood_weight": index.likelihood_weight,
        "fingerprints": index.fingerprints.model_dump(),
        **parts,
    }


def _part(folder: Path) -> dict[str, Any]:
    """Parameters and config of a model folder, or the size of a text tokenizer's vocabulary."""
    report: dict[str, Any] = {}
    if any(folder.glob("*.safetensors")):
        report |= {"parameters": parameters(folder)}
    for name in ("config.json", "open_clip_config.json", "adapter_config.json"):
        if is_file(folder / name):
            report |= read_json_object(folder / name)
    if is_file(folder / "tokenizer.json"):
        model = read_json_object(folder / "tokenizer.json").get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocabulary, dict | list):
            raise InputError(f"{folder / 'tokenizer.json'} has no vocabulary; restore the file")
        report |= {"vocabulary": len(vocabulary)}
    return report


def _data(folder: Path) -> dict[str, Any]:
    items = read_items(folder)
    return {
        "pictures": len(items),
        "captions": sum(len(item.captions) for item in items),
        "kinds": dict(Counter(item.kind for item in items if item.kind).most_common()),
    }


def _run(folder: Path) -> dict[str, Any]:
    """How far a training run has come, and its newest figures."""
    names = [re.fullmatch(r"step-(\d+)\.pt", path.name) for path in (folder / "checkpoints").iterdir()]
    log = folder / "metrics.jsonl"
    lines = [line for line in read_lines(log) if line.strip()] if is_file(log) else []
    newest: dict[str, Any] = {}
    for line in lines[-1:] + lines[-2:-1]:  # a run that was killed may have left half of its last line
        try:
            newest = parse_json(line, str(log), "remove the line")
            break
        except InputError:
            continue
    return {"checkpoints": sorted(int(name[1]) for name in names if name), "newest_figures": newest}


def _bytes(folder: Path) -> int:
    """Of all files in a folder that can be looked at."""
    files = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file))


def _find(name: str | Path) -> Path:
    shipped = Path(__file__).parent / "bundles" / str(name)
    return shipped if not is_folder(expand(name)) and shipped.is_dir() else find_folder(name)
