"""Trains a small CLIP from scratch on images and captions: `tessera train reranker RECIPE.yaml`.

Radford et al. 2021 with open_clip's models and loss. What it writes is open_clip's own `local-dir` layout, so the
result loads in open_clip as in `ClipReranker`.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.loss import ClipLoss
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from rerank.clip import ClipReranker, new_clip
from rerank.negatives import recombined
from tessera.clip.text import tokenizer_content
from tessera.config import Config, read_recipe
from tessera.data.source import DataConfig, ImageFolder, Steps, open_images
from tessera.errors import InputError
from tessera.text import TextTokenizer
from tessera.training.optimizers import OptimizerConfig
from tessera.training.run import Run, RunConfig
from tessera.weights.writing import refuse_data_folder


class RerankerRecipe(Config):
    data: DataConfig
    text_tokenizer: Path
    model: dict[str, Any] = {}  # an open_clip model config: embed_dim, vision_cfg, text_cfg
    reranker: Path | None = (
        None  # continues from the weights in this folder, at their sizes, instead of from random ones
    )
    wrong_captions: int = Field(0, ge=0)  # beside each right one, nearly right: see negatives.py
    optimizer: OptimizerConfig = OptimizerConfig()
    run: RunConfig


def train(recipe_path: str | Path, overrides: list[str] | None = None) -> Path:
    """Trains the reranker of a recipe, or continues with it; returns the folder of the result."""
    recipe = read_recipe(RerankerRecipe, recipe_path, overrides)
    if recipe.run.accumulate > 1:
        raise InputError("run.accumulate must be 1 for a reranker, whose loss compares all images of a batch")
    text_tokenizer = TextTokenizer.from_pretrained(recipe.text_tokenizer)
    torch.manual_seed(recipe.run.seed)
    clip = beginning(recipe, text_tokenizer)
    size = int(clip.config["model_cfg"]["vision_cfg"]["image_size"])
    data = open_images(recipe.data, size, need_captions=True)
    validation = open_images(recipe.data, size, need_captions=True, validation=True)

    refuse_data_folder(recipe.run.output, recipe.data.folder, "run.output")
    identities = {"data.folder": data.identity, "text_tokenizer": text_tokenizer.fingerprint}
    if recipe.reranker is not None:
        identities["reranker"] = clip.fingerprint
    run = Run(recipe.run, recipe, identities, len(data))
    if data.left_out:
        run.say(data.left_out)
    model = run.prepare("model", clip.model)
    average = run.averaged("average", clip.model)
    optimizers = run.optimizers("optimizer", clip.model, recipe.optimizer)
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    contrastive = ClipLoss(rank=rank, world_size=world)
    folder = run.folder / "model"

    for batch in run.batches(Steps(data, recipe.run.batch_size, recipe.run.seed, rank, world)):
        n = len(batch.captions)
        random = np.random.default_rng((recipe.run.seed, run.step, rank))
        wrong = [text for _ in range(recipe.wrong_captions) for text in recombined(batch.captions, random)]
        images, tokens = batch.images.to(run.device), clip.tokenize(batch.captions + wrong).to(run.device)
        with run.autocast():
            image_features, text_features, scale = model(clip.normalize(images), tokens)[:3]
        image_features, text_features = image_features.float(), text_features.float()
        loss = contrastive(image_features, text_features[:n], scale)
        if wrong:
            details = told_apart(image_features, text_features, same(batch.captions, wrong).to(run.device), scale)
            run.log(details=details)
            loss = loss + details
        run.backward(loss)
        run.update(optimizers)
        with torch.no_grad():
            clip.model.get_parameter("logit_scale").clamp_(max=4.6052)  # ln 100, as CLIP
        average.update()
        run.log(loss=loss, temperature=1 / scale)

        if run.samples_due():
            with average.applied():
                reranker = clip.with_model(clip.model)
                with run.optional("model") as folder:
                    reranker.save_pretrained(folder, dtype=torch.float16)
                run.log_now(**{"validation/retrieval": retrieval(reranker, validation, recipe.run.seed)})
    return folder


def beginning(recipe: RerankerRecipe, text_tokenizer: TextTokenizer) -> ClipReranker:
    """A new model, or the one that the recipe continues from, in train mode."""
    if recipe.reranker is None:
        return new_clip(recipe.model, text_tokenizer)
    if recipe.model:
        raise InputError("reranker goes on at the sizes that it has; leave out model")
    before = ClipReranker.from_pretrained(recipe.reranker)
    clip = new_clip(before.config["model_cfg"], text_tokenizer)
    if tokenizer_content(before.tokenizer) != tokenizer_content(clip.tokenizer):
        raise InputError(
            f"the reranker in {recipe.reranker} reads with another text tokenizer than {recipe.text_tokenizer}; "
            "go on with the same"
        )
    clip.model.load_state_dict({name: weight.float() for name, weight in before.model.state_dict().items()})
    return clip


def same(captions: list[str], wrong: list[str]) -> Tensor:
    """(K, N) bool: which of the K N wrong captions are the right ones after all, as where a batch has but one."""
    return torch.tensor([text == captions[i % len(captions)] for i, text in enumerate(wrong)]).view(-1, len(captions))


def told_apart(image_features: Tensor, text_features: Tensor, ignored: Tensor, scale: Tensor) -> Tensor:
    """Cross entropy of each image's right caption among its own wrong ones.

    `image_features` (N, D) and `text_features` (N + K N, D), the right captions first, of unit length; `ignored` (K, N)
    bool marks wrong captions that do not count.
    """
    texts = text_features.unflatten(0, (-1, len(image_features)))  # (1 + K, N, D)
    logits = scale * torch.einsum("nd,knd->nk", image_features, texts)
    logits = logits.masked_fill(F.pad(ignored.T, (1, 0)), float("-inf"))
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


@torch.no_grad()
def retrieval(reranker: ClipReranker, data: ImageFolder, seed: int, n: int = 256) -> float:
    """Share of `n` images whose own caption scores highest among all n captions."""
    random = np.random.default_rng(seed)
    batch = data.batch(random.permutation(len(data))[:n], random)
    images = reranker.image_features(batch.images)
    texts = reranker.text_features(batch.captions)
    best: Tensor = (images @ texts.T).argmax(1)
    right = [caption == batch.captions[int(i)] for caption, i in zip(batch.captions, best, strict=True)]
    return sum(right) / len(right)
