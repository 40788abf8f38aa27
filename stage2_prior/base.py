"""The contract of a prior: a distribution over an image's codes given a condition.

Letters: B batch, P prefix, T codes per image (Q·h·w, row by row, the codebooks of a position together), K codebook
size, E width. A prefix is whatever stands for the condition, one row an image: for the GPT, text ids (B, P) int64; for
a prior that reads another model's features, those (B, P, ...). A condition is a text, a class label or the codes of a
segmentation map; a prior reads the kind that it was trained on, and refuses others.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from stage2_prior.upgrade import upgrade
from tessera.config import Config, Origin
from tessera.errors import InputError
from tessera.text import FILE, TextTokenizer
from tessera.weights.folder import save_pretrained


class PromptTooLong(InputError):
    """A text has more tokens than the prior reads; the only fault of a prompt that cutting it mends."""


Condition = Literal["text", "class", "segmentation", "none"]
CONDITIONS: dict[Condition, str] = {
    "text": "text", "class": "class labels", "segmentation": "segmentation maps", "none": "no condition"
}  # fmt: skip


def flatten_codes(codes: Tensor) -> Tensor:
    """The grid of an image as the sequence that a prior reads: (B, Q, h, w) -> (B, T)."""
    return rearrange(codes, "b q h w -> b (h w q)")


def unflatten_codes(sequence: Tensor, code_shape: tuple[int, int, int]) -> Tensor:
    """The inverse of `flatten_codes`, what an image tokenizer decodes: (B, T) -> (B, Q, h, w)."""
    codebooks, height, _ = code_shape
    return rearrange(sequence, "b (h w q) -> b q h w", q=codebooks, h=height)


class Cache(ABC):
    """What a prior remembers of the positions it has seen; one row for each sequence."""

    @abstractmethod
    def repeat(self, rows: Tensor) -> "Cache":
        """The cache whose row i is this one's row `rows[i]`, (N,) int64."""


class PriorConfig(Config):
    """What the config of every prior says; each adds its sizes, and fixes its `type`."""

    type: str
    codebook_size: int = Field(1024, ge=2)  # K
    code_shape: tuple[int, int, int] = (1, 16, 16)  # Q, h, w of an image
    image_tokenizer_fingerprint: str = ""  # of the codes and the text it was trained on
    text_tokenizer_fingerprint: str = ""
    segmentation_tokenizer_fingerprint: str = ""  # of the tokenizer whose codes stand for a segmentation map
    condition_dropout: float | None = Field(None, ge=0, lt=1)  # it was trained with; None: not recorded
    origin: Origin | None = None  # of converted weights; null for those trained here


class Predictions(NamedTuple):
    text: Tensor | None  # (B, P - 1, V) logits of the text tokens after the first; None where text is not predicted
    codes: Tensor  # (B, T, K) logits of the image codes


class Prior(nn.Module, ABC):
    config: PriorConfig
    condition: Condition = "text"  # what it was trained to draw from
    supports_guidance: bool = True  # it was trained with condition dropout, so that guidance has a null to steer from
    text_tokenizer: TextTokenizer | None
    code_shape: tuple[int, int, int]  # Q, h, w
    num_codebooks: int  # Q
    length: int  # T
    codebook_size: int  # K
    prefix_length: int  # P

    def __init__(self, config: PriorConfig, text_tokenizer: TextTokenizer | None = None) -> None:
        super().__init__()
        self.config, self.text_tokenizer = config, text_tokenizer
        self.code_shape, self.length = config.code_shape, math.prod(config.code_shape)
        self.num_codebooks, self.codebook_size = config.code_shape[0], config.codebook_size
        self.register_load_state_dict_pre_hook(upgrade)

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, max_shard_size: str = "5GB"
    ) -> None:
        """Writes config, weights and, if there is one, the text tokenizer, so that the prior loads alone."""
        texts = {} if self.text_tokenizer is None else {FILE: self.text_tokenizer.to_json(pretty=True)}
        save_pretrained(self, self.config, folder, dtype=dtype, max_shard_size=max_shard_size, texts=texts)

    def prefix(
        self,
        text: Sequence[str] | None = None,
        *,
        classes: Sequence[int] | None = None,
        segmentation: Tensor | None = None,
    ) -> Tensor:
        """The prefix of each text, of each class label, or of the codes (B, Q, h, w) of each segmentation map: (B, P).

        Of a prior that was trained without any, the one prefix that there is, (1, P). Raises InputError unless what is
        given is one condition, of the kind that the prior was trained on and that it has room for.
        """
        values: dict[Condition, object] = {"text": text, "class": classes, "segmentation": segmentation}
        given = [name for name, value in values.items() if value is not None] or ["none"]
        if given != [self.condition]:
            wrong = " and ".join(CONDITIONS[name] for name in given)
            raise InputError(f"this prior draws from {CONDITIONS[self.condition]} and was given {wrong}")
        if text is not None:
            return self.text_prefix(text)
        if classes is not None:
            return self.class_prefix(classes)
        return self.null_prefix(1) if segmentation is None else self.segmentation_prefix(segmentation)

    # Of these a prior has those of the kind that its `condition` names; `prefix` asks for no others.

    def text_prefix(self, text: Sequence[str]) -> Tensor:
        """(B, P). Raises PromptTooLong when a text has more tokens than the prior reads."""
        raise NotImplementedError

    def pad(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Ids of the text tokenizer, those of each text -> (B, P); what does not fit is cut off."""
        raise NotImplementedError

    def class_prefix(self, classes: Sequence[int]) -> Tensor:
        """(B, P). Raises InputError when a label is none of the prior's classes."""
        raise NotImplementedError

    def class_number(self, name: str) -> int:
        """The number of the class of that name; here every class is called by its number. InputError for another."""
        if re.fullmatch(r"\d{1,9}", name) is None:
            raise InputError(f"this prior draws from class labels, say --class 0 or 'class 0', got '{name:.60}'")
        return int(name)

    def segmentation_prefix(self, segmentation: Tensor) -> Tensor:
        """Codes (B, Q, h, w) int64 -> (B, P). Raises InputError when they are not of a map of its size."""
        raise NotImplementedError

    @abstractmethod
    def null_prefix(self, rows: int) -> Tensor:
        """The prefix of no condition at all, (rows, P)."""

    def unconditional(self, prefix: Tensor) -> Tensor:
        """What guidance steers away from: one prefix for all of `prefix` (R, P), or one for each of its rows.

        Raises InputError for a prior that was never trained without its condition.
        """
        if not self.supports_guidance:
            raise InputError(
                f"this prior was never trained without its {self.condition}, so there is nothing to guide away from; "
                "use a guidance_scale of 1"
            )
        return self.null_prefix(1).to(prefix.device)

    @abstractmethod
    def forward(self, prefix: Tensor, codes: Tensor) -> Tensor:
        """Teacher-forced: prefix (B, P), codes (B, T) -> logits (B, T, K); logits t depend on codes before t only."""

    def predict(self, prefix: Tensor, codes: Tensor) -> Predictions:
        """Teacher-forced logits of the text, where the prior has a say on it, and of the codes: as `forward`."""
        return Predictions(None, self(prefix, codes))

    @abstractmethod
    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, Cache]:
        """Prefix (R, P) -> logits of the first code (R, K), and a cache with room for `length` further codes."""

    @abstractmethod
    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        """The codes (N,) just sampled -> logits of the next ones (N, K); the cache grows by one position."""

    def grid(self, sequence: Tensor) -> Tensor:
        """What was drawn (N, T) -> the codes of whole images (N, Q, h, w)."""
        return unflatten_codes(sequence, self.code_shape)

    @abstractmethod
    def cache_numbers(self) -> int:
        """How many numbers the cache of one whole sequence holds."""


def prompt_tokens(tokenizer: TextTokenizer | None, text: Sequence[str], room: int) -> list[list[int]]:
    """The ids of each text. Raises InputError when there is no tokenizer, PromptTooLong for more ids than `room`."""
    if tokenizer is None:
        raise InputError("this prior has no text tokenizer; load it with load_prior(folder, text_tokenizer)")
    tokens = [tokenizer.encode(one) for one in text]
    for ids in tokens:
        if len(ids) > room:
            raise PromptTooLong(f"the prompt has {len(ids)} tokens, the prior reads at most {room}; shorten it")
    return tokens


def class_labels(classes: Sequence[int], num_classes: int, device: torch.device) -> Tensor:
    """The labels as a prefix (B, 1) int64. Raises InputError for one that is not in [0, num_classes)."""
    for label in classes:
        if not 0 <= label < num_classes:
            raise InputError(f"class labels must be in [0, {num_classes}), got {label}")
    return torch.tensor(list(classes), dtype=torch.int64, device=device).view(-1, 1)
