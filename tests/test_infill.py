"""Priors in random order: each code knows of those read before it alone; gaps are filled with both sides in view."""

import math

import pytest
import torch
import torch.nn.functional as F

from stage2_prior import GPTConfig, GPTPrior, Sampling, infill, sample
from stage2_prior.infill import InfillPrior
from stage2_prior.pixelcnn import PixelCNNConfig, PixelCNNPrior
from stage2_prior.train import random_order, raster_share
from tessera.errors import InputError
from tests.prior_laws import check_gradients


def tiny(order="random", code_shape=(2, 2, 3), seed=0, **options):
    torch.manual_seed(seed)
    config = GPTConfig(codebook_size=9, code_shape=code_shape, text_vocab_size=9, text_length=3, dim=16, depth=2,
                       num_heads=2, order=order, **options)  # fmt: skip
    prior = GPTPrior(config).eval()
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return prior


@pytest.fixture(params=["learned", "rotary-2d"])
def prior(request):
    return tiny(positions=request.param)


KNOWN = torch.tensor([[True, False, True], [False, False, True]])


@torch.no_grad()
def test_logits_depend_on_what_is_read_before_alone(prior):
    prefix, codes = prior.pad([[4]]), torch.randint(0, 9, (1, prior.length))
    order = torch.randperm(6).unsqueeze(0)
    sequence = [2 * place + q for place in order[0].tolist() for q in range(2)]  # the codes as they are read
    before = prior(prefix, codes, order)
    for when, code in enumerate(sequence):
        changed = codes.clone()
        changed[0, code] = (changed[0, code] + 1) % 9
        moved = (prior(prefix, changed, order) - before).abs().amax(-1)[0] > 1e-6
        assert not moved[sequence[: when + 1]].any() and moved[sequence[when + 1 :]].all()


def test_by_gradient_logits_know_of_what_is_read_before_alone(prior):
    prefix, codes = prior.pad([[4]]), torch.randint(0, 9, (1, prior.length))
    order = torch.randperm(6).unsqueeze(0)
    read = [2 * place + q for place in order[0].tolist() for q in range(2)]
    check_gradients(lambda codes: prior(prefix, codes, order), codes, (codes + 1) % 9, read)


@torch.no_grad()
def test_drawn_step_by_step_the_odds_are_the_teacher_forced_ones(prior):
    prefix, codes = prior.pad([[4], [5, 6]]), torch.randint(0, 9, (2, prior.length))
    order = torch.stack([torch.randperm(6), torch.randperm(6)])
    forced = prior(prefix, codes, order).log_softmax(-1).gather(-1, codes.unsqueeze(-1)).sum((1, 2))
    read = codes.view(2, 6, 2).take_along_dim(order.unsqueeze(2), 1).flatten(1)
    logits, cache = prior.prefill(prefix, prior.length - 1, order=order)
    total = torch.zeros(2)
    for t in range(prior.length):
        total += logits.log_softmax(-1).gather(-1, read[:, t : t + 1])[:, 0]
        if t < prior.length - 1:
            logits = prior.step(read[:, t], cache)
    torch.testing.assert_close(total, forced, rtol=0, atol=1e-4)


@torch.no_grad()
def test_an_infill_keeps_what_is_known_and_draws_as_without_a_cache(prior):
    prefix, codes = prior.pad([[4]]), torch.randint(0, 9, prior.code_shape)
    filled = infill(prior, prefix, codes, KNOWN, range(6), Sampling(guidance_scale=1.5))
    assert filled.shape == (6, *prior.code_shape)
    assert (filled[:, :, KNOWN] == codes[:, KNOWN]).all() and len(filled.unique(dim=0)) > 1
    alone = infill(prior, prefix, codes, KNOWN, [4], Sampling(guidance_scale=1.5))
    assert torch.equal(alone[0], filled[4])
    blanked = codes.masked_fill(~KNOWN, 10**6)  # what stands in a gap is not looked at
    assert torch.equal(infill(prior, prefix, blanked, KNOWN, [4], Sampling(guidance_scale=1.5)), alone)

    infilling = InfillPrior(prior, codes, KNOWN)
    greedy = sample(infilling, prefix, [0], Sampling(top_k=1))
    logits = infilling(prefix, greedy)
    assert torch.equal(logits.argmax(-1), greedy)
    order = torch.tensor([[0, 2, 5, 1, 3, 4]])  # known first, each part row after row
    whole = infill(prior, prefix, codes, KNOWN, [0], Sampling(top_k=1)).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(logits[0], prior(prefix, whole, order)[0, [2, 3, 6, 7, 8, 9]])


@torch.no_grad()
def test_a_prior_in_raster_order_completes_what_comes_last():
    prior = tiny("raster", attention=("row", "full"))
    prefix, codes = prior.pad([[4]]), torch.randint(0, 9, prior.code_shape)
    known = torch.tensor([[True, True, True], [True, False, False]])
    filled = infill(prior, prefix, codes, known, range(3))
    assert (filled[:, :, known] == codes[:, known]).all()
    likely = prior(prefix, filled.permute(0, 2, 3, 1).flatten(1)[:1])[0, 8:]
    torch.testing.assert_close(InfillPrior(prior, codes, known)(prefix, filled[:1, :, 1, 1:].mT.flatten(1))[0], likely)
    with pytest.raises(InputError, match="train a GPT with model.order=random"):
        infill(prior, prefix, codes, KNOWN, [0])
    pixelcnn = PixelCNNPrior(PixelCNNConfig(codebook_size=9, code_shape=(2, 2, 3), condition="none", dim=8, depth=1))
    with pytest.raises(InputError, match="train a GPT with model.order=random"):
        infill(pixelcnn, pixelcnn.prefix(), codes, known, [0])


@pytest.mark.parametrize(
    ("codes", "known", "sentence"),
    [
        (torch.zeros(1, 2, 3), KNOWN, r"codes must be \(2, 2, 3\)"),
        (torch.zeros(2, 2, 3), KNOWN.T, r"known \(2, 3\)"),
        (torch.zeros(2, 2, 3), KNOWN.int(), "of true and false"),
        (torch.zeros(2, 2, 3), KNOWN | True, "nothing to draw"),
        (torch.full((2, 2, 3), 9), KNOWN, r"must be in \[0, 9\), got 9 to 9"),
    ],
)
def test_what_cannot_be_filled_is_refused(codes, known, sentence):
    prior = tiny()
    with pytest.raises(InputError, match=sentence):
        infill(prior, prior.pad([[]]), codes.long(), known, [0])


def test_orders_are_permutations_and_give_way_to_rows():
    torch.manual_seed(0)
    orders = random_order(400, 6, 0.25, torch.device("cpu"))
    assert torch.equal(orders.sort(1).values, torch.arange(6).expand(400, -1))
    rows = (orders == torch.arange(6)).all(1).float().mean()
    assert abs(float(rows) - 0.25) < 0.06
    assert [raster_share(p, (0.5, 0.75)) for p in (0.0, 0.5, 0.625, 0.75, 1.0)] == [0, 0, 0.5, 1, 1]
    assert raster_share(0.999, (1.0, 1.0)) == 0


def test_with_both_sides_known_a_gap_is_foretold_better_than_from_the_left():
    """Codes that go one up or one down: from the left the next is a coin, ln 2 nats. Where the code after it is known
    as well, it is sure in half of the cases and a coin in the others: half of that."""
    torch.manual_seed(0)
    length, ring = 6, 8

    def walks(rows):
        steps = torch.randint(0, 2, (rows, length)) * 2 - 1
        steps[:, 0] = torch.randint(0, ring, (rows,))
        return steps.cumsum(1) % ring

    config = GPTConfig(codebook_size=ring, code_shape=(1, 1, length), text_vocab_size=4, text_length=2, dim=48, depth=2,
                       num_heads=2, order="random")  # fmt: skip
    prior = GPTPrior(config)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for step in range(500):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 500)
        codes = walks(128)
        logits = prior(prior.null_prefix(128), codes, random_order(128, length, 0.0, codes.device))
        loss = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    prior.eval()
    codes, place = walks(512), 3
    with torch.no_grad():
        nats = {}
        for name, order in {"left": [0, 1, 2, 3, 4, 5], "both": [0, 1, 2, 4, 5, 3]}.items():
            logits = prior(prior.null_prefix(512), codes, torch.tensor(order).expand(512, -1))
            nats[name] = float(F.cross_entropy(logits[:, place], codes[:, place]))
    assert abs(nats["left"] - math.log(2)) < 0.06 and abs(nats["both"] - math.log(2) / 2) < 0.1

    known = torch.tensor([[True, True, True, False, True, True]])
    forced = torch.tensor([0, 1, 2, 0, 4, 5]).view(1, 1, length)  # only a 3 can stand between 2 and 4
    filled = infill(prior, prior.null_prefix(1), forced, known, range(20))
    assert (filled[:, 0, 0, 3] == 3).float().mean() >= 0.9
