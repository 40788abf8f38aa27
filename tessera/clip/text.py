"""Texts as a CLIP reads them: a `tokenizer.json` beside the model, used as open_clip's `HFTokenizer` does.

That one goes through transformers; the files that `tessera train reranker` writes, and any others that ask for nothing
else, are read by the tokenizers library alone, which takes a hundredth of the time to import.

open_clip cleans every text first (`clean`), and so did our rerankers, while priors read it as it is. A tokenizer that
records its normalisation of invisible characters (`tessera/text/normalization.py`) is read as the prior reads it,
without cleaning: same text, same ids in both. Its `tokenizer_config.json` says so in `text_cleaning`, a key that
open_clip ignores: with open_clip, curly quotes become straight and wide punctuation becomes narrow, as before.

Letters: M texts, C context length.
"""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, processors
from torch import Tensor

from tessera.config import Config
from tessera.errors import InputError
from tessera.text import END, SPECIALS, TextTokenizer
from tessera.text.normalization import sees_only_the_visible
from tessera.weights.writing import write_json

FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
OVERRULING = ("special_tokens_map.json", "added_tokens.json")  # of older releases of transformers, which reads them too
MOST_WORDS = 100_000  # above, transformers may change how texts are split


class TokenizerConfig(Config):
    """The part of transformers' `tokenizer_config.json` that `FileTokenizer` understands."""

    tokenizer_class: Literal["PreTrainedTokenizerFast", "TokenizersBackend"]
    backend: Literal["tokenizers"] = "tokenizers"
    bos_token: str
    eos_token: str
    pad_token: str
    split_special_tokens: bool = False  # whether an <end> written in a prompt is text
    clean_up_tokenization_spaces: bool = False  # of decoding
    model_max_length: float = 0  # ignored: the model's context length holds
    # `clean` comes before the normalizer of tokenizer.json, as in open_clip; or between two passes of it, for a model
    # that was trained with `clean` and got its normalizer later; or not at all.
    text_cleaning: Literal["before", "between", "none"] = "before"


class FileTokenizer:
    """Texts -> (M, C) int64, truncated or padded; the special tokens at the ends survive truncation."""

    def __init__(self, tokenizer: Tokenizer, config: dict[str, Any], context_length: int) -> None:
        """`config` is the content of `tokenizer_config.json`."""
        self.tokenizer, self.config, self.context_length = tokenizer, config, context_length
        known = TokenizerConfig.model_validate(config)
        self.cleaning = known.text_cleaning
        tokenizer.encode_special_tokens = known.split_special_tokens
        tokenizer.enable_truncation(context_length)
        tokenizer.enable_padding(
            length=context_length, pad_id=tokenizer.token_to_id(known.pad_token), pad_token=known.pad_token
        )

    @classmethod
    def from_folder(cls, folder: Path, context_length: int) -> "FileTokenizer | None":
        """None where the files are broken, or ask for what only transformers does."""
        try:
            config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            known = TokenizerConfig.model_validate(config)
            tokenizer = Tokenizer.from_file(str(folder / FILE))
        except Exception:  # the library raises bare Exception; transformers, which reads them next, says what is wrong
            return None
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        if (
            not {known.bos_token, known.eos_token, known.pad_token} <= special
            or tokenizer.post_processor is None
            or tokenizer.padding
            or tokenizer.truncation
            or tokenizer.get_vocab_size() > MOST_WORDS
            or any((folder / name).exists() for name in OVERRULING)
        ):
            return None
        return cls(tokenizer, config, context_length)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        encoded = self.tokenizer.encode_batch([self._cleaned(text) for text in texts])
        return torch.tensor([text.ids for text in encoded], dtype=torch.long).view(-1, self.context_length)

    def _cleaned(self, text: str) -> str:
        match self.cleaning:
            case "before":
                return clean(text)
            case "between":
                return clean(self.tokenizer.normalizer.normalize_str(text))
            case "none":
                return text

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(tokenizer_content(self), encoding="utf-8")
        write_json(folder / CONFIG_FILE, self.config)


def clean(text: str) -> str:
    """open_clip's cleaning: repaired encodings, no HTML entities, single spaces."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else nothing needs repair
        import ftfy  # builds large tables

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def write_tokenizer(text_tokenizer: TextTokenizer, folder: Path) -> None:
    """The files of a tokenizer that appends the end token, where CLIP pools, to every text."""
    tokenizer = Tokenizer.from_str(text_tokenizer.to_json())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIALS[END]}", special_tokens=[(SPECIALS[END], END)]
    )
    pad, start, end = SPECIALS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": start,
        "eos_token": end,
        "split_special_tokens": True,  # an <end> written in a prompt is text
        "clean_up_tokenization_spaces": False,
    }
    if sees_only_the_visible(text_tokenizer.to_json()):
        config["text_cleaning"] = "none"
    (folder / FILE).write_text(tokenizer.to_str(), encoding="utf-8")
    write_json(folder / CONFIG_FILE, config)


def save_tokenizer(tokenizer: Any, folder: Path) -> bool:
    """Writes the tokenizer's files; False when open_clip's own CLIP tokenizer is used, which needs none."""
    if isinstance(tokenizer, FileTokenizer):
        tokenizer.save(folder)
        return True
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    if isinstance(tokenizer, SimpleTokenizer):
        return False
    if not isinstance(tokenizer, HFTokenizer):
        raise InputError(f"a {type(tokenizer).__name__} cannot be saved beside its model; use the model by its name")
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    for key in ("name_or_path", "is_local", "local_files_only"):  # where it was read from
        config.pop(key, None)
    write_json(folder / CONFIG_FILE, config)
    if (folder / FILE).is_file():
        (folder / FILE).write_text(tokenizer_content(tokenizer), encoding="utf-8")
    return True


def tokenizer_content(tokenizer: Any) -> str:
    """All that decides its tokens, as text, without padding and truncation, which every call sets again."""
    inner = getattr(tokenizer, "tokenizer", None)
    backend = inner if isinstance(inner, Tokenizer) else getattr(inner, "backend_tokenizer", None)
    if backend is None:
        return f"{type(tokenizer).__name__} {tokenizer.context_length}"
    return json.dumps(json.loads(backend.to_str()) | {"padding": None, "truncation": None}, ensure_ascii=False)
