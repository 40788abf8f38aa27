"""Weights that are loaded need no random start, and give the same model without one."""

from pathlib import Path

import torch
from torch import nn

from common.text import TextTokenizer
from common.weights import Unfilled
from stage1_tokenizer import Autoencoder
from stage2_prior import load_prior
from tests.conftest import tiny_autoencoder, tiny_prior


def test_modules_are_built_without_random_numbers() -> None:
    before = torch.get_rng_state()
    with Unfilled():
        model = nn.Sequential(nn.Linear(3, 4), nn.Conv2d(3, 4, 3), nn.Embedding(5, 2), nn.MultiheadAttention(8, 2))
        assert torch.equal(torch.ones(2) + torch.ones(2), torch.full((2,), 2.0))  # all else is as ever
    assert torch.equal(torch.get_rng_state(), before)
    assert [tuple(weight.shape) for weight in model[0].parameters()] == [(4, 3), (4,)]
    nn.Linear(3, 4)
    assert not torch.equal(torch.get_rng_state(), before)


def test_loading_fills_everything(tiny_parts: Path, tiny_text_tokenizer: TextTokenizer) -> None:
    autoencoder = tiny_autoencoder()
    pairs = [
        (Autoencoder.from_pretrained(tiny_parts / "image_tokenizer"), autoencoder),
        (load_prior(tiny_parts / "prior"), tiny_prior(autoencoder, tiny_text_tokenizer)),
    ]
    for loaded, made in pairs:
        expected, found = made.state_dict(), loaded.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
