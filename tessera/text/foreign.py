"""Text tokenizers of other projects made ours: any `tokenizer.json` of transformers' layout, and CLIP's own BPE.

Their words, merges and normalisation stay; their ids move up by three, for ids 0, 1 and 2 are <pad>, <start> and <end>
here. Start, end and padding tokens that they would add themselves, and lengths that they would cut at, are left out:
a prior sees to both.
"""

import gzip
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

CLIP_VOCABULARY = 49408  # with its start and end
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def adopt(content: dict[str, Any], specials: list[str]) -> dict[str, Any]:
    """The content of a foreign `tokenizer.json` with `specials` in front of all its ids."""
    model, shift, normalizer = dict(content["model"]), len(specials), content.get("normalizer")
    # A foreign token of the same name keeps its id and gets another name; it stands for nothing in a text.
    names = {special: f"foreign {special}" for special in specials}
    if isinstance(model["vocab"], dict):
        ours = {names.get(token, token): i + shift for token, i in model["vocab"].items()}
        model["vocab"] = {special: i for i, special in enumerate(specials)} | ours
    else:  # Unigram: pieces with their scores, the place of each is its id
        pieces = [[names.get(token, token), score] for token, score in model["vocab"]]
        lowest = min(score for _, score in pieces)
        model["vocab"] = [[special, lowest] for special in specials] + pieces
        model["unk_id"] = None if model.get("unk_id") is None else model["unk_id"] + shift
    if model.get("type", "BPE") != "BPE":  # other kinds would read a special that is written in a text as the special
        apart = [
            {"type": "Replace", "pattern": {"String": special}, "content": f"{special[:-1]} {special[-1]}"}
            for special in specials
        ]
        normalizer = {"type": "Sequence", "normalizers": [normalizer, *apart] if normalizer else apart}
    added = [
        {**token, "id": token["id"] + shift, "content": names.get(token["content"], token["content"])}
        for token in content.get("added_tokens") or []
    ]
    return {
        **content,
        "normalizer": normalizer,
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "added_tokens": [_special(special, i) for i, special in enumerate(specials)] + added,
        "model": model,
    }


def clip_tokenizer() -> Tokenizer:
    """CLIP's BPE (Radford et al. 2021, section 2.4), lower case, from the merges that open_clip ships."""
    import open_clip

    path = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    letters = _byte_letters()
    words = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for line in lines[1 : 1 + CLIP_VOCABULARY - len(words) - 2]:
        first, second = line.split()
        merges.append((first, second))
    words += [first + second for first, second in merges] + ["<start_of_text>", "<end_of_text>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("</w>", " "), decoders.ByteLevel()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<start_of_text>", "<end_of_text>")])
    return tokenizer


def as_json(tokenizer: Tokenizer) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    return content


def _byte_letters() -> list[str]:
    """The letter that stands for each byte, in the order of CLIP's vocabulary: printable ones first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [chr(256 + i) for i in range(256 - len(printable))]
    return [chr(byte) for byte in printable] + others


def _special(content: str, number: int) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"id": number, "content": content, **plain}
