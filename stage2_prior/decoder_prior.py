"""A prior over the trunk: what GPT, the imported models and the decoder of DALL·E mini have in common.

The embedded prefix, then the codes of the image positions, in one sequence; the state of the last prefix position
predicts the first code. A position holds its Q codes: they are embedded together and predicted one after another.

Letters: B batch, R prefixes, N sequences, P prefix, Q codebooks, S = h·w image positions, T = S·Q codes an image, n
positions, q codes of a position, K codebook size, V text vocabulary, E width.
"""

from abc import abstractmethod

import torch
from einops import rearrange
from pydantic import ValidationError, model_validator
from torch import Tensor

from stage2_prior.base import Cache, Predictions, Prior, PriorConfig
from stage2_prior.decoder import Decoder, DecoderCache, DecoderSpec


class SingleCodebookConfig(PriorConfig):
    """Of a prior over the trunk whose positions hold one code each; each says its trunk."""

    @property
    def decoder(self) -> DecoderSpec:
        raise NotImplementedError

    @model_validator(mode="after")
    def _trunk_is_consistent(self) -> "SingleCodebookConfig":
        if self.code_shape[0] != 1:
            raise ValueError(f"this prior draws one codebook, got a code_shape of {self.code_shape}")
        try:
            _ = self.decoder
        except ValidationError as error:
            raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        return self


class DecoderPrior(Prior):
    decoder: Decoder

    # What a prior says of itself -------------------------------------------------------------------------------------

    @abstractmethod
    def embed_prefix(self, prefix: Tensor, order: Tensor | None) -> Tensor:
        """(B, P) -> (B, P', E), where P' is the trunk's prefix."""

    @abstractmethod
    def embed_codes(self, codes: Tensor, first: int, order: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        """The codes (B, n, Q) of the image positions that are read from `first` on -> (B, n, E).

        Those that are `hidden` (B, n) bool are embedded as zeros.
        """

    @abstractmethod
    def next_logits(self, states: Tensor, codes: Tensor) -> Tensor:
        """States (..., E) and the q codes of their positions that are known (..., q) -> logits of the next (..., K)."""

    def code_logits(self, states: Tensor, codes: Tensor) -> Tensor:
        """States (B, S, E) and all codes of their positions (B, S, Q) -> (B, T, K)."""
        return self.next_logits(states, codes[..., :0])  # of one codebook

    def text_logits(self, states: Tensor) -> Tensor | None:
        """States (B, P - 1, E) -> logits of the text tokens after the first (B, P - 1, V); None if not predicted."""
        return None

    def present(self, prefix: Tensor) -> Tensor | None:
        """(B, P) bool, False on padding that nothing attends to; None where there is none."""
        return None

    def memory(self, prefix: Tensor) -> dict[str, Tensor]:
        """What the trunk's cross-attention reads: `memory` (B, M, E) and `memory_present` (B, M) bool, or nothing."""
        return {}

    # Training --------------------------------------------------------------------------------------------------------

    def forward(self, prefix: Tensor, codes: Tensor, order: Tensor | None = None) -> Tensor:
        """As the contract says; read in `order` (B, S), a permutation of the image positions for each row, logits
        depend on the codes of positions before theirs in that order."""
        return self._code_logits(self._states(prefix, codes, order), codes, order)

    def predict(
        self, prefix: Tensor, codes: Tensor, order: Tensor | None = None, hidden: Tensor | None = None
    ) -> Predictions:
        """Teacher-forced logits of text and codes alike: prefix (B, P), codes (B, T) int64. Of image positions that are
        `hidden` (B, S) bool, later ones learn nothing; a residual code still reads those that it refines."""
        states = self._states(prefix, codes, order, hidden)
        text = self.text_logits(states[:, : self.decoder.spec.prefix_length - 1])
        return Predictions(text, self._code_logits(states, codes, order))

    def _states(self, prefix: Tensor, codes: Tensor, order: Tensor | None, hidden: Tensor | None = None) -> Tensor:
        """(B, P), (B, T) -> (B, P' + S - 1, E): what each position knows about the next one."""
        order = self.reading_order(len(prefix), order)
        if hidden is not None:
            hidden = (hidden if order is None else hidden.take_along_dim(order, 1))[:, :-1]
        codes = self._positions(codes, order)[:, :-1]
        x = torch.cat([self.embed_prefix(prefix, order), self.embed_codes(codes, 0, order, hidden)], dim=1)
        return self.decoder(x, present=self.present(prefix), order=order, **self.memory(prefix))

    def _code_logits(self, states: Tensor, codes: Tensor, order: Tensor | None) -> Tensor:
        """The trunk's states (B, P' + S - 1, E) and the codes (B, T) -> (B, T, K), in raster order."""
        states = states[:, self.decoder.spec.prefix_length - 1 :]
        if order is not None:
            states = states.take_along_dim(order.argsort(1).unsqueeze(2), 1)
        return self.code_logits(states, self._positions(codes, None))

    # Sampling --------------------------------------------------------------------------------------------------------

    def prefill(
        self, prefix: Tensor, length: int, *, order: Tensor | None = None, known: Tensor | None = None
    ) -> tuple[Tensor, DecoderCache]:
        """As the contract says; image positions are sampled in `order` (R, S), and the `known` codes (R, n·Q) of the
        first n of them are read with the prefix, and counted in `length`."""
        order = self.reading_order(len(prefix), order)
        x = self.embed_prefix(prefix, order)
        if known is not None:
            x = torch.cat([x, self.embed_codes(self._positions(known, None), 0, order)], dim=1)
        room = self.decoder.spec.prefix_length + length // self.num_codebooks
        _, cache = self.decoder.prefill(x, room, present=self.present(prefix), order=order, **self.memory(prefix))
        return self.next_logits(cache.state, cache.codes), cache

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        assert isinstance(cache, DecoderCache)
        cache.codes = torch.cat([cache.codes, codes.unsqueeze(1)], dim=1)
        if cache.codes.shape[1] == self.num_codebooks:  # a position is complete
            first = cache.length - self.decoder.spec.prefix_length
            self.decoder.step(self.embed_codes(cache.codes.unsqueeze(1), first, cache.order), cache)
            cache.codes = cache.codes[:, :0]
        return self.next_logits(cache.state, cache.codes)

    def cache_numbers(self) -> int:
        return self.decoder.cache_numbers()

    # Positions -------------------------------------------------------------------------------------------------------

    def reading_order(self, rows: int, order: Tensor | None) -> Tensor | None:
        """(rows, S), in which image positions are read; None for a prior that reads in raster order alone."""
        assert order is None
        return None

    def _positions(self, codes: Tensor, order: Tensor | None) -> Tensor:
        """Codes (B, n·Q) position by position, (B, n, Q), in raster order or in `order`."""
        positions = rearrange(codes, "b (s q) -> b s q", q=self.num_codebooks)
        return positions if order is None else positions.take_along_dim(order.unsqueeze(2), 1)

    @property
    def activation_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass instead of remembered, in training."""
        return self.decoder.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        self.decoder.activation_checkpointing = value
