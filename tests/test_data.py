import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stage2_prior.codes import Codes, CodesSteps
from tessera.data.folder import Item, read_items
from tessera.data.order import Order
from tessera.data.source import ImageFolder, Steps
from tessera.errors import InputError
from tessera.images import open_image, read_origin, save_png, to_pil, to_tensor
from tessera.metrics import perplexity, psnr


@pytest.fixture
def folder(tmp_path):
    rows = []
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append(
            {"file_name": f"{i}.png", "text": [f"picture {i}", f"图 {i}"], "split": "train" if i < 4 else "test"}
        )
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def test_imagefolder_gives_pictures_captions_and_splits(folder):
    data = ImageFolder(folder, size=8, split="train", need_captions=True)
    assert len(data) == 4 and data.items[1].captions == ("picture 1", "图 1")
    torch.testing.assert_close(data.read(2)[0], torch.full((8, 8), 80 / 127.5 - 1))
    with pytest.raises(InputError, match="no split 'tset', did you mean 'test'"):
        ImageFolder(folder, 8, "tset")


def test_csv_and_sidecar_layouts(folder, tmp_path):
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file_name,text\n0.png,zero\n1.png,one\n")
    assert [item.captions for item in read_items(folder)] == [("zero",), ("one",)]
    (folder / "metadata.csv").unlink()
    (folder / "3.txt").write_text("three\ndrei\n")
    items = read_items(folder)
    assert len(items) == 6 and items[3].captions == ("three", "drei")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 7 is not valid JSON"),
        ('{"text": "no file"}', "line 7: 'file_name' is missing"),
        ('{"file_name": "../../etc/x.png"}', "leads out of the folder"),
        ('{"file_name": "0.png", "text": 3}', "'text' must be a caption or a list of captions"),
        ('{"file_name": "0.png", "weight": -1}', "'weight' must be a number above 0"),
    ],
)
def test_wrong_metadata_is_named_by_line(folder, line, message):
    with (folder / "metadata.jsonl").open("a") as file:
        file.write("\n" + line)
    with pytest.raises(InputError, match=message):
        read_items(folder)


def test_folders_without_pictures_or_captions(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        read_items(tmp_path / "nothing")
    with pytest.raises(InputError, match="has no pictures"):
        read_items(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="no captions"):
        ImageFolder(tmp_path, 8, need_captions=True)


def test_broken_pictures_are_skipped_and_named_never_replaced(folder):
    (folder / "1.png").write_bytes(b"not a picture")
    batch = ImageFolder(folder, 8).batch(np.arange(4), np.random.default_rng(0))
    assert batch.images.shape == (3, 3, 8, 8) and len(batch.captions) == 3
    assert len(batch.skipped) == 1 and "1.png" in batch.skipped[0]
    assert [caption[-1] for caption in batch.captions] == ["0", "2", "3"]


def test_every_epoch_sees_each_item_once_and_weights_repeat_items():
    order = Order([1.0] * 10, batch_size=4, seed=3)
    seen = np.concatenate([order.batch(step) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and list(seen[:10]) != list(seen[10:])
    weighted = Order([3.0, 1.0, 1.0, 1.0, 1.0, 1.0], batch_size=8, seed=0)
    counts = np.bincount(np.concatenate([weighted.batch(step) for step in range(60)]), minlength=6)
    np.testing.assert_allclose(counts / counts.sum(), np.array([3, 1, 1, 1, 1, 1]) / 8, atol=0.02)


def test_order_is_a_function_of_seed_and_step_alone():
    first, second = Order([1.0] * 7, 3, seed=5), Order([1.0] * 7, 3, seed=5)
    expected = [first.batch(step) for step in range(9)]
    for step in reversed(range(9)):
        np.testing.assert_array_equal(second.batch(step), expected[step])
    assert any((Order([1.0] * 7, 3, seed=6).batch(step) != expected[step]).any() for step in range(9))


def test_processes_share_the_global_batch(folder):
    data = ImageFolder(folder, 8)
    whole = Steps(data, 4, seed=1)[2].images
    parts = [Steps(data, 4, seed=1, rank=rank, world=2)[2].images for rank in range(2)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), whole)


@pytest.mark.parametrize("kind", ["pictures", "codes"])
def test_processes_draw_their_captions_apart(kind):
    """Each process draws which of a picture's captions it reads: anew each step, by another number than its neighbour,
    the same again in another run."""
    choices = tuple(str(number) for number in range(1000))
    if kind == "pictures":
        folder = ImageFolder.__new__(ImageFolder)
        folder.items = [Item(Path(str(i)), choices, 1.0, "") for i in range(8)]
        folder.size, folder.read = 8, lambda index: torch.zeros(3, 8, 8)
        make = Steps
    else:
        folder = Codes.__new__(Codes)
        folder.captions, folder.weights, folder.labels = [choices] * 8, [1.0] * 8, []
        folder.read, folder.read_maps = lambda rows: torch.zeros(len(rows), 4), lambda rows: None
        make = CodesSteps
    drawn = {
        (seed, step, rank): make(folder, 8, seed, rank=rank, world=2)[step].captions
        for seed in (0, 1)
        for step in (0, 1)
        for rank in (0, 1)
    }
    assert len({tuple(captions) for captions in drawn.values()}) == 8
    for (seed, step, rank), captions in drawn.items():
        assert make(folder, 8, seed, rank=rank, world=2)[step].captions == captions
        assert len(set(captions)) > 1  # one draw for each picture
    assert {0, 1} == {int(captions[0]) // 500 for captions in drawn.values()}  # from the first to the last


def test_png_carries_its_origin(tmp_path):
    image = to_pil(torch.rand(1, 3, 8, 8) * 2 - 1)[0]
    save_png(image, tmp_path / "a.png", {"prompt": "红 heart", "seed": 3})
    assert read_origin(tmp_path / "a.png") == {"prompt": "红 heart", "seed": 3}
    assert torch.equal(to_tensor(open_image(tmp_path / "a.png")), to_tensor(image))
    Image.new("RGB", (2, 2)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="does not carry its origin"):
        read_origin(tmp_path / "b.png")


def test_transparency_is_laid_on_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_psnr_and_perplexity_equal_their_closed_forms():
    reference = -torch.ones(1, 3, 4, 4)
    off_by_51 = reference + 51 / 127.5
    assert psnr(off_by_51, reference).item() == pytest.approx(20 * np.log10(255 / 51), abs=1e-4)
    assert perplexity(torch.tensor([[5, 5, 5, 5], [1, 1, 0, 0]])) == pytest.approx(3)
    assert perplexity(torch.tensor([[7, 0, 0]])) == pytest.approx(1)
