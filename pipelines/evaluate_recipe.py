"""`tessera evaluate pipeline RECIPE.yaml`: a bundle, a list of prompts, a judge with its references, and how to sample.

The judge is a Python file beside the recipe: a recipe that names one runs that file, as one runs a script.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pipelines.bundle import find_bundle, read_index
from pipelines.evaluate import Case, Draw, Judge, as_json, evaluate_pipeline, table
from pipelines.text_to_image import TextToImagePipeline
from stage2_prior import Sampling
from tessera.config import Config, read_recipe
from tessera.errors import InputError, reason
from tessera.paths import is_file


class EvaluationRecipe(Config):
    model: str = "emoji"  # a shipped bundle, a folder, or a hub name
    judge: Path  # a Python file, found from the recipe's folder, with `load(prompts, references) -> (cases, judge)`
    prompts: Path  # JSON lines: prompt, split, and what the judge needs
    references: Path  # a folder of the judge's
    output: Path
    num_candidates: int = Field(16, ge=1)  # drawn and ranked for each prompt
    seed: int = Field(0, ge=0)  # of the first candidate of every prompt
    sampling: dict[str, Any] = {}  # changes to the bundle's settings
    likelihood_weight: float | None = Field(None, ge=0, allow_inf_nan=False)  # of the prior's likelihood; the bundle's
    batch_size: int = Field(4, ge=1)  # prompts drawn together
    limit: int | None = Field(None, ge=1)  # prompts of each split, evenly spaced; all of them when None
    device: str | None = None


class Evaluated(NamedTuple):
    figures: dict[str, Any]
    table: str  # the same for people


def evaluate_recipe(recipe_path: str | Path, overrides: list[str] | None = None) -> Evaluated:
    """Draws and judges the prompts of a recipe, or resumes; `output` also receives images of failures.

    Raises InputError for a wrong recipe, a bundle without a reranker, or an `output` begun with other settings.
    """
    recipe = read_recipe(EvaluationRecipe, recipe_path, overrides)
    cases, judge = load_judge(Path(recipe_path).parent / recipe.judge, recipe.prompts, recipe.references)
    index = read_index(find_bundle(recipe.model))
    pipeline = TextToImagePipeline.from_pretrained(recipe.model, device=recipe.device)
    if pipeline.reranker is None:
        raise InputError(f"the bundle {recipe.model} has no reranker, so there is no choice to measure; add one")
    sampling = pipeline.settings(**recipe.sampling)
    if recipe.likelihood_weight is not None:
        pipeline.likelihood_weight = recipe.likelihood_weight
    evaluation = evaluate_pipeline(
        drawing_with(pipeline, recipe.num_candidates, sampling),
        cases,
        judge,
        recipe.output,
        settings={
            "bundle": pipeline.fingerprint,
            "reranker": index.fingerprints.reranker,
            "num_candidates": recipe.num_candidates,
            "sampling": sampling.model_dump(),
            "likelihood_weight": pipeline.likelihood_weight,
        },
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        limit=recipe.limit,
    )
    return Evaluated({**as_json(evaluation), "output": str(recipe.output)}, table(evaluation))


def load_judge(file: Path, prompts: Path, references: Path) -> tuple[Sequence[Case], Judge[Any]]:
    """Runs the judge's file. Raises InputError when there is none, it does not run, or it has no `load`."""
    if not is_file(file):
        raise InputError(f"{file} does not exist; name the recipe's judge, a Python file beside the recipe, in 'judge'")
    spec = importlib.util.spec_from_file_location(f"judge_of_{file.parent.name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        load = module.load
    except Exception as error:  # whatever a file of the user's own raises
        raise InputError(f"the judge {file} cannot be used: {type(error).__name__}: {reason(error)}") from error
    cases, judge = load(prompts, references)
    return cases, judge


def drawing_with(pipeline: TextToImagePipeline, num_candidates: int, sampling: Sampling) -> Draw:
    """The pipeline as `evaluate_pipeline` wants it: prompts -> images (P, N, 3, H, W) uint8 and scores (P, N)."""

    def draw(prompts: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
        drawn = pipeline(
            prompts, num_images_per_prompt=num_candidates, num_candidates=num_candidates, seed=seed, sampling=sampling
        )
        pixels = np.stack([np.asarray(image) for image in drawn.images])  # (P·N, H, W, 3)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).unflatten(0, (len(prompts), num_candidates))
        return images, torch.tensor(drawn.scores).view(len(prompts), num_candidates)

    return draw
