"""The judge and all glyphs of the emoji world: right on real pictures of every kind, not fooled by empty ones."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from torch import Tensor

from tessera.errors import InputError

pytest.importorskip("emoji", reason="the recipe's names come from the package `emoji`: pip install 'tessera[emoji]'")
pytest.importorskip("uharfbuzz", reason="the recipe shapes glyphs with `uharfbuzz`: pip install 'tessera[emoji]'")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes" / "emoji"))

import prepare  # noqa: E402
from captions import name_items  # noqa: E402
from glyphs import DEFAULT_FONT, load_items  # noqa: E402
from judge import Case, Judge, Region, Verdict, lab, read_cases  # noqa: E402
from world import BESIDE, STACKED, WHOLE, Box, Scene, World, build_world, small_box  # noqa: E402

pytestmark = pytest.mark.skipif(
    not DEFAULT_FONT.is_file(), reason=f"no font at {DEFAULT_FONT}: install fonts-noto-color-emoji"
)
COLOURS = ("red", "light blue")  # each costs the judge a few seconds
SAMPLE = 120  # pictures of a kind

Draw = Callable[[World, Random], tuple[tuple[tuple[str, Box], ...], str | None]]


@pytest.fixture(scope="module")
def world() -> World:
    items, _ = load_items()
    return build_world(items, name_items(items))


@pytest.fixture(scope="module")
def judge(world: World, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    folder = tmp_path_factory.mktemp("glyphs")
    prepare.write_glyphs(folder, world)
    return Judge(folder)


def plain(world: World, random: Random) -> tuple[tuple[tuple[str, Box], ...], str | None]:
    return ((random.choice(list(world.items)), WHOLE),), None


def background(world: World, random: Random) -> tuple[tuple[tuple[str, Box], ...], str | None]:
    colour = random.choice(COLOURS)
    visible = [item for item in world.items if (item, colour) not in world.hidden]
    return ((random.choice(visible), WHOLE),), colour


def small(world: World, random: Random) -> tuple[tuple[tuple[str, Box], ...], str | None]:
    place = random.choice(("top left", "top right", "bottom left", "bottom right", "center"))
    return ((random.choice(list(world.items)), small_box(place)),), None


def pair(world: World, random: Random) -> tuple[tuple[tuple[str, Box], ...], str | None]:
    first, second = random.sample(list(world.items), 2)
    boxes = random.choice((BESIDE, STACKED))
    return ((first, boxes[0]), (second, boxes[1])), None


def drawn(world: World, glyphs: tuple[tuple[str, Box], ...], colour: str | None, size: int = 64) -> Tensor:
    """(1, 3, size, size) in [-1, 1]"""
    picture = prepare.draw(Scene("", "", glyphs, colour, (), 0.0), world, size)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def asked(world: World, glyphs: tuple[tuple[str, Box], ...], colour: str | None) -> Case:
    regions = tuple(Region(box, item, world.items[item].base) for item, box in glyphs)
    return Case("a test", "test", regions, colour)


@pytest.mark.parametrize("kind", [plain, background, small, pair])
def test_real_pictures_are_recognised(world: World, judge: Judge, kind: Draw) -> None:
    random = Random(kind.__name__)
    exact = 0
    for _ in range(SAMPLE):
        glyphs, colour = kind(world, random)
        verdict = judge(drawn(world, glyphs, colour), asked(world, glyphs, colour))[0]
        exact += verdict.exact
        assert verdict.background == colour
    assert exact >= 0.99 * SAMPLE


@pytest.mark.parametrize("kind", [plain, small])
def test_two_pixels_aside_are_forgiven(world: World, judge: Judge, kind: Draw) -> None:
    random = Random(1)
    exact = 0
    for _ in range(SAMPLE // 2):
        glyphs, colour = kind(world, random)
        image = torch.nn.functional.pad(drawn(world, glyphs, colour), (2, 2, 2, 2), value=1.0)[:, :, 1:65, 4:68]
        exact += judge(image, asked(world, glyphs, colour))[0].exact
    assert exact >= 0.95 * (SAMPLE // 2)


def test_twice_as_large_pictures_are_recognised(world: World, judge: Judge) -> None:
    random = Random(2)
    scenes = [kind(world, random) for kind in (plain, small, pair) for _ in range(15)]
    right = [judge(drawn(world, *scene, size=128), asked(world, *scene))[0].exact for scene in scenes]
    assert np.mean(right) >= 0.97


def test_the_empty_the_mean_and_noise_are_nothing(world: World, judge: Judge) -> None:
    random = Random(3)
    generator = torch.Generator().manual_seed(0)
    mean = torch.cat([drawn(world, *plain(world, random)) for _ in range(400)]).mean(0, keepdim=True)
    mean_of_all = torch.cat([drawn(world, *k(world, random)) for k in (plain, small, pair) for _ in range(150)]).mean(0)
    nothing = torch.cat(
        [
            torch.ones(1, 3, 64, 64),
            torch.ones(1, 3, 64, 64) * 0.9,
            torch.zeros(1, 3, 64, 64),
            -torch.ones(1, 3, 64, 64),
            mean,
            mean_of_all[None],
            torch.rand(8, 3, 64, 64, generator=generator) * 2 - 1,
            torch.full((1, 3, 64, 64), torch.nan),
        ]
    )
    for boxes in ((WHOLE,), (small_box("center"),), BESIDE, STACKED):
        request = asked(world, tuple(("1F600", box) for box in boxes), None)
        for verdict in judge(nothing, request):
            assert not verdict.exact and not verdict.concept
            assert all(seen.item is None for seen in verdict.seen)


def test_what_is_wrong_is_named(world: World, judge: Judge) -> None:
    astronaut, dark, rocket = "1F469 200D 1F680", "1F469 1F3FF 200D 1F680", "1F680"

    def verdict(shown: tuple[tuple[str, Box], ...], wanted: tuple[tuple[str, Box], ...]) -> Verdict:
        return judge(drawn(world, shown, None), asked(world, wanted, None))[0]

    tone = verdict(((dark, WHOLE),), ((astronaut, WHOLE),))
    assert (tone.exact, tone.concept, tone.seen[0].item) == (False, True, dark)
    swapped = verdict(((rocket, BESIDE[0]), (dark, BESIDE[1])), ((dark, BESIDE[0]), (rocket, BESIDE[1])))
    assert (swapped.exact, swapped.concept) == (False, False)
    assert [seen.item for seen in swapped.seen] == [rocket, dark]
    elsewhere = verdict(((rocket, small_box("top left")),), ((rocket, small_box("bottom right")),))
    assert elsewhere.seen[0].item is None

    on_red = judge(drawn(world, ((astronaut, WHOLE),), "red"), asked(world, ((astronaut, WHOLE),), "light blue"))[0]
    assert (on_red.exact, on_red.background, on_red.seen[0].item) == (False, "red", astronaut)
    not_white = judge(drawn(world, ((astronaut, WHOLE),), "red"), asked(world, ((astronaut, WHOLE),), None))[0]
    assert not not_white.exact


def test_a_verdict_does_not_depend_on_the_batch(world: World, judge: Judge) -> None:
    random = Random(4)
    images = torch.cat([drawn(world, *background(world, random)) for _ in range(5)])
    request = asked(world, (("1F600", WHOLE),), "red")
    together, alone = judge(images, request), [judge(image[None], request)[0] for image in images]
    assert [v.background for v in together] == [v.background for v in alone]
    assert [v.seen[0].item for v in together] == [v.seen[0].item for v in alone]


def test_cielab_of_known_colours() -> None:
    colours = torch.tensor([[255.0, 255, 255], [0, 0, 0], [255, 0, 0], [0, 0, 255]])
    expected = torch.tensor([[100.0, 0, 0], [0, 0, 0], [53.24, 80.09, 67.20], [32.30, 79.19, -107.86]])
    torch.testing.assert_close(lab(colours), expected, atol=0.05, rtol=0)


def test_wrong_input_is_one_sentence(world: World, judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no references"):
        Judge(tmp_path)
    with pytest.raises(InputError, match="'mauve' of 'a test' is unknown"):
        judge(torch.zeros(1, 3, 64, 64), asked(world, (("1F600", WHOLE),), "mauve"))
    with pytest.raises(InputError, match=r"images must be \(N, 3, H, W\)"):
        judge(torch.zeros(3, 64, 64), asked(world, (("1F600", WHOLE),), None))
    line = {"prompt": "x", "split": "s", "regions": [{"box": [0, 0, 1, 2], "item": "a", "concept": "a"}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line | {"background": None}))
    with pytest.raises(InputError, match="line 1 is no evaluation prompt"):
        read_cases(tmp_path / "prompts.jsonl")
    with pytest.raises(InputError, match="cannot read "):
        read_cases(tmp_path / "nowhere.jsonl")


def test_the_shipped_prompts_can_be_read() -> None:
    requests = read_cases(Path(prepare.__file__).parent / "prompts.jsonl")
    assert len(requests) == 1709
