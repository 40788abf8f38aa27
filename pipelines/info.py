"""What a folder holds: a bundle, one of its parts, a training run, codes, or data. Weights are not loaded.

Parameters are counted from the headers of the safetensors files: 8 bytes of length, then JSON with names and shapes.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from common.errors import InputError
from common.folder import read_items
from common.weights import find_folder
from stage2_prior.presets import parameters as count
from stage2_prior.presets import preset, presets

MAX_HEADER = 100_000_000  # bytes; safetensors' own limit


def describe(name: str | Path) -> dict[str, Any]:
    """Kind, size and figures of a folder, a shipped bundle, a hub name, or a preset of a prior's sizes.

    Raises InputError for anything else.
    """
    if not Path(name).is_dir() and str(name) in presets():
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
            report |= _read_json(folder / "meta.json")
        case "training run":
            report |= _run(folder)
        case _:
            raise InputError(
                f"{folder} is not a bundle, a part of one, a training run, codes or a folder of pictures; "
                "a part holds config.json and model.safetensors"
            )
    return report | {"bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())}


def kind_of(folder: Path) -> str | None:
    """What `folder` is by the files in it; None when it is nothing of ours."""
    if (folder / "model_index.json").is_file():
        return "bundle"
    if (folder / "open_clip_config.json").is_file():
        return "reranker"
    if (folder / "adapter_config.json").is_file():
        return "LoRA"
    if (folder / "config.json").is_file():
        return "image tokenizer" if _read_json(folder / "config.json").get("type") == "autoencoder" else "prior"
    if (folder / "recipe.yaml").is_file() and (folder / "checkpoints").is_dir():
        return "training run"
    if (folder / "meta.json").is_file():
        return "codes"
    if (folder / "tokenizer.json").is_file():
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
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 0 < length <= min(size - 8, MAX_HEADER):
                raise ValueError("its header is cut off")
            header = json.loads(opened.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        ends = [entry["data_offsets"][1] for entry in tensors]
        if max(ends, default=0) != size - 8 - length:
            raise ValueError("its length differs from what its header says")
        return [entry["shape"] for entry in tensors]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
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
        if (folder / name).is_file():
            report |= _read_json(folder / name)
    if (folder / "tokenizer.json").is_file():
        report |= {"vocabulary": len(_read_json(folder / "tokenizer.json").get("model", {}).get("vocab", ()))}
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
    steps = [int(path.stem.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*.pt")]
    log = folder / "metrics.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return {"checkpoints": sorted(steps), "newest_figures": json.loads(lines[-1]) if lines else {}}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); restore the file") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(content).__name__}; restore the file")
    return content


def _find(name: str | Path) -> Path:
    shipped = Path(__file__).parent / "bundles" / str(name)
    return shipped if not Path(name).is_dir() and shipped.is_dir() else find_folder(name)
