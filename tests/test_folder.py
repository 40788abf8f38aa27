"""Data folders as people have them: line ends, encodings, splits in subfolders, links, hidden files, our own output."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tessera.data.check import check
from tessera.data.folder import read_folder, read_items
from tessera.data.source import ImageFolder, Unreadable
from tessera.errors import InputError
from tessera.files import parse_json, parse_yaml, read_json_lines, read_lines, split_lines
from tessera.images import save_png

ROW = {"file_name": "0.png", "text": "a red heart"}
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"  # that str.splitlines takes for line ends


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (len(path.name) * 9, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    picture(tmp_path / "0.png")
    picture(tmp_path / "1.png")
    return tmp_path


# Text -----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]))))
def test_lines_end_at_line_ends_only(lines: list[str]) -> None:
    for end in ("\n", "\r\n", "\r"):
        assert split_lines("".join(line + end for line in lines)) == lines


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_layout_reads_text_as_all_programs_write_it(folder: Path, encoding: str, end: str) -> None:
    caption = f"ein Herz {SEPARATORS[:3]} 红心 🙂"
    (folder / "0.txt").write_bytes((caption + end + "second" + end).encode(encoding))
    assert read_items(folder)[0].captions == (caption, "second")
    table = f'file_name,text{end}0.png,"{caption}"{end}'
    (folder / "metadata.csv").write_bytes(table.encode(encoding))
    assert read_items(folder)[0].captions == (caption,)
    lines = json.dumps(ROW | {"text": caption}, ensure_ascii=False) + end
    (folder / "metadata.jsonl").write_bytes((2 * lines).encode(encoding))
    assert [item.captions for item in read_items(folder)] == [(caption,)] * 2


def test_text_that_is_none_is_named_with_its_line(folder: Path) -> None:
    path = folder / "metadata.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + '{"file_name": "1.png", "text": "Häuser"}\n'.encode("latin-1"))
    with pytest.raises(InputError, match=r"metadata.jsonl, line 2: not UTF-8 text; save it as UTF-8"):
        read_items(folder)
    path.write_bytes((json.dumps(ROW) + "\n").encode("utf-16-le"))
    with pytest.raises(InputError, match="zero bytes, so it is binary or UTF-16 without a mark"):
        read_items(folder)


def test_half_a_character_is_named_with_its_line(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps(ROW) + "\n" + r'{"file_name": "1.png", "text": "cat \ud83d"}')
    with pytest.raises(InputError, match=r"metadata.jsonl, line 2: half a character \(U\+D83D\)"):
        read_items(folder)
    whole = r'{"file_name": "0.png", "text": "cat \ud83d\ude42"}'
    (folder / "metadata.jsonl").write_text(whole)
    assert read_items(folder)[0].captions == ("cat 🙂",)


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000, "{", "", "nul", '{"a": 1}}'])
def test_what_is_no_json_is_one_sentence(text: str) -> None:
    with pytest.raises(InputError, match="^here is not valid JSON .*; mend it$"):
        parse_json(text, "here", "mend it")


def test_a_few_bytes_of_yaml_cannot_ask_for_gigabytes() -> None:
    lines = ["a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    with pytest.raises(InputError, match="its aliases stand for more than 1,000,000 values"):
        parse_yaml("\n".join(lines), "here")
    for text in ("a: &a [*a]", "[" * 5000, "a: 2026-13-45", "? {a: 1}\n: 2", "a: [", "\ta: 1"):
        with pytest.raises(InputError, match="^here is not valid YAML"):
            parse_yaml(text, "here")
    assert parse_yaml("a: &a [1]\nb: *a", "here") == {"a": [1], "b": [1]}


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("1\n\n  \n2")
    assert [(where[-6:], value) for where, value in read_json_lines(tmp_path / "x.jsonl")] == [
        ("line 1", 1),
        ("line 4", 2),
    ]
    assert read_lines(tmp_path / "x.jsonl") == ["1", "", "  ", "2"]


# Metadata -------------------------------------------------------------------------------------------------------------


def test_captions_may_be_missing_and_long(folder: Path) -> None:
    rows = [ROW | {"text": None}, {"file_name": "1.png", "text": ["", None, "ok"]}, {"file_name": "1.png"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [item.captions for item in read_items(folder)] == [(), ("ok",), ()]
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text(f'file_name,text\n0.png,"{"x" * 200_000}"\n1.png,\n')
    assert [len(item.captions) for item in read_items(folder)] == [1, 0]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_of_other_countries(folder: Path, delimiter: str) -> None:
    (folder / "metadata.csv").write_text(f"file_name{delimiter}text\n0.png{delimiter}a heart\n")
    assert read_items(folder)[0].captions == ("a heart",)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"filename": "0.png"}, "'file_name' is missing, but 'filename'; rename it to 'file_name'"),
        ({"image": "0.png"}, "but 'image'; rename it to 'file_name'"),
        ({"text": "a"}, "metadata.jsonl, line 1: 'file_name' is missing$"),
    ],
)
def test_columns_of_another_name_are_recognised(folder: Path, row: dict[str, str], sentence: str) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match=sentence):
        read_items(folder)


def test_a_caption_column_of_another_name_is_recognised(folder: Path) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "caption": "ok"}))
    with pytest.raises(InputError, match="no captions; its metadata has no 'text', but 'caption'; rename it to 'text'"):
        ImageFolder(folder, 8, need_captions=True)
    assert len(ImageFolder(folder, 8)) == 1  # a tokenizer needs none


# Splits ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "eval"), ("train", "validation")])
@pytest.mark.parametrize("layout", ["metadata", "csv", "sidecar", "none"])
def test_splits_in_subfolders(tmp_path: Path, train: str, test: str, layout: str) -> None:
    for split, count in ((train, 3), (test, 2)):
        for i in range(count):
            picture(tmp_path / split / f"{i}.png")
            if layout == "sidecar":
                (tmp_path / split / f"{i}.txt").write_text(f"{split} {i}")
        rows = [{"file_name": f"{i}.png", "text": f"{split} {i}"} for i in range(count)]
        if layout == "metadata":
            (tmp_path / split / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        if layout == "csv":
            lines = [f"{row['file_name']},{row['text']}" for row in rows]
            (tmp_path / split / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    items = read_items(tmp_path, "train")
    assert [item.path.name for item in items] == ["0.png", "1.png", "2.png"]
    assert all(item.path.parent.name == train and item.path.is_file() for item in items)
    assert [item.captions for item in items] == [() if layout == "none" else (f"{train} {i}",) for i in range(3)]
    assert len(read_items(tmp_path, test)) == 2 and len(read_items(tmp_path)) == 5
    with pytest.raises(InputError, match="has no split 'tain', did you mean 'train'"):
        read_items(tmp_path, "tain")


def test_one_metadata_for_split_folders(tmp_path: Path) -> None:
    rows = [{"file_name": f"{split}/{i}.png", "text": "a"} for split in ("train", "val") for i in range(2)]
    for row in rows:
        picture(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [item.path.parent.name for item in read_items(tmp_path, "train")] == ["train"] * 2
    assert [item.path.parent.name for item in read_items(tmp_path, "val")] == ["val"] * 2


def test_a_folder_of_trains_is_no_split(tmp_path: Path) -> None:
    for name in ("train/0.png", "bus/1.png", "test/2.png"):
        picture(tmp_path / name)
    assert len(read_items(tmp_path, "train")) == 3


# Files ----------------------------------------------------------------------------------------------------------------


def test_hidden_files_of_systems_are_passed_over(folder: Path) -> None:
    hidden = ("._0.png", ".ipynb_checkpoints/0-checkpoint.png", "__MACOSX/0.png", "@eaDir/0.png", ".git/x.png")
    for name in hidden:
        picture(folder / name)
    assert [item.path.name for item in read_items(folder)] == ["0.png", "1.png"]


def test_links_are_followed(tmp_path: Path) -> None:
    picture(tmp_path / "store" / "deep" / "0.png")
    (tmp_path / "store" / "deep" / "0.txt").write_text("zero")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.png").symlink_to("../store/deep/0.png")
    (data / "more").symlink_to("../store")
    (data / "more" / "round").symlink_to("..")  # no end, were it followed
    (data / "nowhere.png").symlink_to("missing.png")
    found = [item.path.relative_to(data).as_posix() for item in read_items(data)]
    assert found == ["a.png", "more/deep/0.png"]
    (data / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "linked"}))
    assert ImageFolder(data, 8).image(0).shape == (3, 8, 8)
    (data / "metadata.jsonl").write_text(json.dumps({"file_name": "../store/deep/0.png"}))
    with pytest.raises(InputError, match="leads out of the folder"):
        read_items(data)


def test_every_kind_of_picture_is_read_or_named(folder: Path) -> None:
    for suffix in ("tif", "TIFF", "jfif", "ppm", "bmp", "webp", "gif"):
        kind = {"jfif": "jpeg", "TIFF": "tiff", "tif": "tiff"}.get(suffix, suffix)
        Image.new("RGB", (8, 8), "red").save(folder / f"{suffix}.{suffix}", format=kind)
    for suffix in ("heic", "svg", "psd", "doc"):
        (folder / f"x.{suffix}").write_bytes(b"x")
    contents = read_folder(folder)
    assert len(contents.items) == 9
    assert len(contents.left_out) == 3 and all("is not read)" in sentence for sentence in contents.left_out)
    report = check(folder, images_only=True)
    assert report["left_out"] == 3 and report["pictures"] == 9 and report["broken"] == 0


def test_what_tessera_wrote_inside_is_never_data(folder: Path) -> None:
    own = ("out/a-red-heart-1-seed0.png", "runs/tok/samples/reconstructions-000006.png", "a.png")
    for name in own:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(Image.new("RGB", (8, 8)), folder / name, {"seed": 0})
    contents = read_folder(folder)
    assert [item.path.name for item in contents.items] == ["0.png", "1.png"]
    assert len(contents.left_out) == 3 and all("written by Tessera" in sentence for sentence in contents.left_out)
    (folder / "a.txt").write_text("a caption of my own")  # with a caption it is meant
    assert [item.path.name for item in read_items(folder)] == ["0.png", "1.png", "a.png"]
    for name in ("0.png", "1.png", "a.txt"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="has no pictures .*; 3 files: .*written by Tessera"):
        read_items(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(folder: Path) -> None:
    (folder / "locked").mkdir(mode=0)
    with pytest.raises(InputError, match="cannot read .*locked: Permission denied"):
        read_items(folder)


# Broken pictures ------------------------------------------------------------------------------------------------------


def test_each_broken_file_counts_once_and_one_of_thirty_never_stops() -> None:
    unreadable = Unreadable(30)
    assert unreadable.add(["7.png is broken"] * 3) == ["7.png is broken"]
    for _ in range(1000):
        assert unreadable.add(["7.png is broken"]) == []
    unreadable.add(["8.png", "9.png"])
    with pytest.raises(InputError, match="4 of 30 pictures could not be read, too many; the last: 10.png"):
        unreadable.add(["10.png"])
    large = Unreadable(1000)
    large.add([str(i) for i in range(50)])
    with pytest.raises(InputError, match="51 of 1000"):
        large.add(["one more"])
    with pytest.raises(InputError, match="none of 2 pictures can be read"):
        Unreadable(2).add(["a", "b"])
    assert Unreadable(0).add([]) == []


def test_a_batch_is_never_empty(folder: Path) -> None:
    for name in ("0.png", "2.png"):
        (folder / name).write_bytes(b"x")
    picture(folder / "3.png")
    data, random = ImageFolder(folder, 8), np.random.default_rng(0)
    batch = data.batch(np.array([0]), random)
    assert batch.images.shape == (1, 3, 8, 8) and len(batch.captions) == 1 and len(batch.skipped) == 1
    assert (batch.images[0] == data.image(1)).all()
    assert (data.batch(np.array([2]), random).images[0] == data.image(3)).all()
    mixed = data.batch(np.array([0, 3, 2, 1]), random)
    assert len(mixed.images) == 2 and len(mixed.skipped) == 2  # nothing takes a place where something is left
    for path in folder.glob("*.png"):
        path.write_bytes(b"x")
    with pytest.raises(InputError, match="none of its 4 pictures can be read"):
        data.batch(np.array([0]), random)
