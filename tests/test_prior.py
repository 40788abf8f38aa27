"""The laws of a prior (contract in stage2_prior/base.py), and text and sampling settings."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stage2_prior import GPTConfig, GPTPrior, Sampling, load_prior, sample
from stage2_prior.sampling import make_engine
from stage2_prior.sampling.sample import draw
from stage2_prior.sampling.settings import filter_logits, guide
from stage2_prior.train import Objective
from tessera.errors import InputError
from tessera.text import TextTokenizer
from tests.prior_laws import check_gradients

TEXTS = ["a red heart", "a blue circle above a cat", "红色的心", "a small dog in the top left corner"]


# Every option in some company: what a prior is apart from its sizes, and the shape of its codes.
PRIORS = {
    "one codebook": {"code_shape": (1, 3, 4)},
    "three codebooks": {"code_shape": (3, 2, 2)},
    "rotary, swiglu, plain queries": {"positions": "rotary", "mlp": "swiglu", "qk_norm": False},
    "rotary 2d, hidden padding": {"positions": "rotary-2d", "padding": "masked", "code_shape": (2, 2, 3)},
    "DALL·E's patterns": {"attention": "dalle", "depth": 4, "convolution_kernel": 3, "code_shape": (1, 3, 4)},
    "patterns, codebooks, hidden padding": {"attention": ("convolution", "column", "row"), "convolution_kernel": 3,
                                            "padding": "masked", "positions": "rotary", "code_shape": (2, 3, 2)},
    "random order": {"order": "random", "code_shape": (1, 3, 4)},
    "random order, rotary, codebooks, hidden padding": {"order": "random", "positions": "rotary-2d", "mlp": "swiglu",
                                                        "padding": "masked", "code_shape": (2, 2, 3)},
}  # fmt: skip


@pytest.fixture(scope="module", params=list(PRIORS.values()), ids=list(PRIORS))
def prior(request) -> GPTPrior:
    torch.manual_seed(0)
    tokenizer = TextTokenizer.train(TEXTS, vocab_size=300)
    config = {
        "codebook_size": 11, "code_shape": (1, 2, 3), "text_vocab_size": tokenizer.vocab_size, "text_length": 40,
        "dim": 32, "depth": 3, "num_heads": 4, "text_tokenizer_fingerprint": tokenizer.fingerprint,
    }  # fmt: skip
    prior = GPTPrior(GPTConfig.model_validate(config | request.param), tokenizer)
    for parameter in prior.parameters():  # blocks start as the identity; these are to do something
        torch.nn.init.normal_(parameter, std=0.3)
    return prior.eval()


def random_codes(prior, rows):
    return torch.randint(0, prior.codebook_size, (rows, prior.length))


def test_a_code_changes_only_the_logits_after_it(prior):
    prefix, codes = prior.prefix(["a red heart"]), random_codes(prior, 1)
    before = prior(prefix, codes)
    for j in range(prior.length):
        changed = codes.clone()
        changed[0, j] = (changed[0, j] + 1) % prior.codebook_size
        moved = (prior(prefix, changed) - before).abs().amax(-1)[0] > 0
        assert not moved[: j + 1].any()
        if set(prior.decoder.spec.patterns) == {"full"}:
            assert moved[j + 1 :].all()
        else:
            assert moved[j + 1 : j + 2].all()


def test_by_gradient_text_and_codes_know_of_nothing_after_them(prior):
    """The whole sequence: texts of one length, so that none of the tokens is a padding, and the codes."""
    room = prior.prefix_length
    prefix, codes = prior.pad(torch.randint(3, 100, (2, room - 1)).tolist()), random_codes(prior, 2)
    ids = torch.cat([prefix[:, 1:], codes], dim=1)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        predictions = prior.predict(torch.cat([prefix[:, :1], ids[:, : room - 1]], dim=1), ids[:, room - 1 :])
        of_codes = F.pad(predictions.codes, (0, predictions.text.shape[-1] - prior.codebook_size))
        return torch.cat([predictions.text, of_codes], dim=1)

    others = torch.cat([prefix[:, 1:] + 1, (codes + 1) % prior.codebook_size], dim=1)
    check_gradients(forward, ids, others)


@pytest.mark.parametrize("sees", ["later", "itself", "nothing"])
def test_the_gradient_tells_of_a_prior_that_is_not_causal(sees):
    table = torch.nn.Embedding(5, 4)
    seen = {"later": torch.ones(6, 6).triu(1), "itself": torch.ones(6, 6).tril(), "nothing": torch.zeros(6, 6)}[sees]
    codes = torch.randint(0, 5, (1, 6))
    with pytest.raises(AssertionError):
        check_gradients(lambda codes: seen @ table(codes), codes, (codes + 1) % 5)
    check_gradients(lambda codes: torch.ones(6, 6).tril(-1) @ table(codes), codes, (codes + 1) % 5)


def test_stepwise_log_probabilities_sum_to_the_teacher_forced_ones(prior):
    prefix, codes = prior.prefix(TEXTS), random_codes(prior, len(TEXTS))
    forced = prior(prefix, codes).log_softmax(-1).gather(-1, codes.unsqueeze(-1)).sum((1, 2))
    logits, cache = prior.prefill(prefix, prior.length - 1)
    total = torch.zeros(len(TEXTS))
    for t in range(prior.length):
        total += logits.log_softmax(-1).gather(-1, codes[:, t : t + 1])[:, 0]
        if t < prior.length - 1:
            logits = prior.step(codes[:, t], cache)
    torch.testing.assert_close(total, forced, rtol=0, atol=1e-4)


def uncached(prior, prefix, seeds, sampling):
    """Sampling by the whole forward pass for every code, nothing remembered."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    prefix = prefix.expand(len(seeds), -1)
    codes = torch.zeros(len(seeds), prior.length, dtype=torch.int64)
    for t in range(prior.length):
        logits = prior(prefix, codes)[:, t]
        if sampling.guidance_scale != 1:
            logits = guide(logits, prior(prior.null_prefix(len(seeds)), codes)[:, t], sampling.guidance_scale)
        codes[:, t] = draw(filter_logits(logits, sampling), generators)
    return codes


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(guidance_scale=3), Sampling(temperature=0.7, top_k=5, top_p=0.9, guidance_scale=2)],
)
@torch.no_grad()
def test_cached_sampling_equals_uncached(prior, sampling):
    prefix, seeds = prior.prefix(["a red heart"]), range(100, 108)
    assert torch.equal(sample(prior, prefix, seeds, sampling), uncached(prior, prefix, seeds, sampling))


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_candidates_equal_single_runs_in_any_batch(prior, guidance_scale):
    sampling = Sampling(guidance_scale=guidance_scale)
    prefix = prior.prefix(TEXTS[:2])
    together = sample(prior, prefix, [*range(8), *range(8)], sampling)
    for row in range(16):
        alone = sample(prior, prefix[row // 8 : row // 8 + 1], [row % 8], sampling)
        assert torch.equal(together[row : row + 1], alone)


def test_the_prefix_is_computed_once_for_all_candidates(prior, monkeypatch):
    rows = []
    engine = make_engine(prior)
    prefill = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda p, n: rows.append(len(p)) or prefill(p, n))
    sample(prior, prior.prefix(["a red heart"]), range(6), Sampling(guidance_scale=2), engine=engine)
    assert rows == [2]  # the prompt's and the empty one's, not one for each of 6 candidates


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    drawn = draw(logits.expand(4000, -1), [torch.Generator().manual_seed(i) for i in range(4000)])
    shares = drawn.bincount(minlength=4) / 4000
    assert (shares - logits.exp()).abs().max() < 0.03


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=9), st.floats(0.05, 1.0), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_filters_keep_what_brute_force_keeps(values, top_p, top_k):
    values = [value + 1e-3 * i for i, value in enumerate(values)]  # no exact ties
    logits = torch.tensor([values])
    order = sorted(range(len(values)), key=lambda i: -values[i])
    kept = (filter_logits(logits, Sampling(top_k=top_k)) > -torch.inf)[0]
    assert {i for i in range(len(values)) if kept[i]} == set(order[:top_k])

    probabilities, wanted, total = logits.softmax(-1)[0].double(), set(), 0.0
    for i in order:
        if total >= top_p - 1e-6:
            break
        wanted.add(i)
        total += float(probabilities[i])
    kept = (filter_logits(logits, Sampling(top_p=top_p)) > -torch.inf)[0]
    found = {i for i in range(len(values)) if kept[i]}
    assert found == wanted or abs(sum(float(probabilities[i]) for i in found & wanted) - top_p) < 1e-4


def test_guidance_one_is_conditional_and_zero_unconditional():
    first, second = torch.randn(2, 5), torch.randn(2, 5)
    torch.testing.assert_close(guide(first, second, 1.0), first.log_softmax(-1))
    torch.testing.assert_close(guide(first, second, 0.0), second.log_softmax(-1))


def test_too_long_a_prompt_and_wrong_numbers_of_seeds_are_refused(prior):
    with pytest.raises(InputError, match=r"the prompt has \d+ tokens, the prior reads at most 39"):
        prior.prefix(["x" * 10_000])
    with pytest.raises(InputError, match="multiple of the 2 prefixes, got 3"):
        sample(prior, prior.prefix(TEXTS[:2]), [1, 2, 3])


def test_saved_and_loaded_is_the_same_prior(prior, tmp_path):
    prior.save_pretrained(tmp_path / "prior")
    again = load_prior(tmp_path / "prior")
    prefix, codes = prior.prefix(TEXTS), random_codes(prior, len(TEXTS))
    assert torch.equal(again.prefix(TEXTS), prefix)
    assert torch.equal(again(prefix, codes), prior(prefix, codes))
    with pytest.raises(InputError, match="was trained with text tokenizer"):
        load_prior(tmp_path / "prior", TextTokenizer.train(["other"], 260))


def test_text_loss_is_the_mean_over_said_tokens_and_the_end(prior):
    codes = random_codes(prior, 2)
    tokens = prior.text_tokenizer.encode("a red heart")
    text, image = Objective(prior)(prior.pad([tokens, []]), codes)
    predictions = prior.predict(prior.pad([tokens]), codes[:1])
    targets = [*tokens, 0]
    expected = [-predictions.text[0, i].log_softmax(-1)[token] for i, token in enumerate(targets)]
    torch.testing.assert_close(text, torch.stack(expected).mean())
    both = prior(prior.pad([tokens, []]), codes).log_softmax(-1).gather(-1, codes.unsqueeze(-1))
    torch.testing.assert_close(image, -both.view(-1, prior.num_codebooks).mean(0))
