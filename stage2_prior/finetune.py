"""Teaches a trained prior something new by LoRA: `tessera finetune prior RECIPE.yaml` (Hu et al. 2022).

The base stays as it is; what is learned is a folder of peft's two files (`lora.py`). peft makes and trains the
adapters, on our own classes. What makes such training unstable, and what to do: docs/lora.md.
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from stage2_prior.codes import Codes, CodesBatch, CodesSteps
from stage2_prior.load import load_prior
from stage2_prior.lora import CONFIG, PREFIX, WEIGHTS, Target, base_fingerprint, target_layers
from stage2_prior.train import (
    Lesson,
    Objective,
    Samples,
    Trainable,
    check_codes,
    check_lesson,
    find_image_tokenizer,
    fit,
)
from tessera.config import Config, read_recipe
from tessera.errors import InputError
from tessera.training.optimizers import OptimizerConfig
from tessera.training.run import Run
from tessera.weights.writing import replacing


class LoraSettings(Config):
    rank: int = Field(8, ge=1)  # r
    alpha: int = Field(16, ge=1)  # the addition is scaled by alpha / rank
    rslora: bool = False  # by alpha / sqrt(rank), which keeps updates as large at any rank (Kalajdzievski 2023)
    targets: tuple[Target, ...] = Field(("q", "k", "v", "out", "mlp"), min_length=1)
    dropout: float = Field(0.0, ge=0, lt=1)  # of what A reads
    b_rate: float = Field(1.0, gt=0)  # learning rate of B over that of A (LoRA+, Hayou et al. 2024: 16)


class FinetuneRecipe(Lesson):
    prior: Path  # the base: a prior's folder
    codes: Path  # of the new images, written by tessera encode
    image_tokenizer: Path | None = None  # draws the sample images; must be the one the codes were made with
    remember: Path | None = None  # codes of images that the base knows, shown meanwhile so that they are not forgotten
    remember_share: float = Field(0.5, gt=0, lt=1)  # of every batch, where there is something to remember
    lora: LoraSettings = LoraSettings()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0)

    @model_validator(mode="after")
    def _adamw(self) -> "FinetuneRecipe":
        if self.optimizer.type != "adamw":
            raise ValueError("optimizer.type must be adamw, Muon is for whole matrices and not for thin A and B")
        return self


class MixedSteps(Dataset[CodesBatch]):
    """`steps[i]` is new images and remembered ones of training step i."""

    def __init__(self, new: CodesSteps, remembered: CodesSteps) -> None:
        self.new, self.remembered = new, remembered

    def __getitem__(self, step: int) -> CodesBatch:
        new, old = self.new[step], self.remembered[step]
        captions, labels = new.captions + old.captions, new.labels + old.labels
        maps = None
        if new.segmentation is not None and old.segmentation is not None:
            maps = torch.cat([new.segmentation, old.segmentation])
        return CodesBatch(torch.cat([new.codes, old.codes]), captions, labels, maps)


class SplitQKV(nn.Module):
    """A fused projection as three, so that each has an adapter of its own: (..., E) -> (..., 3·E)."""

    def __init__(self, fused: nn.Linear) -> None:
        super().__init__()
        biases: tuple[Tensor | None, ...] = (None,) * 3 if fused.bias is None else fused.bias.chunk(3)
        self.q, self.k, self.v = (
            _linear(weight, bias) for weight, bias in zip(fused.weight.chunk(3), biases, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def finetune(recipe_path: str | Path, overrides: list[str] | None = None) -> Path:
    """Trains the LoRA of a recipe, or resumes; returns its folder."""
    recipe = read_recipe(FinetuneRecipe, recipe_path, overrides)
    codes = Codes(recipe.codes)
    image_tokenizer = find_image_tokenizer(recipe.image_tokenizer, codes, recipe.codes)
    prior = load_prior(recipe.prior)
    if not isinstance(prior, Trainable):
        raise InputError(f"the prior in {recipe.prior} is of type {prior.config.type}, which is not trained here")
    check_codes(prior, recipe.prior, codes, recipe.codes)
    check_lesson(recipe, prior)
    base = base_fingerprint(prior)
    torch.manual_seed(recipe.run.seed)
    add_lora(prior, recipe.lora)

    remembered = None if recipe.remember is None else Codes(recipe.remember)
    identities = {"prior": base, "codes": codes.identity, "image_tokenizer": codes.meta.tokenizer_fingerprint}
    if remembered is not None:
        identities["remember"] = remembered.identity
    run = Run(recipe.run, recipe, identities)
    objective = run.prepare("prior", Objective(prior.train(), recipe.pkeep, recipe.code_dropout))
    # The base never changes, so averages and checkpoints hold the adapter alone.
    adapter = nn.ParameterList(weight for weight in prior.parameters() if weight.requires_grad)
    run.state["prior"] = adapter
    average = run.averaged("average", adapter)
    optimizers = run.optimizers("optimizer", prior, recipe.optimizer, {"lora_B": recipe.lora.b_rate})

    def save(folder: Path) -> None:
        save_lora(prior, folder, base, recipe.prior)

    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    steps = _steps(recipe, codes, remembered, prior, rank, world)
    fit(run, recipe, prior, objective, optimizers, average, steps, save, Samples(codes, image_tokenizer))
    return run.folder / "model"


def add_lora(prior: nn.Module, settings: LoraSettings) -> None:
    """Freezes the prior and puts fresh adapters beside its layers; B is zero, so that nothing changes yet.

    Raises InputError where the prior has no such layers.
    """
    from peft import LoraConfig, inject_adapter_in_model

    layers = target_layers(prior, settings.targets)
    split_qkv(prior, layers)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=layers,
    )
    inject_adapter_in_model(config, prior)


def split_qkv(prior: nn.Module, layers: list[str]) -> None:
    """Splits the fused projections that have a third among `layers`; what they compute stays the same."""
    for fused in sorted({layer.rpartition(".")[0] for layer in layers if layer.endswith((".q", ".k", ".v"))}):
        owner, _, name = fused.rpartition(".")
        projection = prior.get_submodule(fused)
        assert isinstance(projection, nn.Linear)
        setattr(prior.get_submodule(owner), name, SplitQKV(projection))


def save_lora(prior: Any, folder: Path, base: str, base_name: str | Path) -> None:
    """Writes the adapters of a prior as peft's two files, whole or not at all, with the base's fingerprint and name."""
    from peft import get_peft_model_state_dict

    content: dict[str, Any] = prior.peft_config["default"].to_dict()  # peft puts it there
    content |= {"base_model_name_or_path": Path(base_name).name, "revision": base, "inference_mode": True}
    content["target_modules"] = sorted(content["target_modules"])
    state = {f"{PREFIX}{name}": weight.contiguous() for name, weight in get_peft_model_state_dict(prior).items()}
    with replacing(folder) as part:
        (part / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        save_file(state, part / WEIGHTS, metadata={"format": "pt"})


def _steps(
    recipe: FinetuneRecipe, codes: Codes, known: Codes | None, prior: Any, rank: int, world: int
) -> Dataset[CodesBatch]:
    size, seed = recipe.run.batch_size, recipe.run.seed
    if known is None or recipe.remember is None:
        return CodesSteps(codes, size, seed, rank, world)
    check_codes(prior, recipe.prior, known, recipe.remember)
    old = round(size * recipe.remember_share)
    if not 0 < old < size:
        raise InputError(f"remember_share {recipe.remember_share} of run.batch_size {size} leaves one side empty")
    return MixedSteps(CodesSteps(codes, size - old, seed, rank, world), CodesSteps(known, old, seed + 1, rank, world))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
