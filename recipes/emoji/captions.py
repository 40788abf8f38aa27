"""True captions, in English and Chinese.

Names come from the PyPI package `emoji`. One rule of spelling: colons go, underscores become spaces, brackets go,
typographic apostrophes become plain; capitals stay where the package has them, which is in proper names and letters
("Japanese dolls", "OK hand"), everything else is lower case. The package calls a flag by its country alone: here it is
the "flag of Switzerland", "瑞士旗", for the country alone would be a poor caption. A further name that another item
also answers to is dropped, so that a caption means one item, whatever its capitals and hyphens.

About three of four captions are English, five of nine of a plain image, and half of those are its exact name: a
Chinese name is heard in fewer kinds of captions. Lists may repeat a caption to give it weight.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from glyphs import Item

TONE = re.compile(r" (light|medium-light|medium|medium-dark|dark) skin tone")
TONE_ZH = re.compile(r"^(.+) ((?:较浅|中等浅|中等|中等深|较深)肤色)$")
HAIR = re.compile(r"^(man|woman|person) ((?:white|red|curly|blond) hair|beard)$")
ALIAS = re.compile(r"^[A-Za-z][A-Za-z' -]{2,}$")
REFUSED = frozenset({"harambe", "hankey", "shit"})  # aliases of the package that are no descriptions
FLAG = re.compile(r"^1F1[EF][0-9A-F] 1F1[EF][0-9A-F]$|^1F3F4 E0067 ")
WITH_THE = re.compile(r"Islands$|^(United |Netherlands|Philippines|Bahamas|Maldives|Comoros|Seychelles|Gambia)")
HEAD_ENDS = re.compile(r" (with|of|in|on|and|for|facing|behind|under|below|over|holding|[a-z]+ing)\b.*| .* skin tone$")
PEOPLE = re.compile(r"(man|woman|person|child|boy|girl)\b")
PLURAL = re.compile(r"(men|women|people|no|not|top|end|back|soon)\b|.*([^s'ui]s|leaves|dice)$", re.I)
VOWEL_SOUND = re.compile(r"(?!one\b|once|uni|us|eu|utili|ewe|U|ON|O button)[aeiouAEIO]|hour|[MNFX] |SOS|NG|OK|O |O$|ON")

COLOURS_ZH = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "light blue": "浅蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "brown": "棕色",
    "black": "黑色",
    "gray": "灰色",
    "beige": "米色",
}
PLACES_EN = {
    "top left": ("in the top left corner", "in the top left", "in the upper left corner"),
    "top right": ("in the top right corner", "in the top right", "in the upper right corner"),
    "bottom left": ("in the bottom left corner", "in the bottom left", "in the lower left corner"),
    "bottom right": ("in the bottom right corner", "in the bottom right", "in the lower right corner"),
    "center": ("in the center", "in the middle", "in the center of the picture"),
}
PLACES_ZH = {
    "top left": "左上角",
    "top right": "右上角",
    "bottom left": "左下角",
    "bottom right": "右下角",
    "center": "中间",
}


class Names(NamedTuple):
    en: str  # the exact name, unique among the items
    en_other: tuple[str, ...]  # further true names
    zh: str | None  # the exact Chinese name, None where it would mean several items
    zh_other: tuple[str, ...]


def clean(raw: str) -> str:
    text = raw.strip(":").replace("_", " ").replace("(", "").replace(")", "").replace("’", "'")
    return " ".join(text.split())


def key(name: str) -> str:
    """What two spellings of one name share."""
    return re.sub(r"[^\w*#&+!]", "", name.casefold())


def name_items(items: Sequence[Item]) -> dict[str, Names]:
    """Item id -> its names, with those removed that two items would share."""
    english = {item.id: english_names(item) for item in items}
    chinese = {item.id: chinese_names(item) for item in items}
    holders = Counter(key_ for names in english.values() for key_ in {key(name) for name in names})
    holders_zh = Counter(key_ for names in chinese.values() for key_ in {key(name) for name in names})
    own = {key(names[0]) for names in english.values()}
    if len(own) != len(items):
        raise ValueError("two items have the same English name")
    result = {}
    for item in items:
        first, *others = english[item.id]
        others = [name for name in others if key(name) == key(first) or holders[key(name)] == 1]
        zh = [name for name in chinese[item.id] if holders_zh[key(name)] == 1]
        named = bool(zh) and zh[0] == chinese[item.id][0]
        result[item.id] = Names(first, tuple(others), zh[0] if named else None, tuple(zh[1:]) if named else ())
    return result


def english_names(item: Item) -> list[str]:
    """The exact name first, then aliases, the names of identical glyphs, and rewordings; without repetition."""
    names = [clean(name) for name in item.names]
    aliases = [alias for alias in map(clean, item.aliases) if ALIAS.match(alias) and alias not in REFUSED]
    if FLAG.match(item.id):
        forms = [f"flag of {name}" for name in names] + [f"{name} flag" for name in names]
        forms += [f"flag of the {name}" for name in names if WITH_THE.search(name)]
        names = forms + [alias for alias in aliases if alias.startswith("flag for ")]
    else:
        names = names + aliases + [form for name in names for form in rewordings(name)]
    names += [name.replace(" & ", " and ") for name in names] + [names[0].lower()]
    return list(dict.fromkeys(names))


def rewordings(name: str) -> list[str]:
    """Other ways to say skin tones and hair: "a dark skinned person with white hair"."""
    tones = TONE.findall(name)
    plain = TONE.sub("", name)
    hair = HAIR.match(plain)
    if hair:
        plain = f"{hair[1]} with {'a beard' if hair[2] == 'beard' else hair[2]}"
    elif plain.endswith(" bald"):
        plain = f"bald {plain.removesuffix(' bald')}"
    if not tones:
        return [plain]
    if len(tones) == 1:
        joint = "and" if " with " in plain else "with"
        tone = f"{tones[0]} skin tone"
        return [f"{plain} {joint} {tone}", f"{tones[0]} skinned {plain}", f"{plain}, {tone}"]
    both = f"{tones[0]} and {tones[1]} skin tones"
    return [f"{plain} with {both}", f"{plain}, {both}"]


def chinese_names(item: Item) -> list[str]:
    names = [clean(name) for name in item.names_zh if name]
    if FLAG.match(item.id):
        return [f"{name}旗" for name in names] + [f"{name}的旗帜" for name in names]
    toned = [TONE_ZH.sub(r"\2的\1", name) for name in names]
    return list(dict.fromkeys(names + toned))


def with_article(name: str, adjective: str = "") -> str:
    """ "a hot dog", "an ear", but "open hands"; the adjective goes between: "a small ear"."""
    phrase = f"{adjective} {name}".strip()
    head = HEAD_ENDS.sub("", TONE.sub("", name))
    if PLURAL.match(head) and not PEOPLE.match(head):
        return phrase
    return f"an {phrase}" if VOWEL_SOUND.match(phrase) else f"a {phrase}"


def noun(names: Names, random: Random) -> str:
    """An English way to name the item inside a longer caption: half exact, half with an article or another name."""
    draw = random.random()
    if draw < 0.5:
        return names.en
    if draw < 0.75 or not names.en_other:
        return random.choice((with_article(names.en), with_article(names.en), f"the {names.en}"))
    other = random.choice(names.en_other)
    return random.choice((other, with_article(other)))


def noun_zh(names: Names, random: Random) -> str | None:
    return random.choice((names.zh, *names.zh_other)) if names.zh else None


def plain_captions(names: Names, random: Random) -> list[str]:
    exact, article = names.en, with_article(names.en)
    common = [article, f"the {exact}", f"a picture of {article}", f"a drawing of {article}", f"emoji {exact}"]
    others = [form for other in names.en_other for form in (other, with_article(other))]
    chosen = random.sample(common, 2) + random.sample(others, 1) if others else random.sample(common, 3)
    if len(others) > 2 and random.random() < 0.5:
        chosen[0] = random.choice(others)
    if names.zh is None:
        return [exact] * 4 + chosen + [article]
    forms = [f"一个{names.zh}", f"{names.zh}的图片", f"{names.zh}表情", *names.zh_other, *names.zh_other]
    return [exact] * 3 + chosen[:2] + [names.zh] * 3 + [random.choice(forms)]


def background_captions(names: Names, colour: str, random: Random) -> list[str]:
    background = f"{with_article(colour)} background"
    captions = [f"{noun(names, random)} on {background}" for _ in range(4)]
    captions += [f"{noun(names, random)} with {background}", f"a picture of {with_article(names.en)} on {background}"]
    zh = noun_zh(names, random)
    if zh:
        captions += [f"{COLOURS_ZH[colour]}背景上的{names.zh}", f"{zh}，{COLOURS_ZH[colour]}背景"]
    return captions


def position_captions(names: Names, place: str, random: Random) -> list[str]:
    where = PLACES_EN[place]
    bare = [names.en, names.en, *names.en_other]
    small = [with_article(random.choice(bare), "small") for _ in range(4)]
    captions = [f"{small[0]} {where[0]}", f"{small[1]} {where[0]}", f"{small[2]} {where[1]}", f"{small[3]} {where[2]}"]
    captions.append(f"small {names.en} {random.choice(where)}")
    captions.append(f"{with_article(random.choice(bare), 'little')} {random.choice(where)}")
    zh = noun_zh(names, random)
    if zh:
        captions += [f"{PLACES_ZH[place]}的小{names.zh}", f"{PLACES_ZH[place]}有一个小小的{zh}"]
    return captions


def pair_captions(first: Names, second: Names, beside: bool, random: Random) -> list[str]:
    """`first` stands left of `second` where `beside`, else above it."""

    def say(before: Names, relation: str, after: Names) -> str:
        return f"{noun(before, random)} {relation} {noun(after, random)}"

    if beside:
        captions = [say(first, "next to", second), say(first, "left of", second), say(second, "right of", first)]
        captions += [say(first, "next to", second), say(first, "left of", second), say(second, "right of", first)]
    else:
        captions = [say(first, "above", second), say(first, "on top of", second), say(second, "below", first)]
        captions += [say(first, "above", second), say(first, "on top of", second), say(second, "below", first)]
    zh, other = noun_zh(first, random), noun_zh(second, random)
    if zh and other:
        if beside:
            forms = [f"{zh}在{other}左边", f"{other}在{zh}右边", f"{zh}和{other}"]
        else:
            forms = [f"{zh}在{other}上面", f"{other}在{zh}下面", f"{other}上面的{zh}"]
        captions += random.sample(forms, 2)
    return captions
