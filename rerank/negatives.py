"""Wrong captions that nearly fit: what a reranker has to tell from the right one.

In a batch drawn at random one word gives most captions away, and a CLIP learns to read little more (Yuksekgonul et al.
2023, "When and why vision-language models behave like bags-of-words"). As there, captions that differ in a detail are
put beside the right one; here they are made of the captions of the batch, so that no parser of a language is needed.
"""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np

WORD = re.compile(r"\s*(?:[\u3400-\u9fff]|[\w-]+|\S)")  # with the space before it; a Chinese character is a word
LOOKED_AT = 192  # captions that one is compared with, to find one of its kind


def recombined(captions: Sequence[str], random: np.random.Generator) -> list[str]:
    """For each caption another that shares its frame and not its content, of the same words as those of the batch.

    Where a caption and the one most like it differ, one difference is taken over ("a cat above a dog" beside "a cup
    above a pear" becomes "a cup above a dog") or two of its own change places ("a dog above a cat"). Without a likeness
    it is another caption of the batch; where all are the same, the caption itself.
    """
    words = [WORD.findall(caption) for caption in captions]
    bare = [[word.strip() for word in sentence] for sentence in words]
    bags = [set(sentence) for sentence in bare]
    wrong = []
    for i, caption in enumerate(captions):
        others = [int(j) for j in random.permutation(len(captions)) if captions[j] != caption][:LOOKED_AT]
        if not others:
            wrong.append(caption)
            continue
        near = max(others, key=lambda j: len(bags[i] & bags[j]) / len(bags[i] | bags[j]))
        wrong.append(_crossed(words[i], words[near], bare[i], bare[near], random) or captions[near])
    return wrong


def _crossed(
    own: list[str], other: list[str], own_bare: list[str], other_bare: list[str], random: np.random.Generator
) -> str | None:
    """`own` with one of its differences to `other` taken over or two exchanged; None where that changes nothing."""
    blocks = SequenceMatcher(None, own_bare, other_bare, autojunk=False).get_opcodes()
    slots = [(a, b, c, d) for kind, a, b, c, d in blocks if kind == "replace"]
    ways = [own[:a] + _spaced(other[c:d], own[a]) + own[b:] for a, b, c, d in slots]
    for (a, b, _, _), (c, d, _, _) in zip(slots, slots[1:], strict=False):
        ways.append(own[:a] + _spaced(own[c:d], own[a]) + own[b:c] + _spaced(own[a:b], own[c]) + own[d:])
    texts = [text for text in ("".join(way).strip() for way in ways) if text != "".join(own).strip()]
    return texts[int(random.integers(len(texts)))] if texts else None


def _spaced(words: list[str], place: str) -> list[str]:
    """The words with the space that the word at their new place has before it."""
    space = place[: len(place) - len(place.lstrip())]
    return [space + words[0].lstrip(), *words[1:]]
