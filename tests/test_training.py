"""Law 6 on one process: killed and resumed, training ends bit-equal to a run that was never interrupted."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import rerank.train
import stage1_tokenizer.train
import stage2_prior.encode
import stage2_prior.train
import stage2_prior.train_text
from stage2_prior import GPTConfig, GPTPrior, load_prior
from stage2_prior.codes import CodesBatch
from tessera.errors import InputError
from tessera.training.optimizers import OptimizerConfig, Optimizers, schedule
from tessera.training.run import Run, RunConfig, TrainingError
from tests.processes import run_processes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with pictures, a text tokenizer, and a recipe of each stage at toy size."""
    root = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    rows = []
    for i in range(10):
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "text": [f"a picture {i}", f"number {i}"], "split": "train"})
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    run = {"steps": 6, "batch_size": 4, "checkpoint_every": 3, "sample_every": 6, "log_every": 2}
    data = {"folder": str(root)}
    recipes = {
        "text": {"data": data, "vocab_size": 280, "output": str(root / "text")},
        "tokenizer": {
            "data": data,
            "model": {
                "image_size": 32,
                "trunk": {"channels": 8, "multipliers": [1, 2], "encoder_blocks": 1, "decoder_blocks": 1,
                          "patch_size": 2, "latent_dim": 4, "norm_groups": 4, "dropout": 0.1},
                "bottleneck": {"type": "vq-ema", "codebook_size": 32, "patience": 2},
            },
            "loss": {"adversarial_from": 2, "discriminator_channels": 8, "discriminator_depth": 1,
                     "decoder_only_from": 4},
            "run": run,
        },
        "reranker": {
            "data": data,
            "text_tokenizer": str(root / "text"),
            "model": {"embed_dim": 8,
                      "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
                      "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 1}},
            "wrong_captions": 1,
            "run": run,
        },
        "encode": {"data": data, "image_tokenizer": str(root / "tokenizer" / "model"), "output": str(root / "codes"),
                   "shard_rows": 4, "batch_size": 3},
        "prior": {
            "codes": str(root / "codes"),
            "text_tokenizer": str(root / "text"),
            "image_tokenizer": str(root / "tokenizer" / "model"),
            "model": {"text_length": 8, "dim": 16, "depth": 2, "num_heads": 2, "dropout": 0.1},
            "optimizer": {"type": "muon"},
            "run": run,
        },
    }  # fmt: skip
    for name, recipe in recipes.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    stage2_prior.train_text.train(root / "text.yaml")
    stage1_tokenizer.train.train(root / "tokenizer.yaml", [f"run.output={root}/tokenizer"])
    stage2_prior.encode.encode(root / "encode.yaml")
    return root


def weights(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


@pytest.mark.parametrize("stage", ["tokenizer", "reranker", "prior"])
def test_killed_and_resumed_equals_uninterrupted(world, tmp_path, monkeypatch, stage):
    train = {
        "tokenizer": stage1_tokenizer.train.train,
        "reranker": rerank.train.train,
        "prior": stage2_prior.train.train,
    }[stage]
    whole = train(world / f"{stage}.yaml", [f"run.output={tmp_path}/whole"])

    update = Run.update

    def killed_in_step_5(self, *arguments):
        if self.step == 5:
            raise KeyboardInterrupt
        update(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "update", killed_in_step_5)
        train(world / f"{stage}.yaml", [f"run.output={tmp_path}/killed"])
    assert [p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()] == ["step-0000003.pt"]
    resumed = train(world / f"{stage}.yaml", [f"run.output={tmp_path}/killed"])

    expected, found = weights(whole), weights(resumed)
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


def test_a_reranker_goes_on_from_its_weights(world, tmp_path):
    before = rerank.train.train(world / "reranker.yaml", [f"run.output={tmp_path}/before"])
    recipe = yaml.safe_load((world / "reranker.yaml").read_text())
    del recipe["model"]
    recipe |= {"reranker": str(before), "run": recipe["run"] | {"output": str(tmp_path / "after"), "ema_decay": 0.0}}
    (tmp_path / "after.yaml").write_text(yaml.safe_dump(recipe))
    after = rerank.train.train(tmp_path / "after.yaml", ["run.steps=1", "optimizer.learning_rate=1e-12"])
    expected, found = weights(before), weights(after)
    assert expected.keys() == found.keys()
    for name in expected:
        if "running" not in name and "num_batches" not in name:  # of the batches seen, not learned
            assert torch.equal(expected[name], found[name]), name

    with pytest.raises(InputError, match="leave out model"):
        rerank.train.train(world / "reranker.yaml", [f"reranker={before}", f"run.output={tmp_path}/both"])
    other = stage2_prior.train_text.train(world / "text.yaml", ["vocab_size=270", f"output={tmp_path}/text"])
    with pytest.raises(InputError, match="another text tokenizer"):
        rerank.train.train(tmp_path / "after.yaml", [f"text_tokenizer={other}", f"run.output={tmp_path}/text-run"])


def test_codes_stay_what_they_are_once_only_the_decoder_learns(world, tmp_path):
    short = stage1_tokenizer.train.train(
        world / "tokenizer.yaml",
        [f"run.output={tmp_path}/run", "run.sample_every=4", "run.checkpoint_every=4", "run.steps=4"],
    )
    before = stage1_tokenizer.Autoencoder.from_pretrained(short)
    kept = before.fingerprint, before.decoder.conv_out.weight.clone()
    after = stage1_tokenizer.Autoencoder.from_pretrained(
        stage1_tokenizer.train.train(world / "tokenizer.yaml", [f"run.output={tmp_path}/run"])
    )
    assert after.fingerprint == kept[0]
    assert not torch.equal(after.decoder.conv_out.weight, kept[1])


def test_not_a_number_stops_with_the_step_and_keeps_the_checkpoint(world, tmp_path):
    overrides = [f"run.output={tmp_path}/run", "optimizer.learning_rate=1e30", "run.checkpoint_every=1"]
    with pytest.raises(TrainingError, match=r"step \d: the loss is .* not finite"):
        stage2_prior.train.train(world / "prior.yaml", overrides)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert torch.load(newest, weights_only=True)["step"] >= 1


@pytest.mark.parametrize("stage", ["tokenizer", "reranker", "prior"])
def test_not_a_number_leaves_its_batch(world, tmp_path, monkeypatch, stage):
    train = {
        "tokenizer": stage1_tokenizer.train.train,
        "reranker": rerank.train.train,
        "prior": stage2_prior.train.train,
    }[stage]
    seen, backward = [], Run.backward

    def bad_in_step_2(self, loss):
        seen.append(self._batch)
        backward(self, loss * torch.nan if self.step == 2 else loss)

    monkeypatch.setattr(Run, "backward", bad_in_step_2)
    with pytest.raises(TrainingError, match=r"step 2: the loss is nan.*not-finite-0000002.safetensors.*learning_rate"):
        train(world / f"{stage}.yaml", [f"run.output={tmp_path}/run"])
    path = tmp_path / "run" / "not-finite-0000002.safetensors"
    name = "codes" if stage == "prior" else "images"
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor(name), getattr(seen[-1], name))
        facts = {key: json.loads(value) for key, value in file.metadata().items()}
    assert facts["captions"] == seen[-1].captions and facts["step"] == 2 and facts["loss"] == "nan"


def test_a_batch_that_is_itself_not_finite_is_named(world, tmp_path, monkeypatch):
    batch = stage1_tokenizer.train.ImageFolder.batch

    def spoiled(self, *arguments):
        drawn = batch(self, *arguments)
        return drawn._replace(images=drawn.images.index_fill(0, torch.tensor([1]), torch.inf))

    monkeypatch.setattr(stage1_tokenizer.train.ImageFolder, "batch", spoiled)
    with pytest.raises(TrainingError, match="step 0: .* images in the batch is not finite either: mend the data"):
        stage1_tokenizer.train.train(world / "tokenizer.yaml", [f"run.output={tmp_path}/run"])


def test_a_checkpoint_of_another_recipe_is_refused(world, tmp_path):
    stage2_prior.train.train(world / "prior.yaml", [f"run.output={tmp_path}/run"])
    with pytest.raises(InputError, match="model.dim has changed: it was 16 when the .* were written and is 32 now"):
        stage2_prior.train.train(world / "prior.yaml", [f"run.output={tmp_path}/run", "model.dim=32", "run.steps=9"])


def test_a_prior_goes_on_from_the_weights_of_another(world, tmp_path):
    first = stage2_prior.train.train(world / "prior.yaml", [f"run.output={tmp_path}/first"])
    still = ["run.steps=1", "optimizer.learning_rate=1e-9", f"run.output={tmp_path}/second"]
    second = stage2_prior.train.train(world / "prior.yaml", [f"prior={first}", *still])
    for name, tensor in weights(first).items():
        torch.testing.assert_close(weights(second)[name], tensor, msg=name)


def test_a_prior_begins_with_the_trunk_of_one_of_other_codes(world, tmp_path):
    first = stage2_prior.train.train(world / "prior.yaml", [f"run.output={tmp_path}/first"])
    other = json.loads((world / "codes" / "meta.json").read_text())
    other |= {"tokenizer_fingerprint": "another", "codebook_size": 50}
    shutil.copytree(world / "codes", tmp_path / "codes")
    (tmp_path / "codes" / "meta.json").write_text(json.dumps(other))
    still = ["run.steps=1", "optimizer.learning_rate=1e-9", f"codes={tmp_path}/codes", "image_tokenizer=null"]
    second = stage2_prior.train.train(world / "prior.yaml", [f"trunk={first}", *still, f"run.output={tmp_path}/second"])
    known, now = weights(first), weights(second)
    assert known.keys() == now.keys()
    for name, tensor in known.items():
        if name.startswith("code_"):
            assert now[name].shape == (50, *tensor.shape[1:]), name
        else:
            torch.testing.assert_close(now[name], tensor, msg=name)
    config = load_prior(second).config
    assert (config.image_tokenizer_fingerprint, config.codebook_size) == ("another", 50)
    with pytest.raises(InputError, match="name one of the two"):
        both = [f"trunk={first}", f"prior={first}", f"run.output={tmp_path}/third"]
        stage2_prior.train.train(world / "prior.yaml", both)


def test_encoding_says_its_rate(world, tmp_path, capsys):
    stage2_prior.encode.encode(world / "encode.yaml", [f"output={tmp_path}/codes"])
    rate = re.search(r"10 images in ([\d.]+) s, ([\d.]+) images per second", capsys.readouterr().err)
    assert rate and float(rate[2]) > 0


def test_codes_of_another_tokenizer_are_refused(world, tmp_path):
    first = stage2_prior.train.train(world / "prior.yaml", [f"run.output={tmp_path}/first"])
    codes = json.loads((world / "codes" / "meta.json").read_text()) | {"tokenizer_fingerprint": "another"}
    shutil.copytree(world / "codes", tmp_path / "codes")
    (tmp_path / "codes" / "meta.json").write_text(json.dumps(codes))
    with pytest.raises(InputError, match="draws codes of tokenizer .* holds codes of another"):
        overrides = [f"prior={first}", f"codes={tmp_path}/codes", "image_tokenizer=null"]
        stage2_prior.train.train(world / "prior.yaml", [*overrides, f"run.output={tmp_path}/run"])
    other = stage1_tokenizer.train.train(world / "tokenizer.yaml", [f"run.output={tmp_path}/other", "run.seed=1"])
    with pytest.raises(InputError, match="were made by tokenizer"):
        stage2_prior.train.train(world / "prior.yaml", [f"run.output={tmp_path}/run", f"image_tokenizer={other}"])
    with pytest.raises(InputError, match="holds codes of another tokenizer"):
        stage2_prior.encode.encode(world / "encode.yaml", [f"image_tokenizer={other}"])


def test_encoding_goes_on_where_it_was_stopped(world, tmp_path):
    first = stage2_prior.encode.encode(world / "encode.yaml", [f"output={tmp_path}/codes"])
    expected = weights_of_shards(first)
    assert sum(len(t) for t in expected) == 10 and len(expected) == 3
    (first / "codes-00001.safetensors").unlink()
    with pytest.raises(InputError, match="not complete"):
        stage2_prior.train.Codes(first)
    kept = (first / "codes-00000.safetensors").stat().st_mtime_ns
    again = weights_of_shards(stage2_prior.encode.encode(world / "encode.yaml", [f"output={tmp_path}/codes"]))
    assert (first / "codes-00000.safetensors").stat().st_mtime_ns == kept
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def weights_of_shards(folder):
    return [load_file(path)["codes"] for path in sorted(folder.glob("codes-*.safetensors"))]


def test_the_loss_of_a_prior_is_the_mean_of_text_and_image_by_their_weights(world, tmp_path):
    """Text counts an eighth (Ramesh et al. 2021), and nothing where there is none to predict."""
    overrides = ["run.steps=2", "run.log_every=1"]
    text = stage2_prior.train.train(world / "prior.yaml", [*overrides, f"run.output={tmp_path}/text"])
    plain = ["condition=none", "text_tokenizer=null", f"run.output={tmp_path}/none"]
    none = stage2_prior.train.train(world / "prior.yaml", [*overrides, *plain])
    for folder, weight in ((text, 1 / 8), (none, 0)):
        for line in (folder.parent / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            expected = (weight * row.get("text", 0) + row["image"]) / (weight + 1)
            assert ("text" in row) == (weight > 0) and row["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_recipe_is_kept_in_the_letters_it_was_written_in(tmp_path):
    config = RunConfig(output=tmp_path / "红心", steps=1, batch_size=1)
    run = Run(config, config)
    assert list(run.batches([7])) == [7]
    text = (tmp_path / "红心" / "recipe.yaml").read_text(encoding="utf-8")
    assert "红心" in text and list(yaml.safe_load(text)) == list(RunConfig.model_fields)


def test_samples_logs_and_figures_are_written(world):
    run = world / "tokenizer"
    assert list((run / "samples").glob("reconstructions-*.png")) and list((run / "logs").iterdir())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "psnr", "images_per_second"} <= rows[0].keys()
    assert yaml.safe_load((run / "recipe.yaml").read_text())["run"]["steps"] == 6


@pytest.mark.parametrize("warmup, steps, final", [(10, 110, 0.1), (0, 40, 0.0), (7, 20, 0.5), (5, 5, 0.25)])
def test_schedule_is_a_line_and_then_half_a_cosine(warmup, steps, final):
    for step in range(steps + 5):
        if step < warmup:
            expected = (step + 1) / warmup
        else:
            done = min(1, (step - warmup) / max(1, steps - warmup))
            expected = final + (1 - final) * math.cos(math.pi / 2 * done) ** 2  # (1 + cos x) / 2 = cos^2 (x / 2)
        assert schedule(step, warmup, steps, final) == pytest.approx(expected, abs=1e-12), step


def test_the_quarters_of_the_schedule():
    """By hand: a quarter of the way a cosine has lost 0.146 of its height, a line 0.25."""
    quarters = [schedule(step, 10, 110, 0.0) for step in (10, 35, 60, 85, 110)]
    assert quarters == pytest.approx([1, 0.853553, 0.5, 0.146447, 0], abs=1e-6)


def test_updates_follow_the_schedule_at_each_parameters_rate():
    """Adam's first updates have the size of the learning rate, whatever the gradient."""
    model = torch.nn.Linear(2, 1)
    config = OptimizerConfig(learning_rate=0.01, weight_decay=0.0, warmup_steps=4, final_share=0.2)
    optimizers = Optimizers(model, config, 20, {"bias": 3.0})
    for step in (0, 3, 8, 12, 19, 30):
        optimizers = Optimizers(model, config, 20, {"bias": 3.0})
        weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
        model(torch.ones(1, 2)).sum().backward()
        optimizers.step(step)
        rate = 0.01 * schedule(step, 4, 20, 0.2)
        torch.testing.assert_close(weight - model.weight, torch.full((1, 2), rate), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(bias - model.bias, torch.full((1,), 3 * rate), rtol=1e-3, atol=1e-6)
        assert model.weight.grad is None


def test_weights_decay_and_biases_do_not():
    """Without a gradient a step of AdamW multiplies the matrices by 1 - rate x decay."""
    model = torch.nn.Linear(3, 2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = Optimizers(model, OptimizerConfig(learning_rate=0.1, weight_decay=0.5, warmup_steps=0), 10)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step(0)
    torch.testing.assert_close(model.weight.detach(), before["weight"] * 0.95)
    assert torch.equal(model.bias, before["bias"])


RANK = """
import json, sys
from pathlib import Path
import torch
from torch.utils.data import Dataset
from tessera.training.run import Run, RunConfig

class Numbers(Dataset):
    def __getitem__(self, step):
        return step

run = Run(RunConfig(output=sys.argv[1], steps=3, batch_size=2), RunConfig(output=sys.argv[1], steps=3, batch_size=2))
drawn = [[step, *torch.rand(4).tolist()] for step in run.batches(Numbers())]
Path(sys.argv[1] + f"-{run.accelerator.process_index}.json").write_text(json.dumps(drawn))
"""


def test_every_process_draws_numbers_of_its_own(tmp_path):
    """Two real processes see the same steps, and no random number of one (dropout, corrupted codes, left-out captions)
    is a number of the other's."""
    run_processes(RANK, tmp_path / "run")
    first, second = (json.loads((tmp_path / f"run-{rank}.json").read_text()) for rank in range(2))
    assert [row[0] for row in first] == [row[0] for row in second] == [0, 1, 2]
    numbers = [number for row in first + second for number in row[1:]]
    assert len(set(numbers)) == len(numbers) == 24


def test_random_numbers_are_those_of_seed_step_and_process():
    def drawn(seed, step, rank):
        run = SimpleNamespace(
            config=SimpleNamespace(seed=seed), step=step, accelerator=SimpleNamespace(process_index=rank)
        )
        Run._seed(run)
        return tuple(torch.rand(3).tolist())

    where = [(seed, step, rank) for seed in (0, 1, 2**31) for step in (0, 1, 4099) for rank in (0, 1, 7)]
    assert len({drawn(*place) for place in where}) == len(where)
    assert all(drawn(*place) == drawn(*place) for place in where[:3])


def test_captions_are_left_out_apart_on_each_process(world):
    """The share `condition_dropout` of them, each by a number of its own; and cut anew by `bpe_dropout`."""
    tokenizer = stage2_prior.train.TextTokenizer.from_pretrained(world / "text")
    config = GPTConfig(codebook_size=5, code_shape=(1, 1, 1), text_vocab_size=tokenizer.vocab_size, text_length=24,
                       dim=16, depth=1, num_heads=1, condition_dropout=0.1)  # fmt: skip
    prior = GPTPrior(config, tokenizer)
    batch = CodesBatch(torch.zeros(400, 1, dtype=torch.int64), ["a picture 3"] * 400, [], None)

    def prefix(rank, dropout, bpe_dropout):
        run = SimpleNamespace(
            config=SimpleNamespace(seed=0), step=5, accelerator=SimpleNamespace(process_index=rank), device="cpu"
        )
        Run._seed(run)
        run_config = RunConfig(output="nowhere", steps=1, batch_size=1)
        lesson = stage2_prior.train.Lesson(condition_dropout=dropout, bpe_dropout=bpe_dropout, run=run_config)
        return stage2_prior.train.noisy_prefix(run, prior, batch, lesson)

    null, plain = prior.null_prefix(1), prior.prefix(["a picture 3"])
    assert torch.equal(prefix(0, 0.0, 0.0), plain.expand(400, -1))
    left_out = [(prefix(rank, 0.25, 0.0) == null).all(-1) for rank in (0, 1)]
    assert all(70 <= int(rows.sum()) <= 130 for rows in left_out) and not torch.equal(*left_out)
    cut = [prefix(rank, 0.0, 0.5) for rank in (0, 1)]
    assert not torch.equal(*cut) and torch.equal(cut[0], prefix(0, 0.0, 0.5))
