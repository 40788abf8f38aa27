"""Trains a small CLIP from scratch on pictures and captions: `tessera train reranker RECIPE.yaml`.

Radford et al. 2021 with open_clip's models and loss. What it writes is open_clip's own `local-dir` layout, so the
result loads in open_clip as in `ClipReranker`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.loss import ClipLoss
from torch import Tensor

from common.config import Config, read_recipe
from common.data import DataConfig, ImageFolder, Steps
from common.text import TextTokenizer
from common.training import OptimizerConfig, Run, RunConfig
from rerank.clip import ClipReranker, new_clip


class RerankerRecipe(Config):
    data: DataConfig
    text_tokenizer: Path
    model: dict[str, Any]  # an open_clip model config: embed_dim, vision_cfg, text_cfg
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig


def train(recipe_path: str | Path, overrides: list[str] | None = None) -> Path:
    """Trains the reranker of a recipe, or goes on with it; returns the folder of the result."""
    recipe = read_recipe(RerankerRecipe, recipe_path, overrides)
    text_tokenizer = TextTokenizer.from_pretrained(recipe.text_tokenizer)
    torch.manual_seed(recipe.run.seed)
    clip = new_clip(recipe.model, text_tokenizer)
    size = int(recipe.model["vision_cfg"]["image_size"])
    data = ImageFolder(recipe.data.folder, size, recipe.data.split, need_captions=True)
    validation = ImageFolder(
        recipe.data.folder, size, recipe.data.validation_split or recipe.data.split, need_captions=True
    )

    run = Run(recipe.run, recipe)
    average = run.averaged("average", clip.model)
    model = run.prepare("model", clip.model)
    optimizers = run.optimizers("optimizer", clip.model, recipe.optimizer)
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    contrastive = ClipLoss(rank=rank, world_size=world)
    folder = run.folder / "model"

    for batch in run.batches(Steps(data, recipe.run.batch_size, recipe.run.seed, rank, world)):
        images, tokens = batch.images.to(run.device), clip.tokenize(batch.captions).to(run.device)
        with run.autocast():
            image_features, text_features, scale = model(clip.normalize(images), tokens)[:3]
        loss = contrastive(image_features.float(), text_features.float(), scale)
        run.update(optimizers, loss)
        with torch.no_grad():
            clip.model.get_parameter("logit_scale").clamp_(max=4.6052)  # ln 100, as CLIP
        average.update_parameters(clip.model)
        run.log(loss=loss, temperature=1 / scale)

        if run.due_after(recipe.run.sample_every) and run.is_main:
            reranker = clip.with_model(average.module)
            run.log_now(**{"validation/retrieval": retrieval(reranker, validation, recipe.run.seed)})
            reranker.save_pretrained(folder, dtype=torch.float16)
    return folder


@torch.no_grad()
def retrieval(reranker: ClipReranker, data: ImageFolder, seed: int, n: int = 256) -> float:
    """Share of `n` pictures whose own caption scores highest among all n captions."""
    random = np.random.default_rng(seed)
    batch = data.batch(random.permutation(len(data))[:n], random)
    images = reranker.image_features(batch.images)
    texts = reranker.text_features(batch.captions)
    best: Tensor = (images @ texts.T).argmax(1)
    own = [caption == batch.captions[int(i)] for caption, i in zip(batch.captions, best, strict=True)]
    return sum(own) / len(own)
