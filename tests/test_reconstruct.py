import numpy as np
import pytest
import torch
from PIL import Image

from pipelines import cli
from stage1_tokenizer import Autoencoder
from stage1_tokenizer.reconstruct import MOST_PIXELS, through
from tessera.errors import InputError
from tessera.images import open_image, to_tensor


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    sizes = {"even": (16, 24, 3), "odd": (5, 9, 3), "dot": (1, 1, 3), "glass": (8, 8, 4), "wide": (4, 20_000, 3)}
    for name, shape in sizes.items():
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return [tmp_path / f"{name}.png" for name in sizes]


def test_every_size_comes_back_beside_itself(tiny_parts, pictures, tmp_path, capsys):
    model = tiny_parts / "image_tokenizer"
    out = tmp_path / "out"
    assert cli.main(["reconstruct", *map(str, pictures), "--model", str(model), "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    tokenizer = Autoencoder.from_pretrained(model)
    for number, path in enumerate(pictures):
        original = open_image(path)
        both = Image.open(out / f"{number:04d}-{path.stem}.png")
        assert both.size == (2 * original.width, original.height)
        assert both.crop((0, 0, *original.size)).tobytes() == original.tobytes()
        assert f"{original.width}x{original.height}" in printed
    even = to_tensor(open_image(pictures[0])).unsqueeze(0)
    assert torch.equal(through(tokenizer, even), tokenizer.decode(tokenizer.encode(even)))


def test_too_large_a_picture_is_refused_before_anything_is_written(tiny_parts, pictures, tmp_path, capsys):
    side = int(MOST_PIXELS**0.5) + 1
    Image.new("RGB", (side, side)).save(tmp_path / "large.png")
    images = [str(pictures[0]), str(tmp_path / "large.png")]
    model = ["--model", str(tiny_parts / "image_tokenizer"), "-o", str(tmp_path / "out")]
    assert cli.main(["reconstruct", *images, *model]) == 2
    assert f"large.png has {side} x {side} pixels" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli.main(["reconstruct", *images, *model, "--size", "16"]) == 0


def test_too_large_a_picture_comes_back_in_parts(tiny_parts, pictures, tmp_path, monkeypatch):
    model = ["--model", str(tiny_parts / "image_tokenizer")]
    images = [str(path) for path in pictures[:4]]  # sizes that neither the factor nor the tile divides
    assert cli.main(["reconstruct", *images, *model, "-o", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr("stage1_tokenizer.reconstruct.MOST_PIXELS", 100)
    assert cli.main(["reconstruct", *images, *model, "-o", str(tmp_path / "none")]) == 2
    assert cli.main(["reconstruct", *images, *model, "-o", str(tmp_path / "parts"), "--tile", "6"]) == 0
    for path in sorted((tmp_path / "whole").iterdir()):
        whole, parts = (np.asarray(Image.open(p), dtype=int) for p in (path, tmp_path / "parts" / path.name))
        assert (np.abs(whole - parts) <= 1).mean() > 0.99  # but for codes that are as near within rounding


def test_pictures_of_16_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    gray = np.asarray(open_image(tmp_path / "deep.png"))[..., 0].astype(int)
    assert np.abs(gray - ramp / 257).max() <= 0.5


def test_a_turned_picture_is_turned_back(tmp_path):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture.save(tmp_path / "turned.png", exif=exif)
    assert open_image(tmp_path / "turned.png").tobytes() == picture.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_a_broken_picture_is_named(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"broken.png is not a readable picture"):
        open_image(tmp_path / "broken.png")
