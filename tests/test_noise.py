"""The noise that draws codes: its distribution, its independence, and that its two implementations agree."""

import pytest
import torch

from stage2_prior.sampling import kernels
from stage2_prior.sampling.noise import _mix, draw_with, exponential, words_of
from tessera.native import build as native

CODES = 1024


@pytest.fixture(scope="module")
def noise():
    """(draws, rows, codes)"""
    generators = [torch.Generator().manual_seed(seed) for seed in range(32)]  # seeds as near as they are in use
    return torch.stack([exponential(words_of(generators), CODES) for _ in range(64)])


def test_it_is_exponential(noise):
    values = noise.flatten().double().sort().values
    steps = torch.arange(len(values)) / len(values)
    distance = (1 - torch.exp(-values) - steps).abs().max() * len(values) ** 0.5
    assert distance < 1.95  # Kolmogorov and Smirnov: above it once in a thousand
    assert values[0] > 0 and values.isfinite().all()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("lag", [1, 2, 3, 8, 16])
def test_neighbours_do_not_know_of_each_other(noise, axis, lag):
    centred = noise - 1
    length = noise.shape[axis]
    products = centred.narrow(axis, 0, length - lag) * centred.narrow(axis, lag, length - lag)
    assert abs(products.mean()) * products.numel() ** 0.5 < 4.5


def test_the_hash_is_one_to_one():
    assert len(_mix(torch.arange(1 << 16, dtype=torch.int32)).unique()) == 1 << 16


def test_a_row_depends_on_its_generator_alone():
    alone = words_of([torch.Generator().manual_seed(7)])
    among = words_of([torch.Generator().manual_seed(seed) for seed in (5, 7, 6)])
    assert torch.equal(among[1:2], alone)
    assert torch.equal(exponential(among, 50)[1:2], exponential(alone, 50))


def test_kernels_draw_what_torch_draws():
    try:
        kernels.load()
    except native.Unavailable as reason:
        pytest.skip(str(reason))
    generators = [torch.Generator().manual_seed(seed) for seed in range(40)]
    for size in (2, 37, 1000):
        words, logits = words_of(generators), torch.randn(40, size)
        logits[:, 1:][torch.rand(40, size - 1) < 0.3] = -torch.inf
        assert torch.equal(draw_with(logits, words), (logits - exponential(words, size).log()).argmax(-1))


def test_shares_pass_a_chi_square_test():
    logits = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
    generators = [torch.Generator().manual_seed(seed) for seed in range(200)]
    counts = sum(draw_with(logits.expand(200, -1), words_of(generators)).bincount(minlength=5) for _ in range(100))
    expected = 20_000 * logits.exp()
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # four degrees of freedom, once in a thousand


def test_a_seed_gives_the_same_words_on_every_release_of_torch() -> None:
    """Recorded with torch 2.14; 2.6 gave others when it was asked for 32-bit numbers."""
    generator = torch.Generator().manual_seed(5)
    rows = [words_of([generator])[0].tolist() for _ in range(3)]
    assert rows == [[-1910486834, 1423042237], [-585245578, 2059200585], [-1761705244, -443512898]]
