"""The emoji world of recipes/emoji: nothing held out is trained on, captions are true, a seed gives one world."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest

pytest.importorskip("emoji", reason="the recipe's names come from the package `emoji`: pip install 'tessera[emoji]'")
pytest.importorskip("uharfbuzz", reason="the recipe shapes glyphs with `uharfbuzz`: pip install 'tessera[emoji]'")
RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "emoji"
sys.path.insert(0, str(RECIPE))

import prepare  # noqa: E402
from captions import (  # noqa: E402
    Names,
    background_captions,
    name_items,
    pair_captions,
    plain_captions,
    position_captions,  # noqa: E402
    with_article,
)
from glyphs import DEFAULT_FONT, base_of, load_items  # noqa: E402
from split import background_held_out, genders_held_out, pair_held_out, position_held_out, role_of  # noqa: E402
from world import (  # noqa: E402
    BESIDE,
    CORNERS,
    SHARES,
    Scene,
    World,
    build_world,
    evaluation_prompts,
    held_out_scenes,
    small_box,
    training_scenes,
)

CHINESE = re.compile(r"[\u3400-\u9fff]")
RELATION = re.compile(r" (next to|left of|right of|above|on top of|below) ")
COUNTS = {"background": 600, "small": 400, "pair": 800}
HEART = Names("red heart", ("heart",), "红心", ())
CIRCLE = Names("blue circle", (), "蓝色圆", ())
needs_font = pytest.mark.skipif(
    not DEFAULT_FONT.is_file(), reason=f"no font at {DEFAULT_FONT}: install fonts-noto-color-emoji"
)


@pytest.fixture(scope="module")
def world() -> World:
    items, sequences = load_items()
    assert sequences == prepare.EXPECTED["sequences"]
    return build_world(items, name_items(items))


@pytest.fixture(scope="module")
def trained(world: World) -> list[Scene]:
    return training_scenes(world, seed=0, counts=COUNTS)


@needs_font
def test_the_split_has_its_published_counts(world: World) -> None:
    counts = {"sequences": 3789, "items": len(world.items), **Counter(world.split.values())}
    assert counts == prepare.EXPECTED


@needs_font
def test_nothing_held_out_is_trained_on(world: World, trained: list[Scene]) -> None:
    for scene in trained:
        bases = [world.items[item].base for item, _ in scene.glyphs]
        assert all(world.split[item] == "train" for item, _ in scene.glyphs)
        if scene.background:
            assert not background_held_out(bases[0], scene.background)
        if scene.kind == "small":
            place = next(place for place in CORNERS if small_box(place) == scene.glyphs[0][1])
            assert not position_held_out(bases[0], place)
        if scene.kind == "pair":
            assert not pair_held_out(*bases)


@needs_font
def test_what_is_asked_for_was_trained_on_except_for_what_is_held_out(world: World, trained: list[Scene]) -> None:
    drawn = {(scene.glyphs, scene.background) for scene in trained}
    scenes = held_out_scenes(world)
    assert Counter(scene.split for scene in scenes) == {
        "tone": 156,
        "tone2": 33,
        "gender": 114,
        "colour": 6,
        "background": 300,
        "position": 200,
        "pair": 300,
    }
    for scene in scenes:
        assert (scene.glyphs, scene.background) not in drawn
        held_out_item = scene.split in ("tone", "tone2", "gender", "colour")
        assert all((world.split[item] == "train") != held_out_item for item, _ in scene.glyphs)


@needs_font
def test_the_kinds_have_their_shares(world: World, trained: list[Scene]) -> None:
    for kind, share in SHARES.items():
        assert sum(scene.weight for scene in trained if scene.kind == kind) == pytest.approx(share)
    plain = {scene.glyphs[0][0]: scene.weight for scene in trained if scene.kind == "plain"}
    ratio = plain["1F44D"] / plain["1F680"]  # thumbs up has six tones, a rocket one
    assert ratio == pytest.approx(6**-0.5)


@needs_font
def test_other_shares_change_how_often_pictures_are_drawn_and_not_the_pictures(
    world: World, trained: list[Scene]
) -> None:
    asked = {"plain": 0.3, "background": 0.4, "small": 0.1, "pair": 0.2}
    scenes = training_scenes(world, seed=0, counts=COUNTS, shares=asked)
    assert [scene._replace(weight=0.0) for scene in scenes] == [scene._replace(weight=0.0) for scene in trained]
    shares = {kind: sum(scene.weight for scene in scenes if scene.kind == kind) for kind in SHARES}
    assert shares == pytest.approx(asked)


@needs_font
def test_captions_are_in_two_languages(world: World, trained: list[Scene]) -> None:
    english, total = Counter[str](), Counter[str]()
    for scene in trained:
        said = [caption for caption in scene.captions if not CHINESE.search(caption)]
        english[scene.kind] += len(said)
        total[scene.kind] += len(scene.captions)
        assert 6 <= len(scene.captions) <= 10
        if scene.kind == "plain":
            assert said.count(world.names[scene.glyphs[0][0]].en) >= 3
        if scene.background:
            assert all(f" {scene.background} background" in caption for caption in said)
    assert english["plain"] / total["plain"] == pytest.approx(5 / 9, abs=0.02)
    assert all(0.7 < english[kind] / total[kind] < 0.8 for kind in ("background", "small", "pair"))


@needs_font
def test_captions_of_pairs_are_true(world: World, trained: list[Scene]) -> None:
    owner = {name: item for item, names in world.names.items() for name in (names.en, *names.en_other)}
    checked = 0
    for scene in (scene for scene in trained if scene.kind == "pair"):
        shown = [item for item, _ in scene.glyphs]  # left before right, upper before lower
        for caption in scene.captions:
            parts = RELATION.split(caption)
            if len(parts) != 3:
                continue  # Chinese, or a name that holds such words itself
            left, relation, right = parts
            assert (relation in ("next to", "left of", "right of")) == (scene.glyphs[0][1] == BESIDE[0])
            said = [owner.get(name) or owner[re.sub(r"^(a|an|the) ", "", name)] for name in (left, right)]
            assert said == (shown[::-1] if relation in ("right of", "below") else shown), caption
            checked += 1
    assert checked > 5 * COUNTS["pair"]


@needs_font
def test_one_seed_gives_one_world(world: World) -> None:
    small = {"background": 50, "small": 50, "pair": 50}
    assert training_scenes(world, 0, small) == training_scenes(world, 0, small)
    assert training_scenes(world, 0, small) != training_scenes(world, 1, small)
    assert evaluation_prompts(world) == evaluation_prompts(world)


@needs_font
def test_the_shipped_prompts_are_those_of_the_world(world: World, tmp_path: Path) -> None:
    prepare.write_prompts(tmp_path / "prompts.jsonl", world, seed=0)
    assert (tmp_path / "prompts.jsonl").read_text("utf-8") == (RECIPE / "prompts.jsonl").read_text("utf-8")


@needs_font
def test_glyphs_stand_where_the_scene_says(world: World, trained: list[Scene]) -> None:
    for kind in ("small", "pair", "background"):
        scene = next(scene for scene in trained if scene.kind == kind)
        picture = np.asarray(prepare.draw(scene, world, 64)).astype(int)
        outside = np.ones((64, 64), dtype=bool)
        for _, (left, top, right, bottom) in scene.glyphs:
            box = np.s_[round(top * 64) : round(bottom * 64), round(left * 64) : round(right * 64)]
            outside[box] = False
            assert np.ptp(picture[box]) > 50
        assert (picture[outside] == 255).all()


def test_captions_of_a_small_world() -> None:
    plain = plain_captions(HEART, Random(0))
    assert plain.count("red heart") == 3 and "红心" in plain
    above = pair_captions(HEART, CIRCLE, False, Random(0))
    assert not any("left" in caption or "next to" in caption for caption in above)
    assert all(caption.index("heart") < caption.index("circle") for caption in above if " above " in caption)
    assert all(caption.index("circle") < caption.index("heart") for caption in above if " below " in caption)
    assert "红色背景上的蓝色圆" in background_captions(CIRCLE, "red", Random(0))
    assert "左上角的小红心" in position_captions(HEART, "top left", Random(0))


@pytest.mark.parametrize(
    ("name", "phrase"),
    [("hot dog", "a hot dog"), ("ear", "an ear"), ("unicorn", "a unicorn"), ("open hands", "open hands"),
     ("one o'clock", "a one o'clock"), ("SOS button", "an SOS button"), ("cat with wry smile", "a cat with wry smile"),
     ("man lifting weights", "a man lifting weights"), ("flag of United States", "a flag of United States")],
)  # fmt: skip
def test_articles(name: str, phrase: str) -> None:
    assert with_article(name) == phrase


def test_roles() -> None:
    assert base_of("1F3CB 1F3FD 200D 2640 FE0F") == "1F3CB 200D 2640"
    assert role_of("1F3CB 200D 2640") == ("1F3CB",)
    assert role_of("1F469 200D 1F680") == role_of("1F9D1 200D 1F680") == ("led", "1F680")
    assert role_of("1F468 200D 1F469 200D 1F466") is None and role_of("1F680") is None
    hit = genders_held_out({"1F468 200D 1F680", "1F469 200D 1F680", "1F3C3", "1F3C3 200D 2640"})
    assert hit == {"1F468 200D 1F680", "1F3C3"}


def test_a_missing_font_is_one_sentence_and_code_2(tmp_path: Path) -> None:
    command = [sys.executable, str(RECIPE / "prepare.py"), "--out", str(tmp_path / "out"), "--font", "nowhere.ttf"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "install fonts-noto-color-emoji or pass --font" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
