"""Sampling (stage2_prior/sampling/): what the settings do, given codes, log-probabilities, early pruning."""

import math
from typing import NamedTuple

import pytest
import torch

from stage2_prior import GPTConfig, GPTPrior, Sampling, sample
from stage2_prior.sampling.memory import in_halves
from stage2_prior.sampling.prune import Plan, best_of, count_codes, likelihood_gain, plan_pruning, sample_pruned
from stage2_prior.sampling.sample import Sampler, batches, draw, sample_scored
from stage2_prior.sampling.settings import filter_logits, guidance_at, guide
from tessera.errors import InputError
from tessera.text import TextTokenizer

TEXTS = ["a red heart", "a blue circle above a cat"]
SETTINGS = [
    Sampling(),
    Sampling(
        temperature=0.7,
        top_k=6,
        top_p=0.95,
        min_p=0.02,
        guidance_scale=2.5,
        guidance_schedule="linear",
        plausibility=0.05,
    ),
]


@pytest.fixture(scope="module", params=[(1, 3, 4), (3, 2, 2)], ids=["one codebook", "three codebooks"])
def prior(request) -> GPTPrior:
    torch.manual_seed(0)
    tokenizer = TextTokenizer.train(TEXTS, vocab_size=300)
    config = GPTConfig(
        codebook_size=11, code_shape=request.param, text_vocab_size=tokenizer.vocab_size, text_length=40, dim=32,
        depth=2, num_heads=4,
    )  # fmt: skip
    prior = GPTPrior(config, tokenizer)
    for parameter in prior.parameters():  # blocks start as the identity; these are to do something
        torch.nn.init.normal_(parameter, std=0.3)
    for name, parameter in prior.named_parameters():  # sharp attention, so that the prompt matters
        if name.endswith(("query_scale", "key_scale")):
            torch.nn.init.constant_(parameter, 2.0)
    return prior.eval()


# Settings -------------------------------------------------------------------------------------------------------------


def test_min_p_keeps_what_is_near_the_likeliest():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25]]).log()
    kept = filter_logits(logits, Sampling(min_p=0.29)) > -torch.inf
    assert kept.tolist() == [[True, True, True, False], [True] * 4]
    assert (filter_logits(logits, Sampling(min_p=1.0)) > -torch.inf).sum(-1).tolist() == [1, 4]
    # Temperature comes first: squared, the ratios are 1, 0.36, 0.09, 0.01.
    kept = filter_logits(logits, Sampling(min_p=0.29, temperature=0.5)) > -torch.inf
    assert kept[0].tolist() == [True, True, False, False]


def test_plausible_codes_are_likely_without_guidance():
    """By hand: the ratios of conditional to unconditional are 0.8, 1.5, 2 and 3, so guidance prefers the last; only the
    first two have a quarter of the likeliest one's conditional probability."""
    conditional = torch.tensor([[0.64, 0.3, 0.04, 0.02]])
    unconditional = torch.tensor([[0.8, 0.2, 0.02, 0.02 / 3]])
    guided = guide(conditional.log(), unconditional.log(), 5.0)
    assert guided.argmax(-1).tolist() == [3] and guided.isfinite().all()
    chosen = guide(conditional.log(), unconditional.log(), 5.0, plausibility=0.25)
    assert torch.equal(chosen[:, :2], guided[:, :2]) and chosen[0, 2:].tolist() == [-torch.inf] * 2
    # At 1 the likeliest of the prompt itself is all that is left, whatever the scale.
    assert guide(conditional.log(), unconditional.log(), 50.0, plausibility=1.0).argmax(-1).tolist() == [0]


def test_filters_follow_their_order():
    """Top-p counts only what top-k left: 0.5 of 0.5 + 0.3 is 0.625, which is not yet 0.63 but more than 0.6."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, count in ((0.6, 1), (0.63, 2)):
        assert int((filter_logits(logits, Sampling(top_k=2, top_p=top_p)) > -torch.inf).sum()) == count
    assert int((filter_logits(logits, Sampling(top_p=0.6)) > -torch.inf).sum()) == 2


@pytest.mark.parametrize("margin", [0.001, 0.01])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_top_p_keeps_the_fewest_codes_that_reach_it(margin, temperature):
    """Just above 0.4, 0.7, 0.85 or 0.95, which are the sums of the likeliest, it takes a code more than just below."""
    probabilities = torch.tensor([0.15, 0.4, 0.05, 0.3, 0.1])  # not in order
    logits = probabilities.log() * temperature  # of which the temperature makes these probabilities
    for count, total in enumerate((0.4, 0.7, 0.85, 0.95), 1):
        for top_p, expected in ((total - margin, count), (total + margin, count + 1)):
            sampling = Sampling(top_p=top_p, temperature=temperature)
            kept = filter_logits(logits.expand(2, -1), sampling) > -torch.inf
            likeliest = probabilities.argsort(descending=True)[:expected]
            assert kept.sum(-1).tolist() == [expected] * 2 and kept[:, likeliest].all(), (top_p, expected)


def test_top_p_of_one_and_the_largest_top_k_leave_all_codes():
    logits = torch.randn(3, 50) * 20  # some with probability 0 in float32
    for sampling in (Sampling(top_p=1.0), Sampling(top_k=50), Sampling(top_k=51)):
        assert torch.equal(filter_logits(logits, sampling), logits)
    assert (filter_logits(logits, Sampling(top_k=49)) > -torch.inf).sum(-1).tolist() == [49] * 3


def test_top_k_beyond_the_codebook_takes_all_of_it(prior):
    prefix = prior.prefix(TEXTS[:1])
    assert torch.equal(sample(prior, prefix, range(4), Sampling(top_k=10**9)), sample(prior, prefix, range(4)))


def test_guidance_schedules():
    for name, expected in {"constant": [3, 3, 3, 3, 3], "linear": [1, 1.5, 2, 2.5, 3]}.items():
        sampling = Sampling(guidance_scale=3, guidance_schedule=name)
        assert [guidance_at(sampling, position, 5) for position in range(5)] == expected
    cosine = [guidance_at(Sampling(guidance_scale=3, guidance_schedule="cosine"), t, 5) for t in range(5)]
    assert cosine == pytest.approx([1, 2 - math.sqrt(0.5), 2, 2 + math.sqrt(0.5), 3])
    assert guidance_at(Sampling(guidance_scale=3, guidance_schedule="linear"), 0, 1) == 1


def uncached(prior, prefix, null, seeds, sampling, first_codes):
    """Sampling by the whole forward pass for every code, and the log-probabilities of each (N, T)."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    prefix, null = prefix.expand(len(seeds), -1), null.expand(len(seeds), -1)
    codes = torch.zeros(len(seeds), prior.length, dtype=torch.int64)
    drawn_log_probs = torch.zeros(codes.shape)
    for t in range(prior.length):
        logits = prior(prefix, codes)[:, t]
        if sampling.guidance_scale != 1:
            conditional, unconditional = logits.softmax(-1), prior(null, codes)[:, t].softmax(-1)
            implausible = conditional < sampling.plausibility * conditional.amax(-1, keepdim=True)
            ratio = (conditional / unconditional) ** guidance_at(sampling, t, prior.length)
            logits = (unconditional * ratio).log().masked_fill(implausible, -torch.inf)
        logits = filter_logits(logits, sampling)
        drawn = draw(logits, generators)
        if t < len(first_codes):
            codes[:, t] = first_codes[t]
        else:
            codes[:, t] = drawn
            drawn_log_probs[:, t] = logits.log_softmax(-1).gather(-1, drawn[:, None])[:, 0]
    return codes, drawn_log_probs


@pytest.mark.parametrize("sampling", SETTINGS, ids=["plain", "everything"])
@pytest.mark.parametrize("given", [0, 5])
@torch.no_grad()
def test_sampling_equals_whole_forward_passes(prior, sampling, given):
    """Codes and log-probabilities with a cache, a negative prompt and given codes, against forward passes alone."""
    prefix, null, first = prior.prefix(TEXTS[:1]), prior.prefix(["a cat"]), torch.arange(given)
    sampled = sample_scored(prior, prefix, range(6), sampling, null=null, first_codes=first)
    codes, drawn_log_probs = uncached(prior, prefix, null, range(6), sampling, first)
    assert torch.equal(sampled.codes, codes)
    torch.testing.assert_close(sampled.drawn_log_probs, drawn_log_probs, rtol=0, atol=1e-4)
    forced = prior(prefix.expand(6, -1), codes).log_softmax(-1).gather(-1, codes.unsqueeze(-1))[..., 0]
    torch.testing.assert_close(sampled.log_probs, forced, rtol=0, atol=1e-4)
    torch.testing.assert_close(sampled.log_probs.sum(-1), forced.sum(-1), rtol=0, atol=1e-4)
    assert torch.equal(sampled.codes, sample(prior, prefix, range(6), sampling, null=null, first_codes=first))


def test_plain_sampling_draws_from_the_prior_itself(prior):
    sampled = sample_scored(prior, prior.prefix(TEXTS[:1]), range(3))
    assert torch.equal(sampled.log_probs, sampled.drawn_log_probs)


def test_the_empty_text_is_the_null_and_another_one_is_not(prior):
    prefix, sampling = prior.prefix(TEXTS[:1]), Sampling(guidance_scale=3)
    usual = sample(prior, prefix, range(4), sampling)
    assert torch.equal(usual, sample(prior, prefix, range(4), sampling, null=prior.prefix([""])))
    assert not torch.equal(usual, sample(prior, prefix, range(4), sampling, null=prior.prefix(["a cat"])))


def test_each_prefix_may_have_its_own_null(prior):
    prefix, nulls, sampling = prior.prefix(TEXTS), prior.prefix(["a cat", "a dog"]), Sampling(guidance_scale=3)
    together = sample(prior, prefix, [*range(3), *range(3)], sampling, null=nulls)
    for i in range(2):
        alone = sample(prior, prefix[i : i + 1], range(3), sampling, null=nulls[i : i + 1])
        assert torch.equal(together[3 * i : 3 * i + 3], alone)


@pytest.mark.parametrize("given", [1, 6, 11])
def test_with_its_own_first_codes_given_a_seed_draws_its_image_again(prior, given):
    prefix, sampling = prior.prefix(TEXTS[:1]), SETTINGS[1]
    usual = sample(prior, prefix, range(4), sampling)
    for seed in range(4):
        again = sample(prior, prefix, [seed], sampling, first_codes=usual[seed, :given])
        assert torch.equal(again[0], usual[seed])


def test_given_codes_that_are_none_are_refused(prior):
    prefix = prior.prefix(TEXTS[:1])
    for wrong, sentence in (
        (torch.tensor([11]), r"first_codes must be in \[0, 11\), got 11"),
        (torch.tensor([-1, 3]), r"got -1"),
        (torch.zeros(12, dtype=torch.int64), "must leave something to draw of 12 codes, got 12"),
        (torch.zeros(2), r"whole numbers, got \(2,\) of torch.float32"),
        (torch.zeros(1, 2, dtype=torch.int64), r"got \(1, 2\)"),
    ):
        with pytest.raises(InputError, match=sentence):
            sample(prior, prefix, [0], first_codes=wrong)


# Out of memory --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_collection(monkeypatch):
    """Collecting garbage takes a tenth of a second each time."""
    monkeypatch.setattr("stage2_prior.sampling.memory.gc.collect", lambda: 0)


class Part(NamedTuple):
    rows: torch.Tensor


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["python", "gpu", "cpu"],
)
@pytest.mark.parametrize("prefixes", [1, 2, 3])
@pytest.mark.parametrize("room", [1, 2, 5, 12])
def test_what_does_not_fit_is_sampled_in_parts(error, prefixes, room, no_collection, caplog):
    asked = []

    def run(which, seeds, batch_size):
        count = which.stop - which.start
        assert count > 0 and len(seeds) % count == 0 and (count == 1 or len(seeds) <= batch_size)
        for batch in batches(seeds, batch_size):
            asked.append(len(batch))
            if len(batch) > room:
                raise error
        return Part(torch.tensor([(which.start + i * count // len(seeds), seed) for i, seed in enumerate(seeds)]))

    seeds = list(range(100, 112))
    result = in_halves(run, slice(0, prefixes), seeds, 12)
    assert result.rows.tolist() == [[i * prefixes // 12, seed] for i, seed in enumerate(seeds)]
    assert ("12 images at once do not fit in memory; sampling " in caplog.text) == (room < 12)
    if room == 5:
        halves = [12, 6, 3, 3, 6, 3, 3]
        assert asked == {1: [12, 6, 3, 3, 3, 3], 2: halves, 3: [12, 4, 8, 4, 4]}[prefixes]


@pytest.mark.parametrize("error", [RuntimeError("another"), MemoryError(), ValueError("allocate memory")])
def test_what_parts_cannot_help_is_raised(error, no_collection):
    asked = []

    def run(which, seeds, batch_size):
        asked.append(batch_size)
        raise error

    with pytest.raises(type(error)):
        in_halves(run, slice(0, 1), range(4), 4)
    assert asked == ([4, 2, 1] if isinstance(error, MemoryError) else [4])


# Early pruning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [16, 3])
@pytest.mark.parametrize("first_codes", [None, torch.tensor([1, 2, 3])])
def test_what_is_finished_is_what_the_full_run_draws(prior, batch_size, first_codes):
    """And it is the best by the likelihood gain, reckoned here from teacher-forced passes over the full run's codes."""
    prefix, null, sampling = prior.prefix(TEXTS[:1]), prior.null_prefix(1), SETTINGS[1]
    given = 0 if first_codes is None else len(first_codes)
    plan, seeds, counted = plan_pruning(8, prior.length, 0.5, given), range(40, 48), []
    full = sample_scored(prior, prefix, seeds, sampling, first_codes=first_codes)
    pruned = sample_pruned(prior, prefix, seeds, plan, sampling, counted.append, batch_size, first_codes=first_codes)
    with torch.no_grad():
        codes = full.codes.unsqueeze(-1)
        text, none = (
            prior(p.expand(8, -1), full.codes).log_softmax(-1).gather(-1, codes)[:, : plan.position, 0].sum(-1)
            for p in (prefix, null)
        )
    best = sorted(sorted(range(8), key=lambda i: -float(text[i] - 0.25 * none[i]))[: plan.survivors])
    assert pruned.chosen.tolist() == [best]
    for ours, whole in zip(pruned.sampled, full, strict=True):
        torch.testing.assert_close(ours, whole[best], rtol=0, atol=1e-5)
    assert torch.equal(pruned.sampled.codes, full.codes[best])
    assert sum(counted) == count_codes(plan, 8, prior.length, given, batch_size)


def sampler_of_at_most(room):
    """A Sampler that runs out of memory with more images."""

    class Small(Sampler):
        def __init__(self, prior, prefix, seeds, *arguments, **options):
            if len(seeds) > room:
                raise torch.OutOfMemoryError
            super().__init__(prior, prefix, seeds, *arguments, **options)

    return Small


@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("room", [1, 4, 9])
def test_pruning_out_of_memory_finishes_the_same_images(prior, prompts, room, no_collection, monkeypatch, caplog):
    prefix, sampling = prior.prefix([*TEXTS, "a cat"][:prompts]), Sampling(guidance_scale=2)
    plan, seeds = plan_pruning(6, prior.length, 0.5), [*range(6)] * prompts
    whole = sample_pruned(prior, prefix, seeds, plan, sampling)
    monkeypatch.setattr("stage2_prior.sampling.prune.Sampler", sampler_of_at_most(room))
    pruned = sample_pruned(prior, prefix, seeds, plan, sampling)
    assert torch.equal(pruned.chosen, whole.chosen) and torch.equal(pruned.sampled.codes, whole.sampled.codes)
    expected = {1: (6, "sampling 3 at once"), 2: (12, "sampling 6 and 6"), 3: (18, "sampling 6 and 12")}[prompts]
    assert (f"{expected[0]} images at once do not fit in memory; {expected[1]}" in caplog.text) == (room < 6 * prompts)


def test_several_prompts_are_pruned_each_by_itself(prior):
    prefix, sampling, plan = prior.prefix(TEXTS), Sampling(guidance_scale=2), plan_pruning(6, prior.length, 0.5)
    together = sample_pruned(prior, prefix, [*range(6), *range(6)], plan, sampling)
    assert together.chosen.shape == (2, plan.survivors)
    for i in range(2):
        alone = sample_pruned(prior, prefix[i : i + 1], range(6), plan, sampling)
        assert torch.equal(alone.chosen[0], together.chosen[i])
        assert torch.equal(alone.sampled.codes, together.sampled.codes.view(2, plan.survivors, -1)[i])


def test_another_score_decides(prior):
    prefix, plan, calls = prior.prefix(TEXTS[:1]), plan_pruning(6, prior.length, 0.6), []

    def scorer(number, codes):
        calls.append((number, codes))
        return torch.tensor([0.0, 3.0, 1.0, 3.0, 2.0, 9.0])

    pruned = sample_pruned(prior, prefix, range(6), plan, scorer=scorer)
    assert pruned.chosen.tolist() == [sorted([5, 1, 3, 4, 2][: plan.survivors])]
    ((number, codes),) = calls
    assert number == 0 and torch.equal(codes, sample(prior, prefix, range(6))[:, : plan.position])
    with pytest.raises(InputError, match="takes guidance; set a guidance_scale other than 1, or prune by the reranker"):
        sample_pruned(prior, prefix, range(6), plan)


@pytest.mark.parametrize("candidates", [2, 4, 16, 64])
@pytest.mark.parametrize("length", [16, 64, 256])
@pytest.mark.parametrize("given", [0, 7])
def test_a_plan_keeps_to_its_budget(candidates, length, given):
    for hundredths in range(5, 100, 5):
        try:
            plan = plan_pruning(candidates, length, hundredths / 100, given)
        except InputError as error:
            too_little = hundredths / 100 * candidates * (length - given) < (length - given) + candidates - 1
            assert (too_little or hundredths / 100 * (length - given) < 2) and "is too little for" in str(error)
            continue
        assert given < plan.position < length and 1 <= plan.survivors < candidates
        whole = candidates * (length - given)
        drawn = count_codes(plan, candidates, length, given, candidates)
        assert hundredths / 100 * whole - candidates < drawn <= hundredths / 100 * whole + 1e-6


def test_the_first_among_equals_stays():
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0], [4.0, 3.0, 2.0, 1.0]])
    assert best_of(scores, 2).tolist() == [[1, 2], [0, 1]]


def test_images_that_are_kept_are_finished_as_they_would_have_been(prior):
    prefix, sampling = prior.prefix(TEXTS[:1]), SETTINGS[1]
    sampler = Sampler(prior, prefix, range(5), sampling)
    sampler.advance(4)
    sampler.keep(torch.tensor([3, 0]))
    sampler.advance(prior.length)
    assert torch.equal(sampler.codes, sample(prior, prefix, [3, 0], sampling))


def test_the_likelihood_gain_is_the_prompt_s_less_a_quarter_of_the_null_s(prior):
    sampler = Sampler(prior, prior.prefix(TEXTS[:1]), range(4), Sampling(guidance_scale=2), scored=True)
    sampler.advance(5)
    expected = (sampler.log_probs - sampler.null_log_probs / 4).sum(1)
    torch.testing.assert_close(likelihood_gain(sampler), expected)
    assert (sampler.null_log_probs[:, :5] < 0).all() and not sampler.null_log_probs[:, 5:].any()


@pytest.mark.parametrize("nulls", [["a dog"], ["a cat", "a dog"], None])
@pytest.mark.parametrize("room", [12, 6])
def test_pruning_steers_away_from_the_null_that_is_given(prior, nulls, room, no_collection, monkeypatch):
    """Each prompt from its own or from the only one, also where memory has the prompts drawn one after the other."""
    prefix, plan, sampling = prior.prefix(TEXTS), plan_pruning(6, prior.length, 0.5), Sampling(guidance_scale=2)
    null = None if nulls is None else prior.prefix(nulls)
    monkeypatch.setattr("stage2_prior.sampling.prune.Sampler", sampler_of_at_most(room))
    pruned = sample_pruned(prior, prefix, [*range(6)] * 2, plan, sampling, null=null)
    whole = sample(prior, prefix, [*range(6)] * 2, sampling, null=null)
    rows = (pruned.chosen + torch.tensor([[0], [6]])).flatten()
    assert torch.equal(pruned.sampled.codes, whole[rows])


def test_what_pruning_draws_is_counted_by_hand():
    """5 of 8 candidates to position 4 of 10, of which 1 code is given: 8 x 3 and 5 x 6, and 5 x 3 again in parts."""
    plan = Plan(position=4, survivors=5)
    assert count_codes(plan, 8, 10, 1, batch_size=8) == 24 + 30
    assert count_codes(plan, 8, 10, 1, batch_size=7) == 24 + 30 + 15
