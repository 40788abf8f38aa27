"""What a prior's text length cuts off, language by language: a text tokenizer that saw little of a language writes it
with more tokens, so that its captions are the first to lose their ends.

A caption's language is told by its script, that of most of its letters: Han is Chinese, unless there are kana
(Japanese); Hangul is Korean; the others go by the script's own name ("Latin", "Cyrillic", "Arabic"), and "no letters".
"""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import NamedTuple

from tessera.text import TextTokenizer

MOST_CAPTIONS = 100_000  # so many, drawn at random, are counted where there are more


class Truncation(NamedTuple):
    captions: int
    cut: int  # how many of them have more tokens than there is room for
    longest: int  # tokens


def truncation(tokenizer: TextTokenizer, captions: Sequence[str], text_length: int) -> dict[str, Truncation]:
    """What of each language is cut at `text_length` positions, of which <start> takes one; most captions first."""
    lengths: dict[str, list[int]] = defaultdict(list)
    counted = captions if len(captions) <= MOST_CAPTIONS else Random(0).sample(captions, MOST_CAPTIONS)
    for caption, length in zip(counted, tokenizer.lengths(counted), strict=True):
        lengths[language(caption)].append(length)
    found = {
        name: Truncation(len(own), sum(length > text_length - 1 for length in own), max(own))
        for name, own in lengths.items()
    }
    return dict(sorted(found.items(), key=lambda entry: -entry[1].captions))


def describe(found: dict[str, Truncation], text_length: int) -> str:
    """One line: "captions cut at 24 tokens: Latin 1.2 % of 900 (longest 31), Chinese 0 % of 300 (longest 20)"."""
    parts = [
        f"{name} {one.cut / one.captions:.2%} of {one.captions:,} (longest {one.longest})"
        for name, one in found.items()
    ]
    return f"captions cut at {text_length} tokens, <start> among them: {', '.join(parts) or 'there are none'}"


def language(text: str) -> str:
    scripts = Counter(_script(letter) for letter in text if letter.isalpha())
    if not scripts:
        return "no letters"
    kana = scripts["Hiragana"] + scripts["Katakana"]
    if kana:  # Japanese writes its nouns in Han as well
        scripts["Japanese"] = kana + scripts["Chinese"]
        scripts["Hiragana"] = scripts["Katakana"] = scripts["Chinese"] = 0
    return scripts.most_common(1)[0][0]


@lru_cache(maxsize=100_000)
def _script(letter: str) -> str:
    """The first word of the letter's Unicode name, as a language where only one writes so."""
    first = unicodedata.name(letter, "UNKNOWN").split()[0]
    return {"CJK": "Chinese", "HANGUL": "Korean"}.get(first, first.capitalize())
