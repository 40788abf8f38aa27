"""Text as byte-level BPE: lossless on any UTF-8, trained on captions, one `tokenizer.json` of the tokenizers library.

Ids 0, 1 and 2 are <pad>, <start> and <end>; every byte has a token, so no text is unknown.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from common.errors import InputError
from common.weights import new_folder

PAD, START, END = 0, 1, 2
SPECIALS = ["<pad>", "<start>", "<end>"]
FILE = "tokenizer.json"
MAX_TOKEN_BYTES = 16  # keeps Chinese, which has no spaces, from merging into whole clauses


class TextTokenizer:
    """Text to ids and back. Equal training text gives byte-identical tokenizers."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "TextTokenizer":
        """Learns merges (Sennrich et al. 2016) on NFC text; small corpora may yield fewer than `vocab_size` tokens."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if vocab_size < len(alphabet) + len(SPECIALS):
            raise InputError(f"vocab_size must be at least {len(alphabet) + len(SPECIALS)} (bytes and specials)")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
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
        """Reads `folder/tokenizer.json`. Raises InputError when it is missing, broken or not one of ours."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise InputError(f"{folder} has no {FILE}; give a folder written by tessera train text-tokenizer")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{path} cannot be read ({error}); restore the file") from None
        if [tokenizer.token_to_id(special) for special in SPECIALS] != [PAD, START, END]:
            raise InputError(f"{path} must have {', '.join(SPECIALS)} as ids 0, 1, 2; train it with tessera")
        return cls(tokenizer)

    def save_pretrained(self, folder: str | Path) -> None:
        with new_folder(folder) as part:
            self.save_into(part)

    def save_into(self, folder: str | Path) -> None:
        """Adds `tokenizer.json` to a folder that exists."""
        self._tokenizer.save(str(Path(folder) / FILE))

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids without specials or padding; a `<pad>` written in the text is text, not padding."""
        self._tokenizer.encode_special_tokens = True
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text behind `ids` (NFC, with the leading space that word-initial tokens carry removed)."""
        text: str = self._tokenizer.decode([i for i in ids if i > END])
        return text.removeprefix(" ")

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        text: str = self._tokenizer.to_str()
        return text
