"""The house keeps its order: imports flow from tessera down to pipelines and never up (DESIGN, section 1)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import tessera

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("tessera", "stage1_tokenizer", "stage2_prior", "rerank", "pipelines")
OUTSIDE = ("tests", "recipes", "benchmarks")  # not in the wheel, so nothing in the wheel may import them
FRONT_DOOR = ("tessera/__init__.py", "tessera/__main__.py")  # gives the public names of the stages, lazily
OPENS_TOKENIZER = ("train.py", "encode.py", "finetune.py", "convert/")  # what of stage 2 may see images


def imported(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in `source`, also inside functions; relative ones resolved in `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, module


def complaints(path: str, source: str) -> list[str]:
    """One sentence for each import of the file `path` (relative to the root) that goes the wrong way."""
    home, *inside = Path(path).parts
    found: list[str] = []
    if path in FRONT_DOOR:
        return found
    for line, name in imported(source, ".".join(Path(path).parts[:-1])):
        target = name.split(".")[0]
        if target in OUTSIDE:
            found.append(f"{path}:{line} imports {name}, but {target}/ is not part of the installed package.")
        elif target in ORDER and ORDER.index(target) > ORDER.index(home):
            found.append(f"{path}:{line} imports {name}, but {home} may not know {target}: imports flow down only.")
        elif home == "stage2_prior" and target == "stage1_tokenizer" and not _may_open_tokenizer("/".join(inside)):
            found.append(
                f"{path}:{line} imports {name}, but stage 2's model code knows codes, not images; "
                f"only {', '.join(OPENS_TOKENIZER)} open a tokenizer."
            )
    return found


def _may_open_tokenizer(inside: str) -> bool:
    return any(inside.startswith(name) if name.endswith("/") else inside == name for name in OPENS_TOKENIZER)


@pytest.mark.parametrize("home", ORDER)
def test_imports_flow_down(home: str) -> None:
    files = sorted((ROOT / home).rglob("*.py"))
    assert files, f"{home}/ holds no Python file."
    found = [
        sentence for path in files for sentence in complaints(str(path.relative_to(ROOT)), path.read_text("utf-8"))
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tessera/data/source.py", "import rerank"),
        ("tessera/data/source.py", "def f():\n    from stage1_tokenizer.train import train"),
        ("stage1_tokenizer/losses/lpips.py", "import torch, rerank.clip as clip"),
        ("stage1_tokenizer/train.py", "from pipelines import TextToImagePipeline"),
        ("stage2_prior/gpt.py", "from stage1_tokenizer import Autoencoder"),
        ("stage2_prior/sampling/train.py", "import stage1_tokenizer"),
        ("rerank/clip.py", "import pipelines.bundle"),
        ("pipelines/cli/train.py", "from tests.conftest import tiny_bundle"),
    ],
)
def test_an_upward_import_is_found(path: str, source: str) -> None:
    (sentence,) = complaints(path, source)
    assert sentence.startswith(path) and sentence.endswith(".")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tessera/data/source.py", "import torch\nfrom tessera.errors import InputError"),
        ("stage2_prior/encode.py", "from stage1_tokenizer import Autoencoder"),
        ("stage2_prior/convert/llamagen.py", "from stage1_tokenizer import Autoencoder"),
        ("rerank/similarity.py", "from stage1_tokenizer import Autoencoder\nfrom stage2_prior import load_prior"),
        ("stage1_tokenizer/bottlenecks/vq.py", "from .base import Bottleneck\nfrom ..losses import gan"),
        ("pipelines/cli/train.py", "import rerank.train, tessera.data.source"),
    ],
)
def test_a_downward_import_is_fine(path: str, source: str) -> None:
    assert complaints(path, source) == []


def test_the_public_names_are_these_and_come_lazily() -> None:
    """`import tessera` gives them without importing torch; each is there when it is asked for."""
    public = [
        "Autoencoder", "ClipReranker", "InputError", "InputWarning", "Sampling", "TextToImagePipeline",
        "TextTokenizer", "load_prior", "sample",
    ]  # fmt: skip
    assert sorted(tessera.__all__) == public
    code = (
        "import sys, tessera; assert 'torch' not in sys.modules and 'pydantic' not in sys.modules; "
        "assert set(tessera.__all__) <= set(dir(tessera)); [getattr(tessera, name) for name in tessera.__all__]; "
        "import stage2_prior; assert tessera.sample is stage2_prior.sample"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'tessera' has no attribute 'smaple'"):
        tessera.smaple  # noqa: B018


def test_relative_imports_are_resolved() -> None:
    source = "from . import a\nfrom .b import c\nfrom .. import d\nfrom ..e import f"
    assert [name for _, name in imported(source, "x.y")] == ["x.y", "x.y.b", "x", "x.e"]


def test_drawing_and_ranking_need_no_extra() -> None:
    """The wheel with its plain dependencies runs `tessera generate`: what only the extras bring is not imported."""
    blocked = "import sys; from pipelines.cli import EXTRAS; sys.modules.update(dict.fromkeys(EXTRAS)); "
    wanted = "import open_clip, pipelines.output, pipelines.rank, pipelines.info, tessera.data.check"
    done = subprocess.run([sys.executable, "-c", blocked + wanted], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    tuple(int(part) for part in version("torch").split(".")[:2]) < (2, 14),
    reason="older releases of torch, typer and huggingface_hub import sympy and rich themselves",
)
def test_drawing_with_the_shipped_bundle_imports_nothing_heavy(tmp_path: Path) -> None:
    """Seconds of a cold start would go to these, all of which are installed and none of which draws."""
    code = (
        "import sys; from pipelines.cli import main; "
        f"assert main(['generate', 'a dog', '-n', '1', '--candidates', '2', '-o', {str(tmp_path)!r}]) == 0; "
        "heavy = {'open_clip', 'torchvision', 'timm', 'transformers', 'accelerate', 'peft', 'ftfy', 'sympy', "
        "'torch._dynamo', 'torch._inductor', 'tensorboard', 'rich', 'scipy', 'sklearn', 'pandas', 'matplotlib'}; "
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"tessera generate imports {done.stderr}"
    assert ".png" in done.stdout and "0." in done.stdout  # it was scored
