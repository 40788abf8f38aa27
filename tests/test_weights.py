"""Weights that are loaded need no random start, and give the same model without one; where a model is looked for."""

from pathlib import Path

import pytest
import torch
from torch import nn

from stage1_tokenizer import Autoencoder
from stage2_prior import load_prior
from tessera.errors import InputError
from tessera.text import TextTokenizer
from tessera.weights.folder import Unfilled, find_folder
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


@pytest.mark.parametrize("name", ["model", "./model", "../model", "~/model", "a/b/c", "/model", "owner/"])
def test_what_cannot_be_a_hub_name_is_not_looked_up(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *arguments, **options: pytest.fail("looked up"))
    with pytest.raises(InputError, match="is neither an existing folder nor a hub name like 'owner/model'"):
        find_folder(name)


def test_a_folder_is_found_and_a_hub_name_is_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: f"/cache/{name}")
    assert find_folder("owner/model") == Path("owner/model") and find_folder(tmp_path) == tmp_path
    assert find_folder("owner/other") == Path("/cache/owner/other")
