"""Text as byte-level BPE: lossless on any UTF-8, trained on captions, one `tokenizer.json` of the tokenizers library.

Ids 0, 1 and 2 are <pad>, <start> and <end>; every byte has a token, so no text is unknown. Lossless is up to what can
be seen: a text is normalised first (`normalization.py`), so that it reads the same however it was typed. How is written
in the file, so tokenizers trained before read as they did, with NFC alone.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tessera.errors import InputError
from tessera.paths import expand
from tessera.text.bpe_dropout import DroppingBPE
from tessera.text.foreign import adopt, as_json, clip_tokenizer
from tessera.text.normalization import normalizer, sees_only_the_visible
from tessera.weights.writing import replacing, write_text

PAD, START, END = 0, 1, 2
SPECIALS = ["<pad>", "<start>", "<end>"]
FILE = "tokenizer.json"
CLIP = "clip"  # the name of CLIP's own tokenizer
MAX_TOKEN_BYTES = 16  # keeps other scripts without spaces, kana and Thai, from merging into clauses
# Nothing parts the words of Chinese, and merges learned across them make tokens of what stands side by side often. A
# token of two characters would be a word or the end of one and the start of the next, by where a run is cut; so each
# character is cut off alone (as for BERT, Devlin et al. 2019), the same wherever it stands, and the prior learns words.
HAN = Regex(r"\p{Han}")


class TextTokenizer:
    """Text to ids and back. Equal training text gives byte-identical tokenizers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, lower_case: bool = False) -> "TextTokenizer":
        """Learns merges (Sennrich et al. 2016) on normalised text, in lower case on request.

        Small corpora may yield fewer than `vocab_size` tokens.
        """
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if vocab_size < len(alphabet) + len(SPECIALS):
            raise InputError(f"vocab_size must be at least {len(alphabet) + len(SPECIALS)} (bytes and specials)")
        tokenizer = Tokenizer(models.BPE())
        # With one space in front, so that a word is the same wherever it stands; `decode` takes it away again.
        tokenizer.normalizer = normalizer(lower_case)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(HAN, behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIALS,
            initial_alphabet=alphabet,
            max_token_length=MAX_TOKEN_BYTES,
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "TextTokenizer":
        """Reads `folder/tokenizer.json`, ours or one of transformers' layout; "clip" is CLIP's own tokenizer.

        Ids of foreign ones move up by three (`foreign_text.py`). Raises InputError when the file is missing or broken.
        """
        if str(folder) == CLIP and not Path(folder).exists():
            return cls(_adopted(clip_tokenizer()))
        path = expand(folder) / FILE
        if not path.is_file():
            raise InputError(f"{folder} has no {FILE}; give a folder written by tessera train text-tokenizer")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path} cannot be read ({error}); restore the file") from None
        ours = [tokenizer.token_to_id(special) for special in SPECIALS] == [PAD, START, END]
        return cls(tokenizer if ours else _adopted(tokenizer))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `folder/tokenizer.json`, whole or not at all; whatever else is there stays."""
        with replacing(folder) as part:
            write_text(part / FILE, self.to_json(pretty=True))

    @property
    def vocab_size(self) -> int:
        return max(self._tokenizer.get_vocab().values()) + 1  # foreign ids may have gaps

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]

    def encode(self, text: str, dropout: float = 0.0, random: Random | None = None) -> list[int]:
        """Ids without specials or padding; a `<pad>` written in the text is text, not padding.

        `dropout` leaves each merge out with that probability, drawn by `random` (`bpe_dropout.py`).
        """
        if dropout:
            return self._dropping.encode(text, dropout, random or Random())
        self._tokenizer.encode_special_tokens = True
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """How many ids `encode` gives for each text."""
        self._tokenizer.encode_special_tokens = True
        return [len(one.ids) for one in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text behind `ids` (normalised, with the leading space that word-initial tokens carry removed)."""
        text: str = self._tokenizer.decode([i for i in ids if i > END])
        return text.removeprefix(" ")

    def visible(self, text: str) -> str:
        """What is read of a text, as one that gives the same ids. Tokenizers that record no such rule give it back."""
        if not sees_only_the_visible(self.to_json()):
            return text
        normalized: str = self._tokenizer.normalizer.normalize_str(text)
        return normalized.removeprefix(" ")

    def to_json(self, pretty: bool = False) -> str:
        """The content of `tokenizer.json`, as it is written where it is `pretty`."""
        text: str = self._tokenizer.to_str(pretty=pretty)
        return text

    @cached_property
    def _dropping(self) -> DroppingBPE:
        return DroppingBPE(self._tokenizer)


def _adopted(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(adopt(as_json(tokenizer), SPECIALS)))
