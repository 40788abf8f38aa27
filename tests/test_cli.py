"""The command line: exit codes, one sentence for everything that is wrong, results apart from logs, quick help."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from common.errors import InputError
from pipelines import cli

ROOT = Path(__file__).resolve().parent.parent
Refused = Callable[..., str]
Ran = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused: exit code 2, nothing on stdout, one sentence on stderr, which is returned."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert (code, out) == (2, ""), error
        (line,) = error.splitlines()
        assert line.startswith("tessera: error: ")
        return line.removeprefix("tessera: error: ")

    return run


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str]) -> Ran:
    """Runs a command that must succeed and returns its standard output."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert code == 0, error
        return out

    return run


def picture(path: Path, colour: str = "red", size: int = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)
    return path


# The program ----------------------------------------------------------------------------------------------------------


def test_help_answers_at_once_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pipelines.cli import main; assert main(['--help']) == 0; "
        "heavy = {'torch', 'numpy', 'PIL', 'open_clip', 'transformers', 'accelerate', 'pydantic', 'yaml'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):  # the quickest of three, for the machine may be busy
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, f"tessera --help imports {done.stderr}"
    assert "generate" in done.stdout and "train" in done.stdout
    assert min(seconds) < 1


def test_no_command_shows_the_help(ran: Ran) -> None:
    assert ran() == ran("--help")


def test_every_command_explains_itself(ran: Ran) -> None:
    commands = ["generate", "rerank", "train", "encode", "bundle", "info"]
    for command in [*([name] for name in commands), ["evaluate", "tokenizer"], ["evaluate", "pipeline"], ["data", "check"]]:
        assert "--help" in ran(*command, "--help")


def test_a_process_ends_with_the_exit_code() -> None:
    command = [sys.executable, "-m", "pipelines", "info", "no/such/folder"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tessera: error: 'no/such/folder' is neither")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["drew"], "No such command 'drew'"),
        (["evaluate"], "Missing command; see 'tessera evaluate --help'"),
        (["train"], "Missing argument"),
        (["train", "priors", "x.yaml"], "'priors' is not one of 'tokenizer', 'prior', 'reranker', 'text-tokenizer'"),
        (["info", "--colour", "x"], "No such option"),
        (["generate", "x", "-n", "many"], "'-n'.*many"),
    ],
)
def test_wrong_usage_is_one_sentence(refused: Refused, arguments: list[str], sentence: str) -> None:
    assert re.search(sentence, refused(*arguments))


def test_other_failures_are_one_line_that_says_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def break_down(*_: object) -> None:
        raise RuntimeError("the roof\nis leaking")

    monkeypatch.setattr("pipelines.check.check", break_down)
    assert cli.main(["data", "check", str(tmp_path)]) == 1
    line = "tessera: failed: RuntimeError: the roof is leaking (TESSERA_DEBUG=1 shows the traceback)\n"
    assert capsys.readouterr() == ("", line)

    monkeypatch.setenv("TESSERA_DEBUG", "1")
    assert cli.main(["data", "check", str(tmp_path)]) == 1
    assert "in break_down" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (KeyboardInterrupt(), 130, ""),
        (InputError("so\n  not"), 2, "tessera: error: so not\n"),
        (
            ModuleNotFoundError("no", name="tensorboard"),
            1,
            "tessera: failed: this needs the package tensorboard; pip install 'tessera[track]'\n",
        ),
    ],
)
def test_what_a_command_raises_decides_the_exit_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    line: str,
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("pipelines.info.describe", fail)
    assert cli.main(["info", "."]) == code
    assert capsys.readouterr() == ("", line)


# tessera data check ---------------------------------------------------------------------------------------------------


def test_a_data_folder_is_counted(ran: Ran, tmp_path: Path) -> None:
    for name, colour in {"a": "red", "b": "blue", "c": "red"}.items():
        picture(tmp_path / f"{name}.png", colour)
        (tmp_path / f"{name}.txt").write_text(f"a {colour} square\n红色\n", "utf-8")
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    report = json.loads(ran("data", "check", tmp_path, "--json"))
    assert (report["pictures"], report["broken"], report["duplicates"]) == (3, 1, 1)
    assert (report["with_captions"], report["captions"], report["different_captions"]) == (3, 6, 3)
    assert "broken.png is not a readable picture" in report["broken_files"][0]
    assert "c.png equals" in report["duplicate_files"][0]
    table = ran("data", "check", tmp_path)
    assert "pictures" in table and "broken.png" in table


def test_a_data_folder_without_use_is_refused(refused: Refused, ran: Ran, tmp_path: Path) -> None:
    assert "is not a folder" in refused("data", "check", tmp_path / "nowhere")
    assert "has no pictures" in refused("data", "check", tmp_path)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    assert "none of its 1 pictures can be read" in refused("data", "check", tmp_path, "--images-only")
    picture(tmp_path / "a.png")
    assert "has pictures but no captions" in refused("data", "check", tmp_path)
    assert "captions" in ran("data", "check", tmp_path, "--images-only")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b'{"file_name": "a.png", "text": "a"}\n{"file_name": ', "line 2: not valid JSON"),
        (b'{"text": "a"}', "'file_name' is missing"),
        (b'{"file_name": "../../a.png", "text": "a"}', "leads out of the folder"),
        (b'{"file_name": "a.png", "text": 7}', "'text' must be a caption or a list of captions"),
        (b'{"file_name": "a.png", "text": "a", "weight": -1}', "'weight' must be a number above 0, got -1"),
        (b'{"file_name": "gone.png", "text": "a"}', "gone.png does not exist"),
        (b'{"file_name": "a.png", "text": "\xff\xfe"}', "UTF-8"),
        (b"", "has no pictures"),
    ],
)
def test_broken_metadata_is_one_sentence(refused: Refused, tmp_path: Path, content: bytes, sentence: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(content)
    assert sentence in refused("data", "check", tmp_path)


def test_an_unknown_split_suggests_the_nearest(refused: Refused, tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a", "split": "train"}', "utf-8")
    assert "has no split 'trian', did you mean 'train'?" in refused("data", "check", tmp_path, "--split", "trian")
