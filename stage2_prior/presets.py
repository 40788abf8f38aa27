"""Published sizes of the GPT by name: the files in `configs/`, which a recipe can start from."""

from pathlib import Path
from typing import Any

import torch

from stage2_prior.gpt import GPTConfig, GPTPrior, GPTSize
from tessera.config import validate
from tessera.errors import nearest
from tessera.files import read_yaml

FOLDER = Path(__file__).parent / "configs"


def presets() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def preset(name: str) -> GPTConfig:
    """The whole config of a published prior. Raises ValueError for a name that is not among `presets()`."""
    if name not in presets():
        raise ValueError(f"'{name}' is not a preset{nearest(name, presets())}")
    path = FOLDER / f"{name}.yaml"
    return validate(GPTConfig, read_yaml(path), where=str(path))


def with_preset(values: Any) -> Any:
    """A recipe's `model` with what it does not name taken from its `preset`; other values pass as they are."""
    if not isinstance(values, dict) or "preset" not in values:
        return values
    base = preset(str(values["preset"])).model_dump(include=set(GPTSize.model_fields))
    return base | {key: value for key, value in values.items() if key != "preset"}


def parameters(config: GPTConfig) -> int:
    """How many numbers a prior has; takes no memory for them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GPTPrior(config).parameters())
