"""The codebook doctor: what it counts, when it acts, and that a collapsed codebook recovers."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from stage1_tokenizer import Autoencoder
from stage1_tokenizer.bottlenecks import HierarchyConfig, ResidualConfig, VQConfig, VQEMAConfig, build_bottleneck
from stage1_tokenizer.doctor import LEAST_SHARE, Doctor, DoctorConfig
from stage1_tokenizer.doctor_page import evaluating, exemplars
from stage1_tokenizer.evaluate import evaluate
from stage1_tokenizer.train import TokenizerRecipe, train
from tessera.config import read_recipe
from tessera.errors import InputError
from tessera.training.optimizers import OptimizerConfig, Optimizers
from tessera.training.run import Run
from tests.processes import run_processes

PLENTY = torch.arange(16).repeat(64).view(1, 1, 32, 32)  # 64 uses of each of 16 codes


def doctor_of(bottleneck=None, **config):
    bottleneck = bottleneck or VQConfig(codebook_size=16, patience=0)
    built = build_bottleneck(bottleneck, 4)
    return Doctor(DoctorConfig(**{"every": 1, "window": 2, "patience": 5, **config}), built, torch.device("cpu")), built


def visits(doctor, bottleneck, codes, psnr=20.0, adversarial=False, times=1):
    for _ in range(times):
        doctor.observe(bottleneck, codes, torch.tensor([psnr]))
        found = doctor.visit(len(doctor.visits) + 1, bottleneck, adversarial)
    return found


def test_use_is_counted_over_the_window_alone():
    doctor, vq = doctor_of(acts=False)
    few = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    assert visits(doctor, vq, PLENTY).used == 1 and visits(doctor, vq, few).used == 1
    found = visits(doctor, vq, few)
    assert found.used == 1 / 16 and found.dead == 15 and found.perplexity == 1 and doctor.actions == []
    assert doctor.counts.tolist() == [[32] + 15 * [0]]


def test_the_bottom_of_a_hierarchy_is_one_codebook():
    doctor, hierarchy = doctor_of(HierarchyConfig(codebook_size=16))
    codes = torch.stack([torch.full((4, 4), i) for i in range(5)])[None]  # top 0, bottom 1 to 4
    found = visits(doctor, hierarchy, codes)
    assert doctor.counts.shape == (2, 16) and found.dead == 15 + 12
    assert doctor.counts[1, 1:5].tolist() == 4 * [16] and found.perplexity == pytest.approx((1 + 4) / 2)


def test_a_code_does_not_count_as_used_in_the_step_that_revived_it():
    doctor, vq = doctor_of(VQConfig(codebook_size=4, patience=1))
    z = torch.randn(1, 4, 4, 4)
    doctor.observe(vq, vq(z).codes, torch.tensor([20.0]))
    assert doctor.blocks.sum() == 0 and doctor.revived == 4  # the first step started all four from data
    codes = vq(z).codes
    doctor.observe(vq, codes, torch.tensor([20.0]))
    back = vq.revival.revived
    assert doctor.blocks.sum() == 16 - torch.isin(codes, back).sum() and doctor.blocks[:, 0, back].sum() == 0


def test_a_healthy_codebook_is_left_alone():
    doctor, vq = doctor_of()
    visits(doctor, vq, PLENTY, times=10)
    assert doctor.actions == [] and doctor.patience is None


def test_unused_codes_are_revived_and_when_that_does_not_help_the_learning_rate_falls():
    doctor, vq = doctor_of()
    few = PLENTY % 4
    visits(doctor, vq, few)
    assert doctor.actions == []  # not yet a window
    visits(doctor, vq, few)
    (first,) = doctor.actions
    assert first.what == "revive codes after 5 steps without use"
    assert first.why == "25.0% of the codes were used in the last 2 steps, 12 were not, and revival was off"
    optimizers = Optimizers(nn.Linear(2, 2), OptimizerConfig(), 10)
    doctor.treat(optimizers)
    assert vq.revival.patience == 5 and optimizers.share == 1
    visits(doctor, vq, few)
    assert len(doctor.actions) == 1  # a whole window for it to work
    visits(doctor, vq, few)
    assert doctor.actions[1].what == "learning rate down to 0.5 of the schedule"
    doctor.treat(optimizers)
    assert optimizers.share == 0.5
    visits(doctor, vq, few, times=100)
    assert doctor.learning_rate_share == LEAST_SHARE


@pytest.mark.parametrize("reason", ["too few vectors", "codes are settled", "only watching"])
def test_when_the_doctor_does_nothing(reason):
    doctor, vq = doctor_of(acts=reason != "only watching")
    codes = torch.zeros(1, 1, 2, 2, dtype=torch.int64) if reason == "too few vectors" else PLENTY % 4
    vq.train(reason != "codes are settled")
    visits(doctor, vq, codes, times=6)
    assert doctor.actions == [] and doctor.visits[-1].dead >= 12


def test_the_discriminator_is_turned_down_while_pictures_are_worse_and_up_again():
    doctor, vq = doctor_of()
    visits(doctor, vq, PLENTY, 20.0)
    visits(doctor, vq, PLENTY, 16.0, adversarial=True)
    assert doctor.adversarial_share == 0.5 and "4.0 below the best" in doctor.actions[0].why
    visits(doctor, vq, PLENTY, 19.5, adversarial=True, times=2)
    assert doctor.adversarial_share == 1 and [a.what for a in doctor.actions] == [
        "discriminator down to 0.5 of its weight",
        "discriminator up to 1 of its weight",
    ]
    visits(doctor, vq, PLENTY, 10.0, times=2)
    assert doctor.learning_rate_share == 0.5
    visits(doctor, vq, PLENTY, 10.0, times=100)
    assert doctor.learning_rate_share == LEAST_SHARE and doctor.adversarial_share == 1  # nobody to turn down
    visits(doctor, vq, PLENTY, 10.0, adversarial=True, times=100)
    assert doctor.learning_rate_share == LEAST_SHARE == doctor.adversarial_share


def test_losses_that_join_are_not_an_illness():
    doctor, vq = doctor_of()
    visits(doctor, vq, PLENTY, 20.0)
    doctor.observe(vq, PLENTY, torch.tensor([15.0]))
    doctor.visit(2, vq, False, compared_from=1)
    assert doctor.actions == []


@pytest.mark.parametrize("config", [VQEMAConfig(codebook_size=16), ResidualConfig(codebook_size=16)])
def test_all_that_the_doctor_knows_is_in_its_state(config, tmp_path):
    doctor, bottleneck = doctor_of(config)
    codes = PLENTY.expand(1, bottleneck.num_codebooks, 32, 32) % 4
    visits(doctor, bottleneck, codes, times=5)
    doctor.observe(bottleneck, codes, torch.tensor([3.0]))
    torch.save(doctor.state_dict(), tmp_path / "state.pt")
    again, _ = doctor_of(config)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for one in (doctor, again):
        visits(one, bottleneck, codes, 2.0, times=3)
    assert again.visits == doctor.visits and again.actions == doctor.actions and again.actions
    assert torch.equal(again.blocks, doctor.blocks)
    other, _ = doctor_of(VQConfig(codebook_size=8))
    with pytest.raises(ValueError, match="were counted as"):
        other.load_state_dict(doctor.state_dict())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures with smooth colours, and a recipe built to collapse: plain VQ, far more codes than live, no revival."""
    root = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    for i in range(32):
        corners = Image.fromarray(random.integers(0, 255, (3, 3, 3), dtype=np.uint8))
        corners.resize((16, 16), Image.Resampling.BICUBIC).save(root / f"{i}.png")
    recipe = {
        "data": {"folder": str(root)},
        "model": {
            "image_size": 16,
            "trunk": {"channels": 16, "multipliers": [1, 2], "encoder_blocks": 1, "decoder_blocks": 1, "latent_dim": 4,
                      "norm_groups": 4, "attention": False},
            "bottleneck": {"type": "vq", "codebook_size": 512, "patience": 0},
        },
        "loss": {"adversarial_weight": 0},
        "doctor": {"every": 10, "window": 20, "patience": 10},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 0},
        "run": {"output": "given by the tests", "steps": 160, "batch_size": 16, "checkpoint_every": 80,
                "sample_every": 160, "log_every": 20, "ema_decay": 0.5},
    }  # fmt: skip
    (root / "tokenizer.yaml").write_text(yaml.safe_dump(recipe))
    return root


def test_a_codebook_built_to_collapse_recovers(world, tmp_path, capsys):
    used = {}
    for acts in (False, True):
        folder = train(world / "tokenizer.yaml", [f"run.output={tmp_path}/{acts}", f"doctor.acts={acts}"])
        used[acts] = evaluate(folder, world)["codes_used"]
    assert used[False] < 0.1 and used[True] > 0.9
    said = capsys.readouterr().err
    assert re.search(r"doctor, step 20: revive codes after 10 steps without use, because \d\.\d% of the codes", said)
    rows = [json.loads(line) for line in (tmp_path / "True" / "metrics.jsonl").read_text().splitlines()]
    logged = [row["codebook/used"] for row in rows if "codebook/used" in row]
    assert logged[0] < 0.1 and logged[-1] > 0.9 and len(logged) == 16


def test_the_page_shows_it_all_and_needs_no_other_file(world, tmp_path):
    train(world / "tokenizer.yaml", [f"run.output={tmp_path}", "run.steps=40", "doctor.codes_shown=20"])
    text = (tmp_path / "doctor.html").read_text()
    assert text.count("data:image/png;base64,") > 0 and not re.search(r"(src|href)=.(?!data:)", text)
    assert "revive codes after 10 steps without use" in text and "revival was off" in text
    assert re.search(r"[\d,]+ of 512 codes in use; half of all uses fall on", text)
    assert 1 <= text.count("<figcaption>") - 3 <= 20


@torch.no_grad()
def test_exemplars_are_pixels_that_chose_the_code(world, tmp_path):
    recipe = read_recipe(TokenizerRecipe, world / "tokenizer.yaml", [f"run.output={tmp_path}"])
    from tessera.data.source import ImageFolder

    autoencoder, data = Autoencoder(recipe.model), ImageFolder(world, 16)
    autoencoder.bottleneck.eval()
    before = [part.training for part in autoencoder.modules()]
    found = exemplars(autoencoder, data)
    assert [part.training for part in autoencoder.modules()] == before
    with evaluating(autoencoder):
        codes = autoencoder.encode(torch.stack([data.read(i) for i in range(len(data))]))
    assert {code for _, code in found} == set(codes.unique().tolist())
    first = int(codes[0, 0, 0, 0])
    expected = Image.open(data.items[0].path).crop((0, 0, 2, 2))
    assert found[0, first][0].tobytes() == expected.tobytes()


def test_killed_and_resumed_the_doctor_goes_on_where_it_was(world, tmp_path, monkeypatch):
    short = ["run.steps=40", "run.checkpoint_every=15"]
    whole = train(world / "tokenizer.yaml", [f"run.output={tmp_path}/whole", *short])
    update = Run.update

    def killed_in_step_34(self, *arguments):
        if self.step == 34:
            raise KeyboardInterrupt
        update(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "update", killed_in_step_34)
        train(world / "tokenizer.yaml", [f"run.output={tmp_path}/killed", *short])
    resumed = train(world / "tokenizer.yaml", [f"run.output={tmp_path}/killed", *short])
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (tmp_path / "killed" / "doctor.html").read_text() == (tmp_path / "whole" / "doctor.html").read_text()


def test_a_window_of_half_a_visit_is_refused(world):
    with pytest.raises(InputError, match="window must be a multiple of every, 10; got 25"):
        read_recipe(TokenizerRecipe, world / "tokenizer.yaml", ["doctor.window=25"])


RANK = """
import hashlib, json, sys
from pathlib import Path
import stage1_tokenizer.train as training
made = []
class Kept(training.Autoencoder):
    def __init__(self, config):
        super().__init__(config)
        made.append(self)
training.Autoencoder = Kept
training.train(sys.argv[1], sys.argv[3:])
sha = hashlib.sha256()
for name, tensor in sorted(made[0].bottleneck.state_dict().items()):
    sha.update(name.encode() + tensor.numpy().tobytes())
revival = made[0].bottleneck.revival
Path(sys.argv[2]).write_text(json.dumps([sha.hexdigest(), revival.patience, revival.unused_steps.tolist()]))
"""


@pytest.mark.parametrize("kind", ["vq", "vq-ema"])
def test_two_processes_keep_one_codebook_and_prescribe_alike(world, tmp_path, kind):
    """Each sees its own pictures; codes are revived, and the doctor acts, from sums over both."""
    overrides = ["run.steps=40", "run.sample_every=40", "doctor.patience=5", f"model.bottleneck.type={kind}"]
    run_processes(RANK, world / "tokenizer.yaml", f"{tmp_path}/{{rank}}.json", f"run.output={tmp_path}/run", *overrides)
    (first, patience, unused), second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert second == [first, patience, unused]
    assert patience == 5 and max(unused) <= 5  # the recipe has no revival: the doctor prescribed it, to both
    shards = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(shards[-1])["step"] == 40


def test_the_discriminator_is_turned_up_once_half_of_what_was_lost_is_back():
    doctor, vq = doctor_of(largest_fall=2.0)
    visits(doctor, vq, PLENTY, 20.0)
    visits(doctor, vq, PLENTY, 17.0, adversarial=True)
    for psnr in (18.5, 18.9):  # 1.5 and 1.1 below the best, of which 1 is half of the largest fall
        visits(doctor, vq, PLENTY, psnr, adversarial=True, times=3)
        assert doctor.adversarial_share == 0.5
    visits(doctor, vq, PLENTY, 19.0, adversarial=True)
    assert doctor.adversarial_share == 1
