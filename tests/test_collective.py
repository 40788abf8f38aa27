"""On several processes, with parameters split over them or copied, in micro-batches or whole: the same training."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import stage1_tokenizer.train
import stage2_prior.encode
import stage2_prior.train
import stage2_prior.train_text
from stage2_prior import GPTConfig, GPTPrior
from stage2_prior.codes import Codes, CodesBatch, MappedRows
from stage2_prior.finetune import finetune
from tessera.errors import InputError
from tessera.training.averages import AveragedWeights
from tessera.training.run import Run, RunConfig
from tests import test_training
from tests.processes import run_processes
from tests.test_training import weights

world = test_training.world  # a fixture
CAN_SPLIT = pytest.mark.skipif(
    tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 8), reason="FSDP2 of old torch has no CPUs"
)

TRAINING = """
import sys
from pathlib import Path
import torch
from torch.utils.data import Dataset
from stage2_prior import GPTConfig, GPTPrior
from stage2_prior.train import Objective
from tessera.config import Config
from tessera.training.optimizers import OptimizerConfig
from tessera.training.run import Run, RunConfig

folder, sharded, steps = Path(sys.argv[1]), sys.argv[2] == "sharded", int(sys.argv[3])
torch.manual_seed(0)
prior = GPTPrior(GPTConfig(codebook_size=16, code_shape=(1, 3, 4), text_vocab_size=9, text_length=6, dim=16, depth=2,
                           num_heads=2, condition_dropout=0.1))
with torch.no_grad():
    for weight in prior.parameters():
        weight.add_(torch.randn_like(weight) * 0.1)
config = RunConfig(output=folder, steps=4, batch_size=4, checkpoint_every=2, sample_every=2, ema_decay=0.5, log_every=1)
class Recipe(Config):
    run: RunConfig

run = Run(config, Recipe(run=config))
rank, world = run.accelerator.process_index, run.accelerator.num_processes

class Steps(Dataset):
    def __getitem__(self, step):
        generator = torch.Generator().manual_seed(step)
        return torch.randint(16, (4, 12), generator=generator)[rank::world]

objective = Objective(prior)
prepared = run.prepare("prior", objective, blocks=[*prior.decoder.blocks] if sharded else ())
average = run.averaged("average", prior)
optimizers = run.optimizers("optimizer", prior, OptimizerConfig(learning_rate=1e-2, warmup_steps=0, clip_norm=0.1))
for codes in run.batches(Steps()):
    prefix = torch.tensor([[1, 3, 4, 0, 0, 0]]).expand(len(codes), -1)
    text, image = prepared(prefix, codes)
    run.backward(text / 8 + image.mean())
    run.update(optimizers)
    average.update()
    if run.samples_due():
        with average.applied(), run.optional("model") as path:
            prior.save_pretrained(path)
    if run.step + 1 == steps:
        if (run.step + 1) % 2 == 0:
            run.save_checkpoint(run.step + 1)
        break
"""


@CAN_SPLIT
def test_split_parameters_train_as_copied_ones_and_resume(tmp_path: Path) -> None:
    """Checkpoint, moving average, export, gradient norm and resuming, with FSDP2 on two processes beside one."""
    run_processes(TRAINING, tmp_path / "one", "whole", 4, count=1)
    run_processes(TRAINING, tmp_path / "copied", "whole", 4)
    run_processes(TRAINING, tmp_path / "split", "sharded", 4)
    run_processes(TRAINING, tmp_path / "stopped", "sharded", 2)
    assert (tmp_path / "stopped" / "checkpoints" / "step-0000002.pt").is_file()
    run_processes(TRAINING, tmp_path / "stopped", "sharded", 4)
    expected = weights(tmp_path / "one" / "model")
    for name in ("copied", "split", "stopped"):
        found = weights(tmp_path / name / "model")
        assert found.keys() == expected.keys()
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-5)
    one, split = (torch.load(tmp_path / name / "checkpoints" / "step-0000004.pt") for name in ("one", "split"))
    assert one["prior"].keys() == split["prior"].keys() and one["average"].keys() == split["average"].keys()
    for key, weight in one["average"].items():
        torch.testing.assert_close(split["average"][key], weight, rtol=1e-4, atol=1e-5)
    first, second = weights(tmp_path / "split" / "model"), weights(tmp_path / "stopped" / "model")
    assert all(torch.equal(first[key], second[key]) for key in first)  # bit-equal on as many processes


@CAN_SPLIT
def test_what_one_process_wrote_is_resumed_by_two_that_split_it(tmp_path: Path) -> None:
    run_processes(TRAINING, tmp_path / "one", "whole", 4, count=1)
    run_processes(TRAINING, tmp_path / "grown", "whole", 2, count=1)
    run_processes(TRAINING, tmp_path / "grown", "sharded", 4)
    expected, found = weights(tmp_path / "one" / "model"), weights(tmp_path / "grown" / "model")
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-5)


SKIPPING = """
import sys
from stage1_tokenizer.train import train
train(sys.argv[1], [f"run.output={sys.argv[2]}", "loss.decoder_only_from=null"])
"""


def test_what_one_process_skips_the_first_one_names(world: Path, tmp_path: Path) -> None:
    """Whichever process met the broken file, it is named once."""
    content = yaml.safe_load((world / "tokenizer.yaml").read_text())
    data = tmp_path / "data"
    data.mkdir()
    for path in world.glob("*.png"):
        (data / path.name).write_bytes(path.read_bytes())
    (data / "metadata.jsonl").write_text((world / "metadata.jsonl").read_text())
    (data / "3.png").write_bytes(b"no image")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content | {"data": {"folder": str(data)}}))
    said = run_processes(SKIPPING, tmp_path / "recipe.yaml", tmp_path / "run")
    lines = [line for one in said for line in one.splitlines() if "skipped: " in line]
    assert len(lines) == 1 and "3.png" in lines[0]


# Micro-batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_micro_batches_make_the_step_of_the_whole_batch(world: Path, tmp_path: Path, stage: str) -> None:
    train = stage1_tokenizer.train.train if stage == "tokenizer" else stage2_prior.train.train
    overrides = ["run.steps=3", "run.sample_every=3", "run.batch_size=6", "run.ema_decay=0"]
    if stage == "tokenizer":  # plain codes; a discriminator's batch norm would see other batches
        overrides += [
            "model.bottleneck={type: fsq, levels: [3, 3, 3]}", "model.trunk.latent_dim=4", "model.trunk.dropout=0.0",
            "loss.adversarial_weight=0", "loss.decoder_only_from=null", "doctor.every=100",
        ]  # fmt: skip
    else:
        overrides += ["model.dropout=0.0", "optimizer.type=adamw", "condition_dropout=0.3"]
    found = []
    for parts in (1, 3):
        folder = train(
            world / f"{stage}.yaml", [f"run.output={tmp_path}/{parts}", f"run.accumulate={parts}", *overrides]
        )
        found.append(torch.load(tmp_path / str(parts) / "checkpoints" / "step-0000003.pt")["average"])
        assert folder.is_dir()
    whole, parted = found
    for name, weight in whole.items():
        torch.testing.assert_close(parted[name], weight, rtol=1e-3, atol=2e-5)


def test_parts_cover_a_batch_once(tmp_path: Path) -> None:
    config = RunConfig(output=tmp_path / "run", steps=1, batch_size=7, accumulate=3)
    run = Run(config, config)
    batch = CodesBatch(torch.arange(7).view(7, 1), [str(i) for i in range(7)], [], None)
    parts, shares = [], []
    for part in run.parts(batch):
        parts.append(part)
        shares.append(run.share)
    assert torch.equal(torch.cat([part.codes for part in parts]), batch.codes) and sum(shares) == pytest.approx(1)
    assert sum([part.captions for part in parts], []) == batch.captions and [len(part.codes) for part in parts] == [
        2,
        2,
        3,
    ]
    run.close()


def test_a_contrastive_loss_takes_its_batch_whole(world: Path, tmp_path: Path) -> None:
    import rerank.train

    with pytest.raises(InputError, match="run.accumulate must be 1 for a reranker"):
        rerank.train.train(world / "reranker.yaml", [f"run.output={tmp_path}/run", "run.accumulate=2"])


# One loop -------------------------------------------------------------------------------------------------------------


def test_fine_tuning_keeps_random_orders_code_dropout_and_depth_decay(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They were training's alone: a prior of random order was fine-tuned in raster order."""
    base = stage2_prior.train.train(
        world / "prior.yaml", [f"run.output={tmp_path}/base", "run.steps=1", "model.order=random"]
    )
    recipe = {
        "prior": str(base), "codes": str(world / "codes"), "order_annealing": [1.0, 1.0], "code_dropout": 0.5,
        "depth_decay": 0.5, "run": {"output": str(tmp_path / "run"), "steps": 2, "batch_size": 4},
    }  # fmt: skip
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(recipe))
    orders, hidden = [], []
    predict = GPTPrior.predict

    def watched(self, prefix, codes, order=None, hidden_positions=None):
        orders.append(order)
        hidden.append(hidden_positions)
        return predict(self, prefix, codes, order, hidden_positions)

    monkeypatch.setattr(GPTPrior, "predict", watched)
    finetune(tmp_path / "lora.yaml")
    raster = torch.arange(orders[0].shape[1])
    assert any(not torch.equal(row, raster) for order in orders for row in order)
    assert any(bool(one.any()) for one in hidden)
    with pytest.raises(InputError, match="order_annealing must be two rising shares"):
        finetune(tmp_path / "lora.yaml", ["order_annealing=[0.8, 0.2]"])


# Averages -------------------------------------------------------------------------------------------------------------


def test_averages_are_those_of_torch_and_leave_the_model_as_it_was() -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    ours: Any = AveragedWeights(model, 0.9)
    theirs: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(4):
        with torch.no_grad():
            model(torch.randn(8, 4))
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight))
        ours.update()
        theirs.update_parameters(model)
        theirs.module[1].load_state_dict(theirs.module[1].state_dict() | {
            name: tensor.clone() for name, tensor in model[1].named_buffers()
        })  # fmt: skip
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[1].eval()
    with ours.applied():
        assert torch.equal(model[0].weight, theirs.module[0].weight) and not model[0].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model[0].training and not model[1].training

    again = AveragedWeights(model, 0.9)
    again.load_state_dict(theirs.state_dict())
    assert again.updates == 4 and all(torch.equal(again.tensors[name], one) for name, one in ours.tensors.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_of_release_0_1_holds_averages_by_its_names() -> None:
    config = GPTConfig(
        codebook_size=8, code_shape=(1, 2, 2), text_vocab_size=9, text_length=4, dim=8, depth=1, num_heads=1
    )
    prior = GPTPrior(config)
    state = AveragedWeights(prior, 0.9).state_dict()
    old = {name.replace("module.decoder.", "module."): tensor + 1 for name, tensor in state.items()}
    average = AveragedWeights(prior, 0.9)
    average.load_state_dict(old)
    assert all(torch.equal(average.tensors[name.removeprefix("module.")], one + 1)
               for name, one in state.items() if name != "n_averaged")  # fmt: skip


# Codes on disk --------------------------------------------------------------------------------------------------------


def test_rows_are_read_from_disk_when_they_are_asked_for(tmp_path: Path) -> None:
    """From any shard in any order, without a tensor of all of them; as the library reads them."""
    random = torch.Generator().manual_seed(0)
    whole = torch.randint(1000, (100, 2, 3, 4), generator=random, dtype=torch.int32)
    files = []
    for number, part in enumerate(whole.split(37)):
        files.append(tmp_path / f"codes-{number}.safetensors")
        save_file({"before": torch.zeros(number + 1, dtype=torch.int64), "codes": part.contiguous()}, files[-1])
    rows = MappedRows(files, "codes")
    wanted = [99, 0, 36, 37, 5, 74, 0]
    assert len(rows) == 100 and np.array_equal(rows.read(wanted), whole[wanted].numpy())
    assert np.array_equal(np.concatenate([*rows.chunks(13)]), whole.numpy())
    assert torch.equal(torch.cat([load_file(file)["codes"] for file in files]), whole)
    assert rows.__getstate__()["_maps"] == [None] * 3  # a loader process opens the files anew
    for cut in (5, 60, files[1].stat().st_size - 4):
        damaged = tmp_path / "damaged.safetensors"
        damaged.write_bytes(files[1].read_bytes()[:cut])
        with pytest.raises((ValueError, KeyError)):
            MappedRows([files[0], damaged], "codes")


def test_a_folder_of_codes_takes_no_memory_of_its_size(tmp_path: Path) -> None:
    """64 MB of codes on disk: opening and reading a batch makes no array of a hundredth of them."""
    import tracemalloc

    rows = 4096
    meta = {
        "tokenizer_fingerprint": "x",
        "codebook_size": 9,
        "code_shape": [1, 64, 64],
        "rows": rows,
        "shard_rows": rows,
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (tmp_path / "captions.jsonl").write_text('{"text": ["a"], "weight": 1.0}\n' * rows)
    save_file({"codes": torch.zeros(rows, 1, 64, 64, dtype=torch.int32)}, tmp_path / "codes-00000.safetensors")
    codes = Codes(tmp_path)
    tracemalloc.start()
    batch = codes.batch([0, 17, 4095], ["a"] * 3)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert batch.codes.shape == (3, 4096) and most < 640_000
