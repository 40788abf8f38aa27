"""What release 0.1 wrote still loads, and means what it meant: a tiny prior of every kind, with logits it gave then."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stage2_prior import load_prior
from stage2_prior.load import KINDS
from tests.prior_laws import check_steps

GOLDEN = Path(__file__).parent / "golden" / "release_0_1"


@pytest.mark.parametrize("kind", KINDS)
def test_a_prior_of_release_0_1_gives_the_logits_of_then(kind: str, tmp_path: Path) -> None:
    expected = load_file(GOLDEN / f"{kind}.safetensors")
    prior = load_prior(GOLDEN / kind)
    with torch.no_grad():
        logits = prior(expected["prefix"], expected["codes"])
        torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-5)
        check_steps(prior, expected["prefix"], expected["codes"])

        prior.save_pretrained(tmp_path / "again")
        again = load_prior(tmp_path / "again")
        assert torch.equal(again(expected["prefix"], expected["codes"]), logits)
    assert set(load_file(tmp_path / "again" / "model.safetensors")) == set(prior.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_are_joined_may_be_in_several_files(kind: str, tmp_path: Path) -> None:
    state, folder = load_file(GOLDEN / kind / "model.safetensors"), tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_bytes((GOLDEN / kind / "config.json").read_bytes())
    names = sorted(state)
    shards = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in shards.items():
        save_file({name: state[name] for name in part}, folder / file)
    index = ", ".join(f'"{name}": "{file}"' for file, part in shards.items() for name in part)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {' + index + "}}")
    whole, sharded = load_prior(GOLDEN / kind), load_prior(folder)
    assert all(torch.equal(weight, sharded.state_dict()[name]) for name, weight in whole.state_dict().items())


def test_a_weight_too_many_or_too_few_is_still_an_error(tmp_path: Path) -> None:
    from tessera.errors import InputError

    for change in ("lost", "added"):
        state, folder = load_file(GOLDEN / "janus" / "model.safetensors"), tmp_path / change
        folder.mkdir()
        (folder / "config.json").write_bytes((GOLDEN / "janus" / "config.json").read_bytes())
        if change == "lost":
            del state["language_model.layers.1.self_attn.k_proj.weight"]
        else:
            state["blocks.7.extra"] = torch.ones(1)
        save_file(state, folder / "model.safetensors")
        with pytest.raises(InputError, match="cannot be loaded"):
            load_prior(folder)
