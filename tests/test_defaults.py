"""What a recipe or a call means that leaves something out: defaults and bounds are recorded, a change is deliberate.

Figures in docs/ and saved recipes stand on them. After a deliberate change:
`python -m tests.test_defaults` writes tests/golden/defaults.json again.
"""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "tests" / "golden" / "defaults.json"
SOURCES = (
    "tessera/training/*.py",
    "tessera/metrics.py",
    "tessera/text/bpe_dropout.py",
    "tessera/clip/*.py",
    "stage1_tokenizer/**/*.py",
    "stage2_prior/**/*.py",
    "rerank/*.py",
)


def modules() -> list[str]:
    paths = sorted(path.relative_to(ROOT).with_suffix("") for pattern in SOURCES for path in ROOT.glob(pattern))
    return [".".join(path.parts).removesuffix(".__init__") for path in paths]


def defaults(module: str) -> dict[str, Any]:
    """By name: the fields of a config with default and bounds, the parameters of all else that have a default."""
    content = importlib.import_module(module)
    found = {}
    for name, thing in vars(content).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module or not callable(thing):
            continue
        if inspect.isclass(thing) and issubclass(thing, BaseModel):
            found[name] = {
                key: [_plain(field.get_default()), *sorted(str(bound) for bound in field.metadata if _bounds(bound))]
                for key, field in thing.model_fields.items()
                if not field.is_required() or any(map(_bounds, field.metadata))
            }
            continue
        callables = {name: thing}
        if inspect.isclass(thing):
            methods = {key: method for key, method in vars(thing).items() if inspect.isfunction(method)}
            callables = {
                f"{name}.{key}": method
                for key, method in methods.items()
                if key in ("__init__", "__call__") or not key.startswith("_")
            }
        for path, function in callables.items():
            try:
                parameters = inspect.signature(function).parameters.values()
            except ValueError:
                continue
            given = {p.name: _plain(p.default) for p in parameters if p.default is not inspect.Parameter.empty}
            if given:
                found[path] = given
    return {name: values for name, values in found.items() if values}


def _bounds(metadata: Any) -> bool:
    return type(metadata).__module__ == "annotated_types"


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return f"{type(value).__name__}({value.model_dump_json()})"
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__qualname__
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


@pytest.mark.parametrize("module, recorded", json.loads(RECORD.read_text()).items() if RECORD.is_file() else [])
def test_what_is_left_out_means_what_it_meant(module: str, recorded: dict[str, Any]) -> None:
    now = json.loads(json.dumps(defaults(module)))
    for name, values in recorded.items():
        for key, value in values.items():
            assert now.get(name, {}).get(key, "missing") == value, f"{module}: {key} of {name}"


if __name__ == "__main__":
    record = {module: values for module in modules() if (values := defaults(module))}
    parts = [
        f" {json.dumps(module)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(values.items()))
        + "\n }"
        for module, values in record.items()
    ]
    RECORD.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
