"""What computes the steps of a prior: the contract, and the plain engine, which is the prior itself.

An engine is made by `make_engine` (selection.py), and whoever samples with it keeps it. Engines of one prior in several
precisions are independent of each other.
"""

from abc import ABC, abstractmethod

from torch import Tensor

from stage2_prior.base import Cache, Prior
from stage2_prior.sampling.settings import Precision
from tessera.errors import InputError


class Engine(ABC):
    """Computes a prior's steps with the weights that the prior had when the engine was made or last refreshed."""

    prior: Prior
    precision: Precision | None  # that the weights are kept in; None: the prior's own
    reason: str = ""  # why it is the prior itself; empty for the fast engines

    @abstractmethod
    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, Cache]:
        """As `Prior.prefill`: (R, P) -> logits (R, K) of the first code, and a cache with room for `length` codes."""

    @abstractmethod
    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        """As `Prior.step`: codes (N,) -> logits of the next ones (N, K)."""

    def refresh(self) -> None:
        """The prior's weights have changed: reads them again. Not while images are being sampled with it."""
        self._versions = _versions(self.prior)

    def check(self, prior: Prior) -> None:
        """Raises InputError unless the engine computes this prior, with the weights that it has now.

        This is a safeguard and does not replace `refresh`: a change through `.data` is not found.
        """
        if self.prior is not prior:
            raise InputError("the engine was made for another prior; make one for this prior with make_engine")
        if self._versions != _versions(prior):
            raise InputError(
                "the prior's weights have changed since its engine read them; call the engine's refresh(), or make a "
                "new engine if they are on another device now"
            )


class PlainEngine(Engine):
    """The prior itself."""

    precision = None

    def __init__(self, prior: Prior, reason: str = "") -> None:
        self.prior, self.reason = prior, reason
        self.refresh()

    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, Cache]:
        return self.prior.prefill(prefix, length)

    def step(self, codes: Tensor, cache: Cache) -> Tensor:
        return self.prior.step(codes, cache)

    def check(self, prior: Prior) -> None:
        self.refresh()  # it computes with the weights as they are
        super().check(prior)


def _versions(prior: Prior) -> list[tuple[int, int]]:
    """Where each weight is and how often torch has seen it change."""
    return [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in prior.parameters()]
