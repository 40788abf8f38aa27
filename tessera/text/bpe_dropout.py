"""BPE dropout (Provilkov et al. 2020): a text is cut into tokens another way every time, so a prior learns what the
parts of a word mean and not only the whole.

The tokenizers library has it too, but with a generator that cannot be seeded; training that resumes after a stop must
see the very cuts that it would have seen.
"""

import json
from random import Random

from tokenizers import Tokenizer

from tessera.errors import InputError


class DroppingBPE:
    """The merges of a byte-level BPE tokenizer, applied with gaps."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises InputError unless it is byte-level BPE, where any string of bytes has tokens."""
        model = json.loads(tokenizer.to_str())["model"]
        if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("byte_fallback"):
            raise InputError("bpe_dropout needs a text tokenizer with byte-level BPE; set it to 0 for this one")
        self._tokenizer, self._suffix = tokenizer, model.get("end_of_word_suffix") or ""
        self._ids: dict[str, int] = model["vocab"]
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}

    def encode(self, text: str, dropout: float, random: Random) -> list[int]:
        """Ids of a text of which each merge is left out with probability `dropout` each time it could be made."""
        tokenizer = self._tokenizer
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        words = [text]
        if tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        symbols = [symbol for word in words if word for symbol in self._cut(word, dropout, random)]
        missing = next((symbol for symbol in symbols if symbol not in self._ids), None)
        if missing is not None:
            raise InputError(
                f"bpe_dropout needs byte-level BPE, and this tokenizer has no token '{missing}'; set it to 0"
            )
        return [self._ids[symbol] for symbol in symbols]

    def _cut(self, word: str, dropout: float, random: Random) -> list[str]:
        """Algorithm 1: of the merges that are possible and not dropped this time, the one learned first is made."""
        symbols = [*word[:-1], word[-1] + self._suffix]
        while True:
            best = None  # (rank, place)
            for place in range(len(symbols) - 1):
                rank = self._ranks.get((symbols[place], symbols[place + 1]))
                if rank is None or (dropout and random.random() < dropout):
                    continue
                if best is None or rank < best[0]:
                    best = (rank, place)
            if best is None:
                return symbols
            place = best[1]
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
