"""Pictures of all kinds as PIL reads them, damaged ones, and the mark of those that Tessera wrote."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tessera.errors import InputError, InputWarning
from tessera.images import open_image, read_map, read_origin, save_png, written_by_tessera
from tessera.weights.writing import new_file

GRADIENT = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)


def test_what_tessera_wrote_is_told_by_its_first_bytes(tmp_path: Path) -> None:
    picture = Image.new("RGB", (4, 4), "red")
    picture.info["icc_profile"] = b"a profile would stand first"
    save_png(picture, tmp_path / "drawn.png", {"prompt": "a red heart"})
    save_png(picture, tmp_path / "sheet.png")
    assert written_by_tessera(tmp_path / "drawn.png") and written_by_tessera(str(tmp_path / "sheet.png"))
    assert open_image(tmp_path / "sheet.png").tobytes() == Image.new("RGB", (4, 4), "red").tobytes()
    with pytest.raises(InputError, match="does not carry its origin"):
        read_origin(tmp_path / "sheet.png")

    picture.save(tmp_path / "photo.png")
    picture.save(tmp_path / "photo.jpg")
    titled = PngImagePlugin.PngInfo()
    titled.add_itxt("Title", "tessera")
    picture.save(tmp_path / "titled.png", pnginfo=titled, icc_profile=None)
    (tmp_path / "short.png").write_bytes((tmp_path / "drawn.png").read_bytes()[:45])
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("photo.png", "photo.jpg", "titled.png", "short.png", "empty.png"):
        assert not written_by_tessera(tmp_path / name), name


def test_nothing_that_stops_writing_leaves_a_part(tmp_path: Path) -> None:
    for stop in (KeyboardInterrupt, SystemExit, OSError):
        with pytest.raises(stop), new_file(tmp_path / "a.png") as part:
            part.write_bytes(b"half")
            raise stop
    assert list(tmp_path.iterdir()) == []


def test_float_pictures_are_scaled_and_those_with_nan_are_refused(tmp_path: Path) -> None:
    Image.fromarray(GRADIENT).save(tmp_path / "float.tif")
    assert open_image(tmp_path / "float.tif").getextrema() == ((0, 255),) * 3
    for value in (np.nan, np.inf, -np.inf):
        broken = GRADIENT.copy()
        broken[0, 0] = value
        Image.fromarray(broken).save(tmp_path / "broken.tif")
        with pytest.raises(InputError, match=r"broken.tif has pixels that are not numbers or infinite; save it"):
            open_image(tmp_path / "broken.tif")


def test_pictures_of_every_mode_keep_their_values(tmp_path: Path) -> None:
    gray = (GRADIENT * 255).round().astype(np.uint8)
    expected = np.repeat(gray[..., None], 3, axis=2)

    def read(name: str) -> np.ndarray:
        return np.asarray(open_image(tmp_path / name)).astype(int)

    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    deep.save(tmp_path / "deep.png")
    Image.fromarray(gray.astype(np.int32) * 257).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.tif"):
        assert np.array_equal(read(name), expected), name

    Image.fromarray(expected).convert("CMYK").save(tmp_path / "print.tif")
    assert np.abs(read("print.tif") - expected).max() <= 1

    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png", transparency=bytes([255, 0]))
    palette.save(tmp_path / "palette.gif", transparency=1)
    for name in ("palette.png", "palette.gif"):
        assert read(name).tolist() == [[[255, 0, 0], [255, 255, 255]]], name

    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read("moving.gif")[0, 0].tolist() == [255, 0, 0]

    turned = Image.fromarray(expected)
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    assert np.array_equal(read("turned.png"), np.rot90(expected, -1))


def test_a_huge_picture_of_one_bit_is_read_without_a_warning(tmp_path: Path) -> None:
    Image.new("1", (10000, 10000), 1).save(tmp_path / "large.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(tmp_path / "large.png").getpixel((9999, 9999)) == (255, 255, 255)
    Image.new("1", (20000, 20000), 1).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match=r"bomb.png is not a readable picture \(Image size \(400000000 pixels\)"):
        open_image(tmp_path / "bomb.png")


def test_what_pil_warns_of_names_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "odd.png")
    usual = Image.open

    def warning_open(path: str | Path) -> Image.Image:
        warnings.warn("Corrupt EXIF data. Expecting to read 2 bytes but only got 0.", stacklevel=1)
        return usual(path)

    monkeypatch.setattr(Image, "open", warning_open)
    with pytest.warns(InputWarning, match=r"odd.png: Corrupt EXIF data") as caught:
        open_image(tmp_path / "odd.png")
    assert len(caught) == 1


@pytest.mark.parametrize("error", [ValueError("bad"), IndexError("i"), MemoryError(), AssertionError()])
def test_whatever_a_decoder_raises_names_the_picture(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken_open(path: str | Path) -> Image.Image:
        raise error

    monkeypatch.setattr(Image, "open", broken_open)
    for read in (open_image, read_origin, lambda path: read_map(path, 8, channels=2)):
        with pytest.raises(InputError, match=r"odd.png is not a readable picture \(\w+"):
            read(tmp_path / "odd.png")


def test_a_folder_and_nothing_are_no_pictures(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read .*: Is a directory"):
        open_image(tmp_path)
    with pytest.raises(InputError, match="none.png does not exist"):
        read_origin(tmp_path / "none.png")
