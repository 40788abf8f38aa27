"""Configuration: frozen pydantic models, read from YAML recipes with `key.sub=value` overrides.

The same models validate the `config.json` beside weights. Unknown keys are errors that suggest the nearest name.
"""

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from tessera.errors import InputError, nearest
from tessera.files import parse_yaml, read_json, read_yaml
from tessera.paths import expand, is_file
from tessera.weights.writing import UNFINISHED


class Config(BaseModel):
    """Base of every configuration: immutable, and no key is accepted that is not declared. `~` in paths is expanded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*")
    @classmethod
    def _expand_paths(cls, value: Any) -> Any:
        return expand(value) if isinstance(value, Path) else value


class Origin(Config):
    """Where converted weights come from."""

    family: str  # that `tessera convert` was told
    project: str  # that published them
    files: tuple[str, ...]  # their names
    code_licence: str
    weights_licence: str
    weights: Literal["model", "ema"] | None = None  # which were taken of a file that has both


C = TypeVar("C", bound=BaseModel)


def read_recipe(kind: type[C], path: str | Path, overrides: list[str] | None = None) -> C:
    """The YAML file at `path` as a `kind`, after the `key.sub=value` overrides.

    Raises InputError: no such file, not YAML, an unknown key (with the nearest name), a value out of range.
    """
    path = expand(path)
    if not is_file(path):
        raise InputError(f"{path} is not a file; give the path of a YAML recipe")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold keys and values, got {type(values).__name__}")
    for override in overrides or []:
        _override(values, override)
    return validate(kind, values, where=str(path))


def read_config(kind: type[C], folder: str | Path) -> C:
    """`folder/config.json` as a `kind`. Raises InputError when it is missing, broken or has unknown keys."""
    path = Path(folder) / "config.json"
    if not is_file(path):
        raise InputError(f"{folder} has no config.json; give a folder written by save_pretrained")
    return validate(kind, read_json(path), where=str(path))


def validate(kind: type[C], values: Any, where: str) -> C:
    """`values` as a `kind`; the first thing wrong with them becomes one sentence that starts with `where`."""
    if isinstance(values, dict) and values.keys() == {UNFINISHED}:
        raise InputError(f"{where}: {values[UNFINISHED]}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            wrong = str(first["loc"][-1])
            raise InputError(f"{where}: unknown key '{key}'{nearest(wrong, _field_names(kind))}") from None
        if first["type"] == "missing":
            raise InputError(f"{where}: the key '{key}' is missing; add it") from None
        value = repr(first.get("input"))
        value = value if len(value) <= 60 else value[:57] + "..."
        raise InputError(f"{where}: {key or 'the content'}: {first['msg']}, got {value}") from None


def _override(values: dict[str, Any], override: str) -> None:
    """Sets `key.sub=value` inside `values`; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"the override '{override}' must look like key.sub=value")
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise InputError(f"the override '{override}' goes below '{parent}', which is a plain value")
        values = inner
    values[last] = parse_yaml(text, f"the value of the override '{override}'")


def _field_names(kind: type[BaseModel]) -> list[str]:
    """Every field name that occurs in `kind` or in a model inside it."""
    schema = kind.model_json_schema()
    models = [schema, *schema.get("$defs", {}).values()]
    return sorted({name for model in models for name in model.get("properties", {})})
