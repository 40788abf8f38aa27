"""Checkpoints on disk: what is in one, whether it is whole, and whether a run may resume from it."""

import itertools
import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from tessera.config import Config
from tessera.errors import InputError
from tessera.files import parse_yaml, read_text
from tessera.weights.writing import refuse_foreign

# Keys of a recipe that may differ between a checkpoint and the run that resumes from it: how long, how often, how fast
# and where to. Paths may differ too; what they lead to is compared by its content.
MAY_CHANGE = (
    "run.output", "run.steps", "run.checkpoint_every", "run.keep_checkpoints", "run.log_every", "run.sample_every",
    "run.num_workers", "run.compile", "run.accumulate", "activation_checkpointing", "prompts", "sampling",
    "data.validation_split", "loss.decoder_only_from",
)  # fmt: skip
TRAINED = "what is trained"  # in the identity of a run: the stage
CHECKPOINT = re.compile(r"step-(\d+)\.pt")


def identity_of(recipe: Config, identities: Mapping[str, str]) -> dict[str, str]:
    """What goes into a run, by the keys of its recipe: values as JSON, and for paths what they lead to."""
    found = {TRAINED: type(recipe).__name__.removesuffix("Recipe").lower()}

    def walk(prefix: str, config: BaseModel) -> None:
        for name in type(config).model_fields:
            key, value = f"{prefix}{name}", getattr(config, name)
            if key in MAY_CHANGE or isinstance(value, Path):
                continue
            if isinstance(value, BaseModel):
                walk(f"{key}.", value)
            else:
                found[key] = json.dumps(to_jsonable_python(value), ensure_ascii=False, sort_keys=True)

    walk("", recipe)
    return found | dict(identities)


def refuse_foreign_run(folder: Path) -> None:
    """Raises InputError when `folder` holds files with the names of a run's that no run wrote."""
    refuse_foreign(folder / "model")
    recipe = folder / "recipe.yaml"
    if not recipe.is_file() or not (folder / "checkpoints").is_dir():
        foreign = [name for name in ("recipe.yaml", "metrics.jsonl", "doctor.html") if (folder / name).exists()]
        if foreign:
            raise InputError(f"{folder / foreign[0]} is in the way: no run wrote it; choose another run.output")
        return
    content = parse_yaml(read_text(recipe), str(recipe))
    if not isinstance(content, dict) or not isinstance(content.get("run"), dict):
        raise InputError(f"{recipe} is in the way: no run wrote it; choose another run.output")


def refuse_changes(before: Any, now: dict[str, str], folder: Path) -> None:
    """Raises InputError for the first thing that a checkpoint was made from otherwise. Those of earlier releases do not
    say; keys that either side does not know are not compared, so that a release may have more of them."""
    if not isinstance(before, dict):
        return
    for key in sorted(before.keys() & now.keys(), key=lambda key: (key != TRAINED, key)):
        if before[key] != now[key]:
            raise InputError(
                f"{key} has changed: it was {_short(before[key])} when the checkpoints in {folder} were written and is "
                f"{_short(now[key])} now; restore it, or give run.output another folder"
            )


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def is_checkpoint(path: Path, step: int) -> bool:
    """Whether the file is a run's after that step, by its content; tensors are not read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # unpickling fails in many ways
        return False
    return isinstance(content, dict) and content.get("step") == step


def move_aside(path: Path, step: int) -> None:
    """Gives a file that has a checkpoint's name and is none, damaged or somebody else's, another name."""
    if os.path.lexists(path) and not is_checkpoint(path, step):
        names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
        path.rename(next(name for name in names if not os.path.lexists(name)))


def read_checkpoint(path: Path) -> dict[str, Any] | str:
    """The content of a checkpoint, or in a clause what is wrong with the file."""
    try:
        if path.stat().st_size == 0:
            return "it is empty"
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()  # torch itself does not look at the checksums
        if damaged is not None:
            return f"its part {damaged} is not what was written"
        content = torch.load(path, map_location="cpu", weights_only=True)
    except zipfile.BadZipFile:
        return "it is cut off or overwritten"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"
    except Exception:  # unpickling fails in many ways, and torch's advice is not for these files
        return "it is not a checkpoint of a run"
    if not isinstance(content, dict) or not isinstance(content.get("step"), int):
        return "it is not a checkpoint of a run"
    return content
