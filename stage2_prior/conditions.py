"""Conditions as rows of ids, which is how the priors that are trained here read them.

    text            <start>, the BPE tokens, <pad> up to the length          null: the empty text
    class           the number of the class                                  null: an id of its own
    segmentation    the codes that another image tokenizer gives the map     null: an id of its own, everywhere
    none            one id, always the same                                  null: the same

The null takes the place of a share of the conditions in training, so that guidance has something to steer away from.

Letters: B batch, P prefix, Q codebooks of the map's tokenizer, K its codebook size, h w its code grid.
"""

import math
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stage2_prior.base import Condition, Prior, PriorConfig, class_labels, flatten_codes, prompt_tokens
from stage2_prior.codes import Codes, CodesBatch
from tessera.errors import InputError, nearest
from tessera.text import PAD, START, TextTokenizer


class ConditionedConfig(PriorConfig):
    """Beside the kind of condition, what its ids are; what belongs to another kind is not looked at."""

    condition: Condition = "text"
    text_vocab_size: int = Field(4096, ge=3)
    text_length: int = Field(64, ge=2)  # P, <start> included
    class_names: tuple[str, ...] = ()  # in the order of their numbers
    segmentation_codebook_size: int | None = Field(None, ge=2)  # K
    segmentation_code_shape: tuple[int, int, int] | None = None  # Q, h, w

    @model_validator(mode="after")
    def _condition_is_whole(self) -> "ConditionedConfig":
        if self.condition == "class" and not self.class_names:
            raise ValueError("a prior of classes needs class_names")
        if len(set(self.class_names)) < len(self.class_names):
            raise ValueError("class_names names a class twice")
        shape = (self.segmentation_codebook_size, self.segmentation_code_shape)
        if self.condition == "segmentation" and None in shape:
            raise ValueError("a prior of maps needs segmentation_codebook_size and segmentation_code_shape")
        return self

    @property
    def prefix_length(self) -> int:
        """P."""
        if self.condition == "text":
            return self.text_length
        return math.prod(self.segmentation_code_shape or ()) if self.condition == "segmentation" else 1

    @property
    def prefix_vocab_size(self) -> int:
        """How many ids there are, the null among them."""
        if self.condition == "text":
            return self.text_vocab_size
        return self.null_id + 1

    @property
    def null_id(self) -> int:
        """The id that stands for no condition where it is not a text, behind those of the condition."""
        if self.condition == "segmentation":
            assert self.segmentation_code_shape is not None and self.segmentation_codebook_size is not None
            return self.segmentation_code_shape[0] * self.segmentation_codebook_size
        return len(self.class_names) if self.condition == "class" else 0


def condition_of(kind: Condition, source: Codes, text_tokenizer: TextTokenizer | None) -> dict[str, Any]:
    """What a config says of its condition, for a prior that is trained on these codes.

    Raises InputError when they lack the condition, or there is no tokenizer for a text.
    """
    meta = source.meta
    match kind:
        case "text":
            if text_tokenizer is None:
                raise InputError("a prior of text needs text_tokenizer; name its folder, or choose another condition")
            fingerprint = text_tokenizer.fingerprint
            return {"text_vocab_size": text_tokenizer.vocab_size, "text_tokenizer_fingerprint": fingerprint}
        case "class":
            if not meta.class_names:
                raise InputError(
                    f"the codes in {source.folder} have no labels; give every picture a 'label' in the metadata and "
                    "encode again"
                )
            return {"class_names": meta.class_names}
        case "segmentation":
            if meta.segmentation is None:
                raise InputError(
                    f"{source.folder} has no codes of segmentation maps; encode with a segmentation_tokenizer"
                )
            return {
                "segmentation_codebook_size": meta.segmentation.codebook_size,
                "segmentation_code_shape": meta.segmentation.code_shape,
                "segmentation_tokenizer_fingerprint": meta.segmentation.tokenizer_fingerprint,
            }
        case "none":
            return {}


def batch_prefix(prior: Prior, batch: CodesBatch, bpe_dropout: float = 0.0, random: Random | None = None) -> Tensor:
    """The prefixes of images as they come from disk, (B, P); a caption that is too long is cut off.

    `bpe_dropout` is the share of merges that `random` leaves out of captions.
    """
    match prior.condition:
        case "text":
            assert prior.text_tokenizer is not None
            tokenizer = prior.text_tokenizer
            return prior.pad([tokenizer.encode(caption, bpe_dropout, random) for caption in batch.captions])
        case "class":
            return prior.prefix(classes=batch.labels)
        case "segmentation":
            return prior.prefix(segmentation=batch.segmentation)
        case "none":
            return prior.null_prefix(len(batch.codes))


class ConditionedPrior(Prior):
    """A prior whose prefix is a row of ids (B, P) int64."""

    config: ConditionedConfig

    def __init__(self, config: ConditionedConfig, text_tokenizer: TextTokenizer | None) -> None:
        super().__init__(config, text_tokenizer)
        self.condition, self.prefix_length = config.condition, config.prefix_length

    def text_prefix(self, text: Sequence[str]) -> Tensor:
        """Texts -> (B, P): <start>, the tokens, <pad> up to P. Raises InputError when a text is too long."""
        return self.pad(prompt_tokens(self.text_tokenizer, text, self.prefix_length - 1))

    def pad(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Token ids -> (B, P) on the prior's device; what does not fit is cut off."""
        room = self.prefix_length - 1
        rows = [[START, *ids[:room], *[PAD] * (room - len(ids))] for ids in tokens]
        return torch.tensor(rows, dtype=torch.int64, device=self._device).view(-1, self.prefix_length)

    def class_number(self, name: str) -> int:
        known = list(self.config.class_names)
        if name not in known and not name.isdecimal():
            raise InputError(f"this prior has no class '{name:.60}'{nearest(name, known)}")
        return known.index(name) if name in known else int(name)

    def class_prefix(self, classes: Sequence[int]) -> Tensor:
        return class_labels(classes, len(self.config.class_names), self._device)

    def segmentation_prefix(self, segmentation: Tensor) -> Tensor:
        """Codes (B, Q, h, w) -> (B, P), each codebook with ids of its own."""
        shape, size = self.config.segmentation_code_shape, self.config.segmentation_codebook_size
        assert shape is not None and size is not None
        if segmentation.ndim != 4 or segmentation.shape[1:] != shape:
            raise InputError(
                f"the codes of a map must be (B, {', '.join(map(str, shape))}), got {list(segmentation.shape)}"
            )
        if segmentation.numel() and not 0 <= int(segmentation.min()) <= int(segmentation.max()) < size:
            raise InputError(
                f"the codes of a map must be in [0, {size}), got {int(segmentation.min())} to {int(segmentation.max())}"
            )
        offsets = torch.arange(shape[0], device=segmentation.device) * size
        return flatten_codes(segmentation.long() + offsets.view(-1, 1, 1)).to(self._device)

    def null_prefix(self, rows: int) -> Tensor:
        if self.condition == "text":
            return self.pad([[]] * rows)
        return torch.full((rows, self.prefix_length), self.config.null_id, device=self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device
