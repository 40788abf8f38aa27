"""The one reader of text, JSON, JSON lines and YAML, as all kinds of programs write them.

UTF-8 with or without its mark, and UTF-16 or UTF-32 with theirs. A line ends at \\n, \\r\\n or \\r and nowhere
else: the other characters that `str.splitlines` splits at (U+2028, U+2029, U+0085, ...) occur inside captions. What
cannot be read is an InputError that names the file and, where there is one, the line.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tessera.errors import InputError

LINE_END = re.compile(r"\r\n|\n|\r")
MARKS = (  # the longer first: the mark of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
MOST_NODES = 1_000_000  # of a YAML document with its aliases written out: a few bytes could ask for gigabytes


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises InputError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def read_text(path: Path) -> str:
    """The text of a file, line ends as they are. Raises InputError when it cannot be read or is not Unicode text."""
    data = read_bytes(path)
    encoding = next((encoding for mark, encoding in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = len(LINE_END.split(data[: error.start].decode("latin-1")))
        raise InputError(
            f"{path}, line {line}: not {encoding.removesuffix('-sig').upper()} text; save it as UTF-8"
        ) from None
    if "\0" in text:
        raise InputError(
            f"{path} holds zero bytes, so it is binary or UTF-16 without a mark; save it as UTF-8"
        ) from None
    return text


def split_lines(text: str) -> list[str]:
    """The lines of a text without their ends; the piece behind the last end is left out when it is empty."""
    lines = LINE_END.split(text)
    return lines if lines[-1] else lines[:-1]


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without their ends. Raises InputError as `read_text`."""
    return split_lines(read_text(path))


def read_json(path: Path, remedy: str = "restore the file") -> Any:
    """The content of a JSON file. Raises InputError, which ends with the remedy, when there is no such content."""
    return parse_json(read_text(path), str(path), remedy)


def read_json_object(path: Path, remedy: str = "restore the file") -> dict[str, Any]:
    """`read_json`, which must be an object."""
    content = read_json(path, remedy)
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(content).__name__}; {remedy}")
    return content


def read_json_lines(path: Path, remedy: str = "mend or remove the line") -> Iterator[tuple[str, Any]]:
    """(where, content) of each line that is not blank; `where` names file and line. Raises InputError."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line, where, remedy)


def parse_json(text: str, where: str, remedy: str) -> Any:
    """JSON text as Python objects. Raises InputError, which starts with `where`."""
    try:
        content = json.loads(text)
    except RecursionError:
        raise InputError(f"{where} is not valid JSON (nested too deeply); {remedy}") from None
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{where} is not valid JSON ({reason}); {remedy}") from None
    if "\\ud" in text.lower():
        _refuse_half_characters(content, where, remedy)
    return content


def read_yaml(path: Path) -> Any:
    """The content of a YAML (or JSON) file. Raises InputError when there is no such content."""
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """YAML text as Python objects. Raises InputError, which starts with `where`."""
    try:
        content = yaml.safe_load(text)
        nodes = _nodes(content, {})
    except RecursionError:
        raise InputError(f"{where} is not valid YAML (nested too deeply, or inside itself)") from None
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:  # the last three of dates, numbers and keys
        reason = " ".join(str(error).replace('in "<unicode string>", ', "at ").split())
        raise InputError(f"{where} is not valid YAML: {reason[:300]}") from None
    if nodes > MOST_NODES:
        raise InputError(f"{where}: its aliases stand for more than {MOST_NODES:,} values; write them out")
    if "\\ud" in text.lower():
        _refuse_half_characters(content, where, "mend it")
    return content


def _nodes(content: Any, counted: dict[int, int]) -> int:
    """How many values there are when every alias is written out."""
    if not isinstance(content, dict | list):
        return 1
    if id(content) not in counted:
        inner = content.values() if isinstance(content, dict) else content
        counted[id(content)] = 1 + sum(_nodes(value, counted) for value in inner)
    return counted[id(content)]


def _refuse_half_characters(content: Any, where: str, remedy: str) -> None:
    """JavaScript and databases cut texts between the two halves of an emoji; such a text cannot be written anywhere."""
    try:
        json.dumps(content, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise InputError(
            f"{where}: half a character (U+{ord(half):04X}), cut off from its other half; {remedy}"
        ) from None
