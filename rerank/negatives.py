"""Wrong captions that are nearly right: what a reranker has to learn to tell from the right one.

In a random batch one word identifies most captions, and a CLIP learns to read little more (Yuksekgonul et al. 2023,
"When and why vision-language models behave like bags-of-words"). As there, each caption gets a wrong one that differs
in a detail; here it is made from the captions of the batch, which needs no parser of a language.
"""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np

WORD = re.compile(r"\s*(?:[\u3400-\u9fff]|[\w-]+|\S)")  # with the space before it; a Chinese character is a word
COMPARED = 192  # captions that each is compared with, at most


def recombined(captions: Sequence[str], random: np.random.Generator) -> list[str]:
    """For each caption a wrong one of the same form and other content, from the words of the batch.

    Of the differences to the most similar caption one is copied ("a cat above a dog" beside "a cup above a pear"
    becomes "a cup above a dog"), or two change places ("a dog above a cat"). Without a similar one it is another
    caption of the batch; the caption itself where all are the same.
    """
    words = [WORD.findall(caption) for caption in captions]
    bare = [[word.strip() for word in sentence] for sentence in words]
    bags = [set(sentence) for sentence in bare]
    wrong = []
    for i, caption in enumerate(captions):
        others = [int(j) for j in random.permutation(len(captions)) if captions[j] != caption][:COMPARED]
        if not others:
            wrong.append(caption)
            continue
        nearest = max(others, key=lambda j: len(bags[i] & bags[j]) / len(bags[i] | bags[j]))
        wrong.append(_crossed(words[i], words[nearest], bare[i], bare[nearest], random) or captions[nearest])
    return wrong


def _crossed(
    words: list[str], other: list[str], bare: list[str], other_bare: list[str], random: np.random.Generator
) -> str | None:
    """`words` with one difference to `other` copied from it, or two exchanged; None where that changes nothing."""
    blocks = SequenceMatcher(None, bare, other_bare, autojunk=False).get_opcodes()
    slots = [(a, b, c, d) for kind, a, b, c, d in blocks if kind == "replace"]
    variants = [words[:a] + _spaced(other[c:d], words[a]) + words[b:] for a, b, c, d in slots]
    for (a, b, _, _), (c, d, _, _) in zip(slots, slots[1:], strict=False):
        exchanged = _spaced(words[c:d], words[a]) + words[b:c] + _spaced(words[a:b], words[c])
        variants.append(words[:a] + exchanged + words[d:])
    texts = [text for text in ("".join(variant).strip() for variant in variants) if text != "".join(words).strip()]
    return texts[int(random.integers(len(texts)))] if texts else None


def _spaced(words: list[str], replaced: str) -> list[str]:
    """The words with the space before the word that they replace."""
    space = replaced[: len(replaced) - len(replaced.lstrip())]
    return [space + words[0].lstrip(), *words[1:]]
