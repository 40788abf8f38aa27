"""Every kind of tokenizer trains, is measured and goes on after a stop; the discriminator keeps to its time."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import stage2_prior.encode
from stage1_tokenizer import Autoencoder
from stage1_tokenizer.evaluate import evaluate
from stage1_tokenizer.train import TokenizerRecipe, train
from stage2_prior.train import find_image_tokenizer
from tessera.config import read_recipe
from tessera.errors import InputError
from tessera.training.run import Run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with pictures and a recipe at toy size."""
    root = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    rows = []
    for i in range(6):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": [f"a picture {i}"], "split": "train"})
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = {
        "data": {"folder": str(root)},
        "model": {
            "image_size": 16,
            "trunk": {"channels": 8, "multipliers": [1, 2], "encoder_blocks": 1, "decoder_blocks": 1, "latent_dim": 4,
                      "norm_groups": 4},
            "bottleneck": {"type": "vq", "codebook_size": 16},
        },
        "loss": {"adversarial_from": 2, "discriminator_channels": 8, "discriminator_depth": 1},
        "run": {"output": "given by the tests", "steps": 4, "batch_size": 4, "checkpoint_every": 2, "sample_every": 4,
                "log_every": 2},
    }  # fmt: skip
    (root / "tokenizer.yaml").write_text(yaml.safe_dump(recipe))
    return root


def trained(world, folder, *overrides):
    return train(world / "tokenizer.yaml", [f"run.output={folder}", *overrides])


def checkpoint(folder, step=4):
    return torch.load(folder / "checkpoints" / f"step-{step:07d}.pt", weights_only=True)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.bottleneck={type: identity}"],
        ["model.bottleneck={type: gaussian}", "model.pixels=bernoulli", "loss.bernoulli_weight=1"],
        ["model.bottleneck={type: gumbel, codebook_size: 16}", "model.pixels=logit-laplace",
         "loss.logit_laplace_weight=1", "loss.l1_weight=0", "loss.l2_weight=0"],
        ["model.bottleneck={type: hierarchy, codebook_size: 16}"],
        ["model.bottleneck={type: vq, codebook_size: 16, normalize: both, gradient: rotation}",
         "model.trunk.code_dim=3"],
    ],
    ids=lambda overrides: overrides[0].split()[1].strip(",}"),
)  # fmt: skip
def test_every_kind_trains_and_is_measured(world, tmp_path, overrides):
    report = evaluate(trained(world, tmp_path / "run", *overrides), world, batch_size=4)
    continuous = "identity" in overrides[0] or "gaussian" in overrides[0]
    assert report["pictures"] == 6 and report["psnr"] > 0
    assert ("codes_used" in report) == ("perplexity" in report) == (not continuous)
    figures = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert ("perplexity" in figures) == (not continuous)


def test_before_its_start_step_the_discriminator_changes_nothing(world, tmp_path):
    trained(world, tmp_path / "without", "loss.adversarial_weight=0")
    trained(world, tmp_path / "later", "loss.adversarial_from=4", "loss.r1_weight=1")
    trained(world, tmp_path / "warming", "loss.adversarial_from=2", "loss.adversarial_warmup=2")
    without, later, warming = (checkpoint(tmp_path / name) for name in ("without", "later", "warming"))
    for name, tensor in without["autoencoder"].items():
        assert torch.equal(later["autoencoder"][name], tensor), name
        assert torch.equal(warming["autoencoder"][name], tensor), name  # its steps never move the autoencoder
    for name, tensor in without["discriminator"].items():
        assert torch.equal(later["discriminator"][name], tensor), name
    assert any(not torch.equal(warming["discriminator"][n], t) for n, t in without["discriminator"].items())


def test_schedules_and_regularisation_go_on_where_they_were(world, tmp_path, monkeypatch):
    """Killed and resumed equals uninterrupted, with the state that only some kinds have."""
    overrides = [
        "model.bottleneck={type: gumbel, codebook_size: 16, temperature_steps: 4, kl_steps: 4}",
        "loss.adversarial=non-saturating",
        "loss.adversarial_from=0",
        "loss.adversarial_ramp=3",
        "loss.r1_weight=1",
        "loss.lecam_weight=0.1",
    ]
    whole = trained(world, tmp_path / "whole", *overrides)
    update = Run.update

    def killed_in_step_3(self, *arguments):
        if self.step == 3:
            raise KeyboardInterrupt
        update(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "update", killed_in_step_3)
        trained(world, tmp_path / "killed", *overrides)
    resumed = trained(world, tmp_path / "killed", *overrides)
    expected, found = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert found["bottleneck.steps"] == 4
    means = [checkpoint(tmp_path / name)["lecam"]["means"] for name in ("whole", "killed")]
    assert torch.equal(*means) and means[0].any()


def test_codes_of_a_learned_codebook_stay_once_only_the_decoder_learns(world, tmp_path):
    """The exported weights are averages, so the codebook must go on from its average too."""
    overrides = ["run.sample_every=2", "run.ema_decay=0.9"]
    before = Autoencoder.from_pretrained(trained(world, tmp_path / "run", *overrides, "run.steps=2")).fingerprint
    after = trained(world, tmp_path / "run", *overrides, "loss.decoder_only_from=2")
    assert Autoencoder.from_pretrained(after).fingerprint == before


def test_a_likelihood_without_its_decoder_is_refused(world):
    with pytest.raises(InputError, match="loss.bernoulli_weight needs model.pixels=bernoulli, but that is values"):
        read_recipe(TokenizerRecipe, world / "tokenizer.yaml", ["loss.bernoulli_weight=1"])


def test_codes_of_a_continuous_tokenizer_are_refused(world, tmp_path):
    model = trained(world, tmp_path / "run", "model.bottleneck={type: gaussian}")
    recipe = {"data": {"folder": str(world)}, "image_tokenizer": str(model), "output": str(tmp_path / "codes")}
    (tmp_path / "encode.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(InputError, match="is continuous and has no codes"):
        stage2_prior.encode.encode(tmp_path / "encode.yaml")
    assert not (tmp_path / "codes").exists()
    with pytest.raises(InputError, match="is continuous and has no codes"):
        find_image_tokenizer(model, None, None)
