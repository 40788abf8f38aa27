"""Texts as the features of a T5 encoder (Raffel et al. 2020), which a prior reads in place of tokens.

The encoder is no part of the prior: it is found in a local folder or on the hub by its name, through transformers, and
loaded when the first text comes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.base import PromptTooLong
from stage2_prior.captions import clean
from tessera.errors import InputError
from tessera.weights.folder import hub_at_once

FILES = "config.json, model.safetensors or its shards, tokenizer.json and tokenizer_config.json"


class T5Features:
    """Texts -> (B, P, C + 1): features with zeros as padding on the left, and a last channel of 0 there and else 1."""

    def __init__(self, name: str, length: int, dim: int) -> None:
        self.name, self.length, self.dim = name, length, dim
        self._tokenizer: Any = None
        self._encoder: Any = None

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Raises InputError when the encoder cannot be had, PromptTooLong when a text has more than P tokens."""
        self._load(device)
        return torch.stack([self._features(text, device) for text in texts])

    def _features(self, text: str, device: torch.device) -> Tensor:
        """One text, so that it is read the same in any company: (P, C + 1)."""
        # Cleaned twice, as in training.
        tokens = self._tokenizer(clean(clean(text)), padding="max_length", max_length=self.length, return_tensors="pt")
        ids, attended = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
        if ids.shape[1] > self.length:
            raise PromptTooLong(
                f"the prompt has {ids.shape[1]} tokens, the prior reads at most {self.length}; shorten it"
            )
        features = self._encoder(input_ids=ids, attention_mask=attended).last_hidden_state[0].float()  # (P, C)
        count = int(attended.sum())
        return F.pad(F.pad(features[:count], (0, 1), value=1.0), (0, 0, self.length - count, 0))

    def _load(self, device: torch.device) -> None:
        if self._encoder is None:
            from transformers import AutoTokenizer, T5EncoderModel

            # The reference runs it in bfloat16; a CPU is slow at that.
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            try:
                with hub_at_once():
                    tokenizer = AutoTokenizer.from_pretrained(self.name)
                    encoder = T5EncoderModel.from_pretrained(self.name, dtype=dtype).eval()
            except Exception as error:  # offline, unknown, incomplete: a dozen kinds
                where = (
                    "a folder that is not there"
                    if Path(self.name).is_absolute()
                    else "not here, nor did the hub give it"
                )
                where = "a folder without all of its files" if Path(self.name).is_dir() else where
                raise InputError(
                    f"this prior reads text with the T5 encoder {self.name}, which is {where} "
                    f"({type(error).__name__}); "
                    f"get {FILES} of it, and convert the prior again with --set text_encoder=FOLDER"
                ) from None
            if encoder.config.d_model != self.dim:
                raise InputError(
                    f"the T5 encoder {self.name} gives features of {encoder.config.d_model} channels, and this prior "
                    f"reads {self.dim}; use the T5 that it was trained with"
                )
            self._tokenizer, self._encoder = tokenizer, encoder
        self._encoder.to(device)
