"""Which items make up a training step: a pure function of (seed, step).

So training resumes at any step, and any number of processes sees the same global batches.
"""

import numpy as np


class Order:
    """Which items make up the batch of a step: a pure function of (seed, step).

    Every epoch is a systematic resampling of the weights (an item of k times the mean weight comes floor(k) or ceil(k)
    times; with equal weights each comes exactly once) in random order.
    """

    def __init__(self, weights: list[float], batch_size: int, seed: int) -> None:
        shares = np.asarray(weights, dtype=np.float64)
        self._cumulative = np.cumsum(shares / shares.sum() * len(shares))
        self.batch_size, self.seed = batch_size, seed
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def batch(self, step: int) -> np.ndarray:
        """(batch_size,) int64 item numbers of `step`, counted from 0."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, len(self._cumulative))
        return np.array([self._permutation(int(e))[o] for e, o in zip(epochs, offsets, strict=True)], dtype=np.int64)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._epoch[0] != epoch:
            random = np.random.default_rng((self.seed, epoch))
            points = np.arange(len(self._cumulative)) + random.random()
            items = np.searchsorted(self._cumulative, points).clip(max=len(self._cumulative) - 1)
            self._epoch = (epoch, random.permutation(items))
        return self._epoch[1]
