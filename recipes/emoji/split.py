"""What is never trained on: a fixed split by held-out combinations, as pure functions of the sequences.

`bucket(text)` is the first 8 hexadecimal digits of SHA-256 as an integer, modulo 100; `b` is an item's base (its
sequence without skin tones and FE0F).

tone        a one-tone variant with bucket("tone:" + id) < 10 whose base has an untoned glyph, except couples, kisses,
            people holding hands and handshakes
tone2       a two-tone variant with bucket("tone2:" + id) < 10
gender      one gender of a role in all its tones: bucket("gender:" + b) < 6. A role is what remains of a sequence
            when the man, woman or person that leads it (1F468, 1F469, 1F9D1) or the sign that marks it (2642, 2640)
            is taken away; beside the marked forms, the unmarked one ("person running") is the role's person.
            Couples and families are no roles. A role loses one gender at most, the one that sorts first.
colour      six coloured shapes
background  (item, colour) with bucket("bg:" + b + ":" + colour) < 10
position    (item, place) with bucket("pos:" + b + ":" + place) < 10
pair        two items with bucket("pair:" + b1 + ":" + b2) < 10, b1 < b2

Where an item falls under several of the first four, gender comes before tone. Everything else trains.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

from glyphs import Item

LEADS = frozenset({"1F468", "1F469", "1F9D1"})  # man, woman, person
MARKS = frozenset({"2642", "2640"})  # male sign, female sign
PEOPLE = LEADS | {"1F466", "1F467", "1F9D2", "1F476"}  # and boy, girl, child, baby
ZERO_WIDTH_JOINER = "200D"
HELD_OUT_SHAPES = {  # purple circle, green heart, orange square, brown heart, blue square, yellow circle
    "1F7E3": "colour",
    "1F49A": "colour",
    "1F7E7": "colour",
    "1F90E": "colour",
    "1F7E6": "colour",
    "1F7E1": "colour",
}
COUPLES = ("couple", "kiss", "holding_hands", "handshake")
PLACES = ("top left", "top right", "bottom left", "bottom right", "center")


def bucket(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 100


def split_items(items: Sequence[Item]) -> dict[str, str]:
    """Item id -> "train", "tone", "tone2", "gender" or "colour"."""
    held_out_genders = genders_held_out({item.base for item in items})
    untoned = {item.base for item in items if item.tones == 0}
    split = {}
    for item in items:
        couple = any(word in item.names[0] for word in COUPLES)
        if item.base in HELD_OUT_SHAPES:
            split[item.id] = "colour"
        elif item.base in held_out_genders:
            split[item.id] = "gender"
        elif item.tones == 2 and bucket(f"tone2:{item.id}") < 10:
            split[item.id] = "tone2"
        elif item.tones == 1 and item.base in untoned and not couple and bucket(f"tone:{item.id}") < 10:
            split[item.id] = "tone"
        else:
            split[item.id] = "train"
    return split


def genders_held_out(bases: set[str]) -> set[str]:
    """The bases that are held out, one per role at most."""
    roles: dict[tuple[str, ...], set[str]] = {}
    for base in bases:
        role = role_of(base)
        if role:
            roles.setdefault(role, set()).add(base)
    for base in bases:  # the unmarked form is the person of a role that has marked ones
        codes = tuple(code for code in base.split() if code != ZERO_WIDTH_JOINER)
        if codes in roles and codes[0] not in LEADS:
            roles[codes].add(base)
    chosen = (sorted(base for base in members if bucket(f"gender:{base}") < 6) for members in roles.values())
    return {hit[0] for hit in chosen if hit}


def role_of(base: str) -> tuple[str, ...] | None:
    """A gendered sequence without its gender: ("led", "1F680") or, marked, ("1F3C3",); None where nothing tells it."""
    codes = [code for code in base.split() if code != ZERO_WIDTH_JOINER]
    rest = tuple(code for code in codes if code not in MARKS)
    if codes[0] in LEADS:
        alone = not any(code in PEOPLE for code in codes[1:])
        return ("led", *codes[1:]) if alone else None
    return rest if len(rest) < len(codes) else None


def background_held_out(base: str, colour: str) -> bool:
    return bucket(f"bg:{base}:{colour}") < 10


def position_held_out(base: str, place: str) -> bool:
    return bucket(f"pos:{base}:{place}") < 10


def pair_held_out(base: str, other: str) -> bool:
    first, second = sorted((base, other))
    return bucket(f"pair:{first}:{second}") < 10


def item_weights(items: Sequence[Item]) -> dict[str, float]:
    """Item id -> n^-1/2, n the number of tone variants of its base: people do not crowd out things."""
    variants = Counter(item.base for item in items)
    return {item.id: variants[item.base] ** -0.5 for item in items}
