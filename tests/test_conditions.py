"""The laws of the priors that are trained here (contract in stage2_prior/base.py), for every kind of condition."""

import math

import pytest
import torch

from stage2_prior import GPTConfig, GPTPrior, Sampling, load_prior, sample
from stage2_prior.base import class_labels
from stage2_prior.pixelcnn import ConditionReader, PixelCNNConfig, PixelCNNPrior
from stage2_prior.sampling.settings import guide
from tessera.errors import InputError
from tessera.text import TextTokenizer
from tests.prior_laws import check_gradients, check_steps

TEXTS = ["a red heart", "a blue circle above a cat", "红色的心"]
KINDS = {
    "gpt": (GPTConfig, GPTPrior, {"dim": 16, "depth": 2, "num_heads": 2, "positions": "rotary-2d"}),
    "pixelcnn": (PixelCNNConfig, PixelCNNPrior, {"dim": 16, "depth": 3, "kernel_size": 3, "num_heads": 2}),
}
CONDITIONS = ["text", "class", "segmentation", "none"]


def make(kind, condition, code_shape, **changes):
    torch.manual_seed(0)
    config, model, sizes = KINDS[kind]
    tokenizer = TextTokenizer.train(TEXTS, vocab_size=300) if condition == "text" else None
    conditions = {
        "text": {"text_length": 40, "text_vocab_size": 300},
        "class": {"class_names": ("cat", "dog", "owl")},
        "segmentation": {"segmentation_codebook_size": 7, "segmentation_code_shape": (2, 2, 2)},
        "none": {},
    }
    if tokenizer is not None:
        conditions["text"] |= {
            "text_vocab_size": tokenizer.vocab_size,
            "text_tokenizer_fingerprint": tokenizer.fingerprint,
        }
    settings = {"codebook_size": 11, "code_shape": code_shape} | conditions[condition] | sizes | changes
    prior = model(config(condition=condition, **settings), tokenizer).eval()
    for parameter in prior.parameters():  # some parts start as the identity; these are to do something
        torch.nn.init.normal_(parameter, std=0.3)
    return prior


def prefixes(prior):
    """Three of the prior's condition."""
    match prior.condition:
        case "text":
            return prior.prefix(TEXTS)
        case "class":
            return prior.prefix(classes=[0, 2, 1])
        case "segmentation":
            generator = torch.Generator().manual_seed(1)
            return prior.prefix(segmentation=torch.randint(7, (3, 2, 2, 2), generator=generator))
        case "none":
            return prior.prefix().expand(3, -1)


def random_codes(prior, rows):
    return torch.randint(0, prior.codebook_size, (rows, prior.length), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module", params=[(1, 3, 4), (3, 2, 2)], ids=["one codebook", "three codebooks"])
def code_shape(request):
    return request.param


@pytest.fixture(scope="module", params=CONDITIONS)
def condition(request):
    return request.param


@pytest.fixture(scope="module", params=KINDS)
def prior(request, condition, code_shape):
    return make(request.param, condition, code_shape)


def test_a_code_changes_the_logits_after_it_and_no_others(prior):
    codes = random_codes(prior, 1)
    prefix = prefixes(prior)[:1]
    before = prior(prefix, codes)
    for j in range(prior.length):
        changed = codes.clone()
        changed[0, j] = (changed[0, j] + 1) % prior.codebook_size
        moved = (prior(prefix, changed) - before).abs().amax(-1)[0] > 0
        assert not moved[: j + 1].any()
        assert moved[j + 1 :].all()


def test_by_gradient_logits_know_of_the_codes_before_them_alone(prior):
    codes, prefix = random_codes(prior, 2), prefixes(prior)[:2]
    check_gradients(lambda codes: prior(prefix, codes), codes, (codes + 1) % prior.codebook_size)


def test_a_condition_changes_all_logits_and_its_null_is_another(prior):
    codes, prefix = random_codes(prior, 1), prefixes(prior)
    first, second, null = (prior(row, codes) for row in (prefix[:1], prefix[1:2], prior.null_prefix(1)))
    if prior.condition == "none":
        assert torch.equal(first, null)
        return
    for one, other in ((first, second), (first, null)):
        assert ((one - other).abs().amax(-1) > 0).all()


def test_stepwise_log_probabilities_sum_to_the_teacher_forced_ones(prior):
    prefix, codes = prefixes(prior), random_codes(prior, 3)
    forced = prior(prefix, codes).log_softmax(-1).gather(-1, codes.unsqueeze(-1)).sum((1, 2))
    logits, cache = prior.prefill(prefix, prior.length - 1)
    total = torch.zeros(3)
    for t in range(prior.length):
        total += logits.log_softmax(-1).gather(-1, codes[:, t : t + 1])[:, 0]
        if t < prior.length - 1:
            logits = prior.step(codes[:, t], cache)
    torch.testing.assert_close(total, forced, rtol=0, atol=1e-4)


@torch.no_grad()
def test_cached_drawing_equals_uncached(prior):
    """Greedy, so that nothing but the logits decides."""
    scale = 1.0 if prior.condition == "none" else 2.0
    prefix = prefixes(prior)
    drawn = sample(prior, prefix, range(3), Sampling(top_k=1, guidance_scale=scale))
    codes = torch.zeros(3, prior.length, dtype=torch.int64)
    for t in range(prior.length):  # the whole forward pass for every code, nothing remembered
        logits = guide(prior(prefix, codes)[:, t], prior(prior.null_prefix(3), codes)[:, t], scale)
        codes[:, t] = logits.argmax(-1)
    assert torch.equal(drawn, codes)


def test_candidates_equal_single_runs_in_any_batch(prior):
    sampling = Sampling(guidance_scale=1.0 if prior.condition == "none" else 2.5)
    prefix = prefixes(prior)[:2]
    together = sample(prior, prefix, [*range(4), *range(4)], sampling)
    for row in range(8):
        alone = sample(prior, prefix[row // 4 : row // 4 + 1], [row % 4], sampling)
        assert torch.equal(together[row : row + 1], alone)


def test_saved_and_loaded_is_the_same_prior(prior, tmp_path):
    prior.save_pretrained(tmp_path / "prior")
    again = load_prior(tmp_path / "prior")
    prefix, codes = prefixes(prior), random_codes(prior, 3)
    assert torch.equal(prefixes(again), prefix)
    assert torch.equal(again(prefix, codes), prior(prefix, codes))


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_cache_of_a_pixelcnn_is_as_large_as_it_says(name):
    prior = make("pixelcnn", name, (2, 3, 4))
    _, cache = prior.prefill(prefixes(prior)[:1], prior.length - 1)
    tensors = [value for value in vars(cache).values() if isinstance(value, torch.Tensor) and value.ndim > 2]
    assert sum(math.prod(tensor.shape) for tensor in tensors) == prior.cache_numbers()


@pytest.mark.parametrize("kind", KINDS)
def test_a_condition_of_another_kind_or_size_is_refused(kind):
    classes, maps = make(kind, "class", (1, 2, 2)), make(kind, "segmentation", (1, 2, 2))
    with pytest.raises(InputError, match="draws from class labels and was given text"):
        classes.prefix(["a cat"])
    with pytest.raises(InputError, match="draws from class labels and was given no condition"):
        classes.prefix()
    with pytest.raises(InputError, match=r"class labels must be in \[0, 3\), got 3"):
        classes.prefix(classes=[0, 3])
    with pytest.raises(InputError, match=r"codes of a map must be \(B, 2, 2, 2\), got \[1, 1, 2, 2\]"):
        maps.prefix(segmentation=torch.zeros(1, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"codes of a map must be in \[0, 7\), got 0 to 9"):
        maps.prefix(segmentation=torch.tensor([0, 1, 2, 3, 4, 5, 6, 9]).view(1, 2, 2, 2))
    for code in (7, -1):
        with pytest.raises(
            InputError, match=rf"codes of a map must be in \[0, 7\), got {min(code, 0)} to {max(code, 0)}"
        ):
            maps.prefix(segmentation=torch.tensor([0] * 7 + [code]).view(1, 2, 2, 2))
    assert maps.prefix(segmentation=torch.tensor([0] * 7 + [6]).view(1, 2, 2, 2)).shape == (1, 8)
    with pytest.raises(InputError, match="draws from segmentation maps and was given class labels"):
        maps.prefix(classes=[1])


@pytest.mark.parametrize(
    "broken, message",
    [
        ({"condition": "class"}, "needs class_names"),
        ({"condition": "class", "class_names": ["a", "a"]}, "names a class twice"),
        ({"condition": "segmentation", "segmentation_codebook_size": 8}, "needs segmentation_codebook_size and"),
    ],
)
def test_a_config_says_what_its_condition_is(broken, message):
    with pytest.raises(ValueError, match=message):
        PixelCNNConfig.model_validate(broken)


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_a_pixelcnn_layer_sees_what_the_paper_says(kernel_size):
    """One layer: m + 1 rows above, m columns to each side in them, and in its own row m + 1 to the left (figure 1)."""
    prior = make("pixelcnn", "none", (1, 5, 6), depth=1, kernel_size=kernel_size)
    side, (_, height, width) = kernel_size // 2, prior.code_shape
    seen = []
    prior.code_embedding.register_forward_hook(lambda module, given, out: seen.append(out) or out.retain_grad())
    logits = prior(prior.prefix(), random_codes(prior, 1)).view(height, width, -1)
    for row in range(height):
        for column in range(width):
            seen[0].grad = None
            logits[row, column].sum().backward(retain_graph=True)
            found = seen[0].grad.view(height, width, -1).abs().sum(-1) > 0
            for r in range(height):
                for c in range(width):
                    above = row - 1 - side <= r < row and abs(c - column) <= side
                    left = r == row and column - 1 - side <= c < column
                    assert bool(found[r, c]) == (above or left), (row, column, r, c)


def test_a_deep_pixelcnn_has_no_blind_spot():
    prior = make("pixelcnn", "none", (1, 6, 6), depth=7, kernel_size=3)
    seen = []
    prior.code_embedding.register_forward_hook(lambda module, given, out: seen.append(out) or out.retain_grad())
    logits = prior(prior.prefix(), random_codes(prior, 1))
    for t in (7, 20, 35):
        seen[0].grad = None
        logits[0, t].sum().backward(retain_graph=True)
        found = seen[0].grad.view(36, -1).abs().sum(-1) > 0
        assert found[:t].all() and not found[t:].any()


def test_ids_of_no_condition_stand_behind_those_of_the_condition():
    sizes = {"codebook_size": 11, "code_shape": (1, 2, 2), "dim": 16, "depth": 1, "num_heads": 2}
    maps = {"segmentation_codebook_size": 7, "segmentation_code_shape": (2, 3, 5)}
    for config, null, ids, prefix in (
        (GPTConfig(condition="segmentation", **sizes, **maps), 14, 15, 30),
        (GPTConfig(condition="class", class_names=("cat", "dog", "owl"), **sizes), 3, 4, 1),
        (GPTConfig(condition="none", **sizes), 0, 1, 1),
    ):
        assert (config.null_id, config.prefix_vocab_size, config.prefix_length) == (null, ids, prefix)


def test_class_labels_count_from_0():
    device = torch.device("cpu")
    assert class_labels([0, 2], 3, device).tolist() == [[0], [2]]
    for wrong in (-1, 3):
        with pytest.raises(InputError, match=rf"must be in \[0, 3\), got {wrong}"):
            class_labels([0, wrong], 3, device)


@torch.no_grad()
def test_a_map_is_the_sum_of_its_codes_through_residual_convolutions():
    """With kernels that hand each position on as it is, x becomes x + gelu(x), once for each convolution."""
    prior = make("pixelcnn", "segmentation", (1, 4, 4))
    reader = next(module for module in prior.modules() if isinstance(module, ConditionReader))
    for convolution in reader.convolutions:
        torch.nn.init.dirac_(convolution.weight)
        torch.nn.init.zeros_(convolution.bias)
    prefix = prefixes(prior)  # codes (q, h, w) of (2, 2, 2)
    x = reader.embedding(prefix).view(3, 2, 2, 2, -1).sum(3).movedim(-1, 1)  # by position, the codebooks side by side
    x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    for _ in range(2):
        x = x + torch.nn.functional.gelu(x)
    torch.testing.assert_close(reader(prefix), x)


@torch.no_grad()
@pytest.mark.parametrize("code_shape", [(1, 3, 1), (1, 1, 3), (2, 1, 1)])
def test_grids_of_one_row_or_column(code_shape):
    for kind in KINDS:
        prior = make(kind, "class", code_shape)
        check_steps(prior, prefixes(prior), random_codes(prior, 3))
