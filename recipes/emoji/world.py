"""Which images exist: the scenes of the training set, of the held-out sets, and the prompts of the evaluation.

A scene says what is drawn where, before any pixel: pure functions of the items and a seed. Half-size glyphs stand on
multiples of a quarter of the side, so that they fall on a tokenizer's code grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from random import Random
from typing import NamedTuple

import numpy as np
from captions import Names, background_captions, noun, pair_captions, plain_captions, position_captions, with_article
from glyphs import Item, compose, premultiplied
from split import (
    PLACES,
    background_held_out,
    item_weights,
    pair_held_out,
    position_held_out,
    split_items,
)

Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the side

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (224, 48, 48),
    "orange": (255, 150, 40),
    "yellow": (255, 220, 55),
    "green": (68, 160, 72),
    "blue": (43, 99, 217),
    "light blue": (166, 216, 255),
    "purple": (142, 68, 192),
    "pink": (255, 158, 207),
    "brown": (122, 82, 56),
    "black": (17, 17, 17),
    "gray": (144, 144, 144),
    "beige": (240, 224, 190),
}
WHITE = (255, 255, 255)
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
CORNERS: dict[str, tuple[float, float]] = {
    "top left": (0.0, 0.0),
    "top right": (0.5, 0.0),
    "bottom left": (0.0, 0.5),
    "bottom right": (0.5, 0.5),
    "center": (0.25, 0.25),
}
BESIDE: tuple[Box, Box] = ((0.0, 0.25, 0.5, 0.75), (0.5, 0.25, 1.0, 0.75))
STACKED: tuple[Box, Box] = ((0.25, 0.0, 0.75, 0.5), (0.25, 0.5, 0.75, 1.0))
SHARES = {"plain": 0.45, "background": 0.20, "small": 0.10, "pair": 0.25}  # of the training draws
TRAIN_PICTURES = {"background": 14_000, "small": 7_000, "pair": 22_000}
SEEN_PROMPTS = 300
COMBINATION_PROMPTS = {"background": 300, "position": 200, "pair": 300}


class Scene(NamedTuple):
    """One image and what may truly be said of it."""

    kind: str  # "plain", "background", "small" or "pair"
    split: str  # "train", or the held-out split that it belongs to
    glyphs: tuple[tuple[str, Box], ...]  # item id and where it stands
    background: str | None  # a name of COLOURS, None for white
    captions: tuple[str, ...]
    weight: float  # share of the training draws; 0 outside the training split


class Prompt(NamedTuple):
    """One line of the evaluation: what is asked, and what must then be seen where."""

    prompt: str
    split: str  # "seen", "seen_zh", or the held-out split
    regions: tuple[tuple[Box, str], ...]  # where, and the item id
    background: str | None


class World(NamedTuple):
    items: dict[str, Item]
    names: dict[str, Names]
    split: dict[str, str]  # item id -> split
    weights: dict[str, float]  # item id -> n^-1/2
    hidden: frozenset[tuple[str, str]]  # (item id, colour): too little of the glyph would be seen; never drawn


class Pool(NamedTuple):
    """Items to draw from."""

    items: list[str]
    cumulative: list[float]  # running sum of their weights


def build_world(items: Sequence[Item], names: dict[str, Names]) -> World:
    return World(
        items={item.id: item for item in items},
        names=names,
        split=split_items(items),
        weights=item_weights(items),
        hidden=frozenset(pair for item in items for pair in hidden_on(item)),
    )


def hidden_on(item: Item) -> list[tuple[str, str]]:
    """The colours on which more than half of the glyph is within 40 of 255 of the background, in every channel."""
    glyph = premultiplied(item.bitmap, 32)
    solid = glyph[..., 3] > 127
    hidden = []
    for name, rgb in COLOURS.items():
        background = np.asarray(rgb, dtype=np.float32)
        difference = np.abs(compose(glyph, background) - background).max(-1)
        if (difference[solid] < 40).mean() > 0.5:
            hidden.append((item.id, name))
    return hidden


def training_scenes(
    world: World, seed: int = 0, counts: dict[str, int] | None = None, shares: dict[str, float] | None = None
) -> list[Scene]:
    """Every training item once, plain, then `counts` scenes of the other kinds without a repetition; `shares` of the
    draws go to each kind."""
    counts = TRAIN_PICTURES if counts is None else counts
    shares = SHARES if shares is None else shares
    pool = trained_items(world)
    total = pool.cumulative[-1]
    scenes = [
        plain_scene(world, item, shares["plain"] * world.weights[item] / total, Random(f"{seed}:plain:{item}"))
        for item in pool.items
    ]
    draw = {"background": draw_background, "small": draw_small, "pair": draw_pair}
    for kind, count in counts.items():
        weight = shares[kind] / count if count else 0.0
        random = Random(f"{seed}:{kind}:train")
        scenes += distinct(count, partial(draw[kind], world, pool, False, weight, random))
    return scenes


def distinct(count: int, draw: Callable[[], Scene | None]) -> list[Scene]:
    """`count` scenes that differ in what they show; `None` is a draw that may not be used."""
    seen: dict[tuple[object, ...], Scene] = {}
    while len(seen) < count:
        scene = draw()
        if scene is not None:
            seen.setdefault((scene.glyphs, scene.background), scene)
    return list(seen.values())


def plain_scene(world: World, item: str, weight: float, random: Random) -> Scene:
    captions = tuple(plain_captions(world.names[item], random))
    return Scene("plain", world.split[item], ((item, WHOLE),), None, captions, weight)


def trained_items(world: World) -> Pool:
    items = [item for item, split in world.split.items() if split == "train"]
    return Pool(items, list(accumulate(world.weights[item] for item in items)))


def choose(pool: Pool, random: Random) -> str:
    return random.choices(pool.items, cum_weights=pool.cumulative)[0]


def draw_background(world: World, pool: Pool, held_out: bool, weight: float, random: Random) -> Scene | None:
    item, colour = choose(pool, random), random.choice(list(COLOURS))
    if background_held_out(world.items[item].base, colour) != held_out or (item, colour) in world.hidden:
        return None
    captions = tuple(background_captions(world.names[item], colour, wording(item, colour)))
    return Scene("background", "background" if held_out else "train", ((item, WHOLE),), colour, captions, weight)


def draw_small(world: World, pool: Pool, held_out: bool, weight: float, random: Random) -> Scene | None:
    item, place = choose(pool, random), random.choice(PLACES)
    if position_held_out(world.items[item].base, place) != held_out:
        return None
    captions = tuple(position_captions(world.names[item], place, wording(item, place)))
    return Scene("small", "position" if held_out else "train", ((item, small_box(place)),), None, captions, weight)


def draw_pair(world: World, pool: Pool, held_out: bool, weight: float, random: Random) -> Scene | None:
    first, second = choose(pool, random), choose(pool, random)
    boxes = random.choice((BESIDE, STACKED))
    base, other = world.items[first].base, world.items[second].base
    if base == other or pair_held_out(base, other) != held_out:
        return None
    words = wording(first, second, str(boxes))
    captions = tuple(pair_captions(world.names[first], world.names[second], boxes == BESIDE, words))
    glyphs = ((first, boxes[0]), (second, boxes[1]))
    return Scene("pair", "pair" if held_out else "train", glyphs, None, captions, weight)


def wording(*scene: str) -> Random:
    """Chance for the captions alone, so that a new wording never changes which images are drawn."""
    return Random(":".join(scene))


def small_box(place: str) -> Box:
    x, y = CORNERS[place]
    return (x, y, x + 0.5, y + 0.5)


def held_out_scenes(world: World, seed: int = 0) -> list[Scene]:
    """Every held-out item, plain, and the held-out combinations of trained items that the prompts ask for."""
    scenes = [
        plain_scene(world, item, 0.0, Random(f"{seed}:plain:{item}"))
        for split in ("tone", "tone2", "gender", "colour")
        for item in world.items
        if world.split[item] == split
    ]
    pool = trained_items(world)
    draw = {"background": draw_background, "position": draw_small, "pair": draw_pair}
    for split, count in COMBINATION_PROMPTS.items():
        random = Random(f"{seed}:{split}:held out")
        scenes += distinct(count, partial(draw[split], world, pool, True, 0.0, random))
    return scenes


def evaluation_prompts(world: World, seed: int = 0) -> list[Prompt]:
    """The fixed list: seen names in English and in Chinese, then `held_out_scenes` in their order."""
    random = Random(f"{seed}:seen prompts")
    pool = trained_items(world)
    seen: dict[str, None] = {}
    while len(seen) < SEEN_PROMPTS:
        item = choose(pool, random)
        if world.names[item].zh:
            seen.setdefault(item)
    prompts = [Prompt(world.names[item].en, "seen", ((WHOLE, item),), None) for item in seen]
    prompts += [Prompt(world.names[item].zh or "", "seen_zh", ((WHOLE, item),), None) for item in seen]
    for scene in held_out_scenes(world, seed):
        regions = tuple((box, item) for item, box in scene.glyphs)
        words = wording(str(seed), *(str(glyph) for glyph in scene.glyphs))
        prompts.append(Prompt(ask_for(world, scene, words), scene.split, regions, scene.background))
    return prompts


def ask_for(world: World, scene: Scene, random: Random) -> str:
    """A single glyph by its exact name; a combination in the usual English wording, some names with an article."""
    names = [world.names[item]._replace(en_other=()) for item, _ in scene.glyphs]
    if scene.kind == "plain":
        return names[0].en
    if scene.kind == "background":
        return f"{noun(names[0], random)} on {with_article(scene.background or '')} background"
    if scene.kind == "small":
        place = next(place for place in PLACES if small_box(place) == scene.glyphs[0][1])
        return f"{with_article(names[0].en, 'small')} in the {place}{'' if place == 'center' else ' corner'}"
    first, second = names
    if scene.glyphs[0][1] == BESIDE[0]:
        relation = random.choice(("next to", "left of", "right of"))
    else:
        relation = random.choice(("above", "on top of", "below"))
    if relation in ("right of", "below"):
        first, second = second, first
    return f"{noun(first, random)} {relation} {noun(second, random)}"
