"""What makes LoRA training unstable, measured on the recipe's twenty images: short runs that differ in one thing.

    python recipes/lora_subject/stability.py

Each trains from the same seed for `--steps` steps of 4 images, with nothing remembered, and prints a line: the loss
on the twenty images at the end (nats a code), the worst it was on the way, and the loss on emoji that the base knows.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stage2_prior import load_prior
from stage2_prior.codes import Codes, CodesSteps
from stage2_prior.conditions import batch_prefix
from stage2_prior.finetune import LoraSettings, add_lora
from stage2_prior.train import Objective, Trainable
from tessera.training.optimizers import OptimizerConfig, Optimizers

PRIOR, RUNS = Path("pipelines/bundles/emoji/prior"), Path("runs/lora_subject")
BASE: dict[str, Any] = {"learning_rate": 2e-3, "rank": 8, "alpha": 16}
TRIED: list[dict[str, Any]] = [
    {},
    {"learning_rate": 2e-4},
    {"learning_rate": 2e-2},
    {"learning_rate": 2e-1},
    {"rank": 64},
    {"rank": 64, "alpha": 6, "rslora": True},  # 6 / sqrt(8) = 2.1 is nearly 16 / 8
    {"alpha": 128},
    {"learning_rate": 5e-4, "b_rate": 16.0},
    {"targets": ["q", "v"]},
]


class Measured(NamedTuple):
    new: float  # nats a code at the end
    worst: float  # the highest loss of a batch on the way
    known: float  # nats a code of emoji that the base knows


def measure(changes: dict[str, Any], steps: int) -> Measured:
    settings = {**BASE, **changes}
    optimizer = {name: settings.pop(name) for name in ("learning_rate", "warmup_steps") if name in settings}
    prior = load_prior(PRIOR)
    assert isinstance(prior, Trainable)
    new, known = Codes(RUNS / "codes"), Codes(RUNS / "check")
    torch.manual_seed(0)
    lora = LoraSettings.model_validate(settings)
    add_lora(prior, lora)
    objective = Objective(prior.train())
    config = OptimizerConfig.model_validate({"warmup_steps": 5, "weight_decay": 0.0, **optimizer})
    optimizers = Optimizers(prior, config, steps, {"lora_B": lora.b_rate})
    batches, worst = CodesSteps(new, 4, seed=0), 0.0
    for step in range(steps):
        batch = batches[step]
        text, image = objective(batch_prefix(prior, batch), batch.codes)
        loss = (text / 8 + image.mean()) / (1 + 1 / 8)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizers.parameters, config.clip_norm)
        optimizers.step(step)
        worst = max(worst, image.detach().mean().item())
    return Measured(nats(objective.eval(), new, 20), worst, nats(objective, known, 40))


@torch.no_grad()
def nats(objective: Objective, codes: Codes, pictures: int) -> float:
    captions = [choices[0] for choices in codes.captions[:pictures]]
    prefix = batch_prefix(objective.prior, codes.batch(range(pictures), captions))
    return float(objective(prefix, codes.read(range(pictures)))[1].mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=25)
    given = parser.parse_args()
    for tried in [{"learning_rate": 1e-12}, *TRIED]:  # the first is the base as it is
        found = measure(tried, given.steps if tried.get("learning_rate") != 1e-12 else 1)
        words = ", ".join(f"{name} {value}" for name, value in tried.items()) or "as the recipe, 2e-3"
        print(f"| {words} | {found.new:.2f} | {found.worst:.2f} | {found.known:.2f} |", flush=True)
