"""Speculative decoding: the codes of `sample`, seed by seed, and their distribution."""

import itertools

import pytest
import torch

from stage2_prior import Sampling, sample
from stage2_prior.sampling import kernels
from stage2_prior.sampling.jacobi import sample_speculatively
from tessera.errors import InputError
from tessera.native import build as native
from tests.test_engine import Doubled, inputs, make_prior


@pytest.fixture(autouse=True, scope="module")
def compiler():
    try:
        kernels.load()
    except native.Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("code_shape", [(1, 4, 5), (3, 3, 3)], ids=["one codebook", "three codebooks"])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(top_k=1),
        Sampling(guidance_scale=3),
        Sampling(temperature=0.5, top_k=5, guidance_scale=2, guidance_schedule="linear"),
        Sampling(guidance_scale=3, plausibility=0.3),
    ],
    ids=["plain", "greedy", "guided", "guided and filtered", "plausible"],
)
def test_it_draws_what_plain_sampling_draws(code_shape, sampling):
    prior = make_prior(code_shape)
    prefix, _ = inputs(prior, 1)
    expected = sample(prior, prefix, range(5), sampling)
    positions = prior.length // code_shape[0]
    for window in (1, 3, 8, 40):
        seen = []
        drawn = sample_speculatively(prior, prefix, range(5), sampling, window, seen.append)
        assert torch.equal(drawn.codes, expected)
        assert sum(seen) == 5 * prior.length
        assert (drawn.steps <= positions).all()
        if window == 1:
            assert (drawn.steps == positions).all()


def test_guesses_spare_steps_where_codes_hardly_depend_on_each_other():
    prior = make_prior((1, 4, 5))
    with torch.no_grad():
        prior.code_embedding.weight.mul_(0.01)
    drawn = sample_speculatively(prior, inputs(prior, 1)[0], range(4), window=8)
    assert drawn.steps.float().mean() < 10  # of 20


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
@torch.no_grad()
def test_images_come_as_often_as_the_prior_says(guidance_scale):
    prior = make_prior((1, 1, 3), codebook_size=3, dim=16, text_length=3)
    prefix, rounds, rows = inputs(prior, 1)[0], 40, 100
    images = torch.tensor([*itertools.product(range(3), repeat=3)])  # all 27

    def log_probs(prefix):
        return prior(prefix.expand(27, -1), images).log_softmax(-1)

    logits = log_probs(prior.null_prefix(1))
    logits = logits + guidance_scale * (log_probs(prefix) - logits)
    likely = logits.log_softmax(-1).gather(-1, images[..., None]).sum((1, 2)).exp()
    sampling, counts = Sampling(guidance_scale=guidance_scale), torch.zeros(27)
    for first in range(0, rounds * rows, rows):
        codes = sample_speculatively(prior, prefix, range(first, first + rows), sampling, window=3).codes
        counts += (codes @ torch.tensor([9, 3, 1])).bincount(minlength=27)
    expected = likely * rounds * rows
    common = expected >= 5
    terms = ((counts - expected) ** 2 / expected)[common].sum()
    rare = expected[~common].sum()
    terms += (counts[~common].sum() - rare) ** 2 / rare.clamp_min(1)
    assert terms < 54.1  # 26 degrees of freedom at most: above it once in a thousand


def test_a_prior_without_an_engine_is_sampled_plainly(caplog):
    prior = make_prior((1, 2, 2))
    prior.decoder.blocks[0].mlp_in = Doubled(40, 160, bias=False)
    prefix, _ = inputs(prior, 1)
    drawn = sample_speculatively(prior, prefix, range(2))
    assert torch.equal(drawn.codes, sample(prior, prefix, range(2)))
    assert drawn.steps.tolist() == [4, 4]
    assert "plain path" in caplog.text


def test_wrong_arguments_are_refused():
    prior = make_prior()
    with pytest.raises(InputError, match="one prefix and some seeds, got 2 and 1"):
        sample_speculatively(prior, inputs(prior, 2)[0], [1])
    with pytest.raises(InputError, match="window must be at least 1, got 0"):
        sample_speculatively(prior, inputs(prior, 1)[0], [1], window=0)
