"""Masks in the pipeline: black keeps the tokenizer's codes, white is drawn as the prior says, and all of it replays."""

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pipelines import cli
from pipelines.bundle import assemble_bundle
from pipelines.text_to_image import TextToImagePipeline
from stage1_tokenizer import Autoencoder
from stage2_prior import GPTConfig, GPTPrior, Sampling, flatten_codes, infill
from tessera.errors import InputError
from tessera.images import fit, open_image, open_mask, read_origin, to_pil, to_tensor, white_cells
from tessera.text import TextTokenizer
from tests.conftest import tiny_prior

PROMPT = "a red heart above a blue circle"
WHITE = (7, 3, 9, 9)  # left, top, right, bottom of 16x16 pixels, where a cell has 4x4: rows 0 to 2, columns 1 and 2
MISSING = torch.zeros(4, 4, dtype=torch.bool)
MISSING[:3, 1:3] = True


@pytest.fixture(scope="module")
def bundle(tiny_parts: Path, tiny_text_tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle with a prior that reads in random order."""
    folder = tmp_path_factory.mktemp("random")
    autoencoder = Autoencoder.from_pretrained(tiny_parts / "image_tokenizer")
    config = tiny_prior(autoencoder, tiny_text_tokenizer).config
    torch.manual_seed(0)
    prior = GPTPrior(GPTConfig.model_validate(config.model_dump() | {"order": "random"}), tiny_text_tokenizer)
    for weight in prior.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    prior.save_pretrained(folder / "prior")
    parts: dict[str, Any] = {part: tiny_parts / part for part in ("image_tokenizer", "text_tokenizer", "reranker")}
    return assemble_bundle(
        folder / "bundle", **parts, prior=folder / "prior", sampling=Sampling(top_k=20, guidance_scale=2.0)
    )


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(bundle, device="cpu")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    torch.manual_seed(1)
    return to_pil(torch.rand(1, 3, 16, 16) * 2 - 1)[0]


def masked(size: tuple[int, int], *boxes: Sequence[int]) -> Image.Image:
    """A black mask with white rectangles, whose right and bottom are the last of their pixels."""
    mask = Image.new("L", size)
    for box in boxes:
        ImageDraw.Draw(mask).rectangle(tuple(box), fill=255)
    return mask


# From the mask to the cells -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (5, 5), (50, 31), (31, 50), (3, 200), (64, 65)])
@pytest.mark.parametrize("grid", [(4, 4), (7, 7), (1, 1)])
def test_a_cell_is_drawn_anew_when_white_overlaps_it(size: tuple[int, int], grid: tuple[int, int]) -> None:
    """Against areas in exact fractions, pixel by pixel and cell by cell."""
    random = np.random.default_rng(sum(size) + grid[0])
    white = random.random(size[::-1]) < random.choice([0.01, 0.1])
    cells = white_cells(Image.fromarray(white.astype(np.uint8) * 255), grid)
    side = min(size)

    def overlaps(pixel: int, cell: int, length: int, count: int) -> bool:
        start = Fraction(length - side, 2) + Fraction(cell * side, count)
        return pixel < start + Fraction(side, count) and start < pixel + 1

    for row, column in np.ndindex(*grid):
        touched = [
            white[y, x]
            for y in range(size[1])
            if overlaps(y, row, size[1], grid[0])
            for x in range(size[0])
            if overlaps(x, column, size[0], grid[1])
        ]
        assert bool(cells[row, column]) == any(touched)


def test_cells_lie_where_the_picture_is_cut() -> None:
    """A picture that is its own mask: what of it is bright when it was scaled and cut is in the cells drawn anew."""
    mask = masked((90, 50), (30, 10, 44, 22), (70, 40, 75, 49))
    bright = torch.from_numpy(np.array(fit(mask, 40))) >= 128  # (40, 40)
    seen = bright.view(4, 10, 4, 10).permute(0, 2, 1, 3).flatten(2).any(-1)
    cells = white_cells(mask, (4, 4))
    assert seen.any() and not (seen & ~cells).any() and int(cells.sum()) <= int(seen.sum()) + 2


def test_gray_is_white_from_the_middle_on() -> None:
    levels = Image.fromarray(np.array([[0, 127], [128, 255]], dtype=np.uint8))
    assert white_cells(levels, (2, 2)).tolist() == [[False, False], [True, True]]
    assert white_cells(levels.point(lambda level: 255 * (level > 200)).convert("1"), (2, 2)).sum() == 1


# Laws -----------------------------------------------------------------------------------------------------------------


def test_black_keeps_the_tokenizers_codes_and_white_is_drawn_by_the_prior(
    pipeline: TextToImagePipeline, photo: Image.Image
) -> None:
    drawn = pipeline.infill(photo, masked((16, 16), WHITE), PROMPT, num_images_per_prompt=5, num_candidates=5, seed=3)
    codes = pipeline.image_tokenizer.encode(to_tensor(photo)[None])[0]  # (Q, h, w)
    assert (drawn.codes[:, :, ~MISSING] == codes[:, ~MISSING]).all()
    assert len(drawn.codes.unique(dim=0)) == 5
    prefix = pipeline.prior.prefix([PROMPT])
    expected = infill(pipeline.prior, prefix, codes, ~MISSING, drawn.seeds, pipeline.sampling)
    assert torch.equal(drawn.codes, expected)
    assert drawn.scores == sorted(drawn.scores or [], reverse=True)
    shown = [to_pil(pipeline.image_tokenizer.decode(one[None]))[0].tobytes() for one in drawn.codes]
    assert [image.tobytes() for image in drawn.images] == shown


@torch.no_grad()
def test_the_likeliest_filling_is_the_one_without_a_cache(pipeline: TextToImagePipeline, photo: Image.Image) -> None:
    """Code after code by the prior's own teacher-forced logits, the known positions read first."""
    drawn = pipeline.infill(photo, masked((16, 16), WHITE), PROMPT, num_candidates=1, top_k=1, guidance_scale=1.0)
    codes = flatten_codes(pipeline.image_tokenizer.encode(to_tensor(photo)[None]))
    places = MISSING.flatten().nonzero().flatten().tolist()
    order = torch.tensor([[place for place in range(16) if place not in places] + places])
    codes[:, places] = 0
    prior = pipeline.prior
    assert isinstance(prior, GPTPrior)
    for place in places:
        codes[:, place] = prior(prior.prefix([PROMPT]), codes, order)[:, place].argmax(-1)
    assert torch.equal(flatten_codes(drawn.codes), codes)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "guidance_scale": 1.0}, {"batch_size": 2}])
def test_n_candidates_equal_n_single_runs(
    pipeline: TextToImagePipeline, photo: Image.Image, settings: dict[str, Any]
) -> None:
    mask = masked((16, 16), WHITE)
    prompts = [PROMPT, "a dog"]
    together = pipeline.infill(photo, mask, prompts, num_images_per_prompt=5, num_candidates=5, **settings)
    for i, (image, seed) in enumerate(zip(together.images, together.seeds, strict=True)):
        alone = pipeline.infill(photo, mask, prompts[i // 5], num_candidates=1, seed=seed, **settings)
        assert torch.equal(alone.codes[0], together.codes[i]) and alone.images[0].tobytes() == image.tobytes()


@pytest.mark.parametrize("prune_by", ["likelihood", "reranker"])
def test_what_survives_pruning_is_what_is_drawn_without(
    pipeline: TextToImagePipeline, photo: Image.Image, prune_by: str
) -> None:
    mask, drawing = masked((16, 16), WHITE), {"num_candidates": 8, "log_probs": True}
    whole = pipeline.infill(photo, mask, PROMPT, num_images_per_prompt=8, **drawing)
    some = pipeline.infill(photo, mask, PROMPT, candidate_budget=0.5, prune_by=prune_by, **drawing)
    by_seed = dict(zip(whole.seeds, whole.codes, strict=True))
    assert len(some.seeds) == 2
    assert all(torch.equal(by_seed[seed], codes) for seed, codes in zip(some.seeds, some.codes, strict=True))
    assert whole.log_probs is not None and whole.log_probs.shape == (8, int(MISSING.sum()))


def test_known_codes_that_are_none(pipeline: TextToImagePipeline) -> None:
    known = [0] * 15 + [-1]
    assert pipeline(PROMPT, known_codes=known, num_candidates=1).codes[0, 0].flatten().tolist()[:15] == known[:15]
    cases: list[tuple[list[Any], str]] = [
        (known[:-1], r"must be 16 whole numbers, -1 for missing ones, got 15"),
        ([0.5] * 16, r"known_codes must be \(n,\) whole numbers"),
        (["a"], "known_codes must be whole numbers"),
        ([0] * 16, "nothing to draw"),
        ([32] * 15 + [-1], r"codes must be in \[0, 32\)"),
        ([-2] * 15 + [-1], r"codes must be in \[0, 32\)"),
    ]
    for wrong, sentence in cases:
        with pytest.raises(InputError, match=sentence):
            pipeline(PROMPT, known_codes=wrong)
    with pytest.raises(InputError, match="leave first_codes out"):
        pipeline(PROMPT, known_codes=known, first_codes=[1])


# The command ----------------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


@pytest.fixture
def files(photo: Image.Image, tmp_path: Path) -> tuple[Path, Path]:
    """A picture and its mask, of the same oblong size."""
    photo.resize((40, 30)).save(tmp_path / "photo.png")
    masked((40, 30), (20, 0, 30, 29)).save(tmp_path / "mask.png")
    return tmp_path / "photo.png", tmp_path / "mask.png"


def test_the_command_fills_and_the_picture_replays(
    bundle: Path, pipeline: TextToImagePipeline, files: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    image, mask = files
    options = ["--image", image, "--mask", mask, "--model", bundle, "--device", "cpu", "--json"]
    draw = ["generate", PROMPT, *options, "-n", "2", "--candidates", "4", "--top-p", "0.9", "-o", tmp_path / "out"]
    code, out, _ = run(capsys, *draw)
    assert code == 0
    pictures = json.loads(out)["prompts"][0]["images"]
    expected = pipeline.infill(
        open_image(image), open_mask(mask), PROMPT, num_images_per_prompt=2, num_candidates=4, top_p=0.9
    )
    assert [picture["seed"] for picture in pictures] == expected.seeds
    for picture, wanted in zip(pictures, expected.images, strict=True):
        assert Image.open(picture["path"]).tobytes() == wanted.tobytes()
        known = read_origin(picture["path"])["request"]["known_codes"]
        assert len(known) == 16 and [place % 4 for place in range(16) if known[place] == -1] == [2, 3] * 4
        replay = ["generate", "--replay", picture["path"], "--model", bundle, "-o", tmp_path / "again", "--json"]
        code, out, _ = run(capsys, *replay)
        assert code == 0 and json.loads(out)["identical"]


def test_what_cannot_be_filled_is_one_sentence(
    bundle: Path, tiny_bundle: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, mask = files
    black, small, clear, text = (tmp_path / f"{name}.png" for name in ("black", "small", "clear", "text"))
    masked((40, 30), (0, 0, 4, 29)).save(black)  # white only where the picture is cut off
    masked((16, 16), WHITE).save(small)
    Image.new("RGBA", (40, 30), (255, 255, 255, 0)).save(clear)
    text.write_text("no picture")
    for options, sentence in [
        (["--image", image], "give --image and --mask together"),
        (["--mask", mask], "give --image and --mask together"),
        (["--image", image, "--mask", mask, "--top-of", image], "give one of them"),
        (["--image", image, "--mask", black], "the mask is black all over"),
        (["--image", image, "--mask", small], "the image has 40x30 pixels and its mask 16x16"),
        (["--image", image, "--mask", clear], "clear.png has transparent parts"),
        (["--image", image, "--mask", text], "text.png is not a readable picture"),
        (["--image", tmp_path / "gone.png", "--mask", mask], "gone.png does not exist"),
        (["--image", image, "--mask", mask, "--model", tiny_bundle], "train a GPT with model.order=random"),
    ]:
        code, out, error = run(capsys, "generate", PROMPT, "--model", bundle, "-o", tmp_path / "out", *options)
        assert code == 2 and sentence in error and len(error.splitlines()) == 1 and not out
    assert not (tmp_path / "out").exists()


def test_an_opaque_alpha_channel_is_fine(tmp_path: Path) -> None:
    masked((4, 4), (0, 0, 1, 3)).convert("RGBA").save(tmp_path / "mask.png")
    assert white_cells(open_mask(tmp_path / "mask.png"), (1, 2)).tolist() == [[True, False]]
