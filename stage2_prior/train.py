"""Trains a prior on codes: `tessera train prior RECIPE.yaml` (Ramesh et al. 2021, section 2.2; Dayma et al. 2021)."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Annotated, Any, NamedTuple, assert_never

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from torch import Tensor, nn
from torch.utils.data import Dataset

from stage1_tokenizer import Autoencoder
from stage2_prior.bart import BartConfig, BartPrior, BartSize
from stage2_prior.base import Condition, Predictions, Prior, unflatten_codes
from stage2_prior.codes import Codes, CodesBatch, CodesSteps
from stage2_prior.conditions import batch_prefix, condition_of
from stage2_prior.gpt import GPTConfig, GPTPrior, GPTSize
from stage2_prior.load import load_prior
from stage2_prior.lora import base_fingerprint
from stage2_prior.pixelcnn import PixelCNNConfig, PixelCNNPrior, PixelCNNSize
from stage2_prior.presets import with_preset
from stage2_prior.sampling import Sampling, sample
from stage2_prior.truncation import describe, truncation
from tessera.config import Config, read_recipe, validate
from tessera.errors import InputError
from tessera.text import PAD, TextTokenizer
from tessera.training.averages import AveragedWeights, evaluating
from tessera.training.optimizers import OptimizerConfig, Optimizers
from tessera.training.run import Run, RunConfig


def _kind(size: Any) -> str:
    """The tag of a model; a GPT is meant where it is left out."""
    return str(size.get("type", "gpt")) if isinstance(size, dict) else getattr(size, "type", "gpt")


AnySize = Annotated[
    Annotated[GPTSize, Tag("gpt")] | Annotated[BartSize, Tag("bart")] | Annotated[PixelCNNSize, Tag("pixelcnn")],
    Discriminator(_kind),
]
Trainable = GPTPrior | BartPrior | PixelCNNPrior


class Lesson(Config):
    """What a prior learns and what is hidden from it meanwhile, in training as in fine-tuning."""

    condition_dropout: float = Field(0.1, ge=0, lt=1)  # share of conditions left out, for guidance
    bpe_dropout: float = Field(0.0, ge=0, le=1)  # share of merges left out of captions; Provilkov et al. 2020: 0.1
    pkeep: float = Field(1.0, gt=0, le=1)  # share of codes read as they are, the others at random; Esser et al. 2021
    text_weight: float = Field(0.125, ge=0)  # of the text loss beside the image loss; DALL·E: 1/8
    depth_decay: float = Field(1.0, gt=0, le=1)  # weight of a residual code's loss beside that of the code it refines
    code_dropout: float = Field(0.0, ge=0, le=1)  # share of images read in part, at random; Bowman et al. 2016
    # Of a model with random order: shares of the run between which random orders give way to raster order; RAR: 0.5
    # and 0.75.
    order_annealing: tuple[float, float] = (1.0, 1.0)
    prompts: tuple[str, ...] = ()  # of the samples; by default conditions of the data
    sampling: Sampling = Sampling()  # of the samples
    run: RunConfig

    @model_validator(mode="after")
    def _annealing_rises(self) -> "Lesson":
        if not 0 <= self.order_annealing[0] <= self.order_annealing[1] <= 1:
            raise ValueError(f"order_annealing must be two rising shares of the run, got {self.order_annealing}")
        return self


class PriorRecipe(Lesson):
    codes: Path  # written by tessera encode
    condition: Condition = "text"  # what the prior draws from: text, class, segmentation or none
    text_tokenizer: Path | None = None  # that a prior of text reads with
    image_tokenizer: Path | None = None  # draws the sample images; must be the one the codes were made with
    prior: Path | None = None  # continues from the weights of this prior, at its sizes, instead of from random ones
    trunk: Path | None = None  # begins as `prior` would, with a gpt of another image tokenizer's codes; these are new
    model: Annotated[AnySize, BeforeValidator(with_preset)] = GPTSize()  # `preset: NAME` gives what is not named
    activation_checkpointing: bool = False  # compute blocks twice instead of remembering them: less memory, more time
    optimizer: OptimizerConfig = OptimizerConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "PriorRecipe":
        predicts_text = isinstance(self.model, GPTSize) and self.condition == "text"
        if self.text_weight and not predicts_text and "text_weight" in self.model_fields_set:
            raise ValueError(
                f"text_weight is for a gpt that predicts a text, and {self.model.type} only reads its {self.condition}"
            )
        if isinstance(self.model, BartSize) and self.condition != "text":
            raise ValueError(f"bart reads text, and the condition is {self.condition}; use a gpt or a pixelcnn")
        if isinstance(self.model, PixelCNNSize) and self.activation_checkpointing:
            raise ValueError("activation_checkpointing is for transformers, not for a pixelcnn")
        if self.prior is not None and self.trunk is not None:
            raise ValueError("prior goes on with codes that the weights know, trunk with others; name one of the two")
        if self.prompts and self.condition != "text":
            raise ValueError(f"prompts are texts, and the condition is {self.condition}; leave them out")
        return self


class Objective(nn.Module):
    """Prefixes and codes -> the mean loss of the text, 0 where it is only read, and of each codebook (Q,), in nats.

    One module, for several processes. In training only the share `pkeep` of the codes is read as it is, so that the
    prior learns to continue from its own mistakes, and of the share `code_dropout` of the images some positions are not
    read at all, so that it cannot do without the condition; what it predicts is always the true code.
    """

    def __init__(self, prior: Trainable, pkeep: float = 1.0, code_dropout: float = 0.0) -> None:
        super().__init__()
        self.prior, self.pkeep, self.code_dropout = prior, pkeep, code_dropout

    def forward(self, prefix: Tensor, codes: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor]:
        read = corrupt(codes, self.pkeep, self.prior.codebook_size) if self.training and self.pkeep < 1 else codes
        hidden = None
        if self.training and self.code_dropout:
            positions = self.prior.length // self.prior.num_codebooks
            hidden = hide(len(codes), positions, self.code_dropout, codes.device)
        predictions = self._predict(prefix, read, order, hidden)
        image = F.cross_entropy(predictions.codes.flatten(0, 1).float(), codes.flatten(), reduction="none")
        image = image.view(-1, self.prior.num_codebooks).mean(0)
        if predictions.text is None:
            return image.new_zeros(()), image
        counted = text_targets(prefix)
        targets = prefix[:, 1:].masked_fill(~counted, -100)
        text = F.cross_entropy(predictions.text.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        return text / counted.sum().clamp_min(1), image

    def _predict(self, prefix: Tensor, codes: Tensor, order: Tensor | None, hidden: Tensor | None) -> Predictions:
        if isinstance(self.prior, GPTPrior):
            return self.prior.predict(prefix, codes, order, hidden)
        return self.prior.predict(prefix, codes)


def text_targets(prefix: Tensor) -> Tensor:
    """Which tokens after the first count in the text loss, (B, P) -> (B, P - 1) bool: those of the text, and the first
    <pad> after it, which says that it ends; the others, and empty captions, teach nothing."""
    return (prefix[:, :-1] != PAD) & (prefix[:, 1:2] != PAD)


def noisy_prefix(run: Run, prior: Trainable, batch: CodesBatch, lesson: Lesson) -> Tensor:
    """The prefixes of a step's images (B, P), of which the noise leaves some out and cuts captions anew."""
    dropped = (torch.rand(len(batch.codes)) < lesson.condition_dropout).to(run.device)
    random = Random(f"{run.config.seed} {run.step} {run.accelerator.process_index}")
    prefix = batch_prefix(prior, batch, lesson.bpe_dropout, random)
    return torch.where(dropped[:, None], prior.null_prefix(1), prefix)


def corrupt(codes: Tensor, pkeep: float, codebook_size: int) -> Tensor:
    """Codes with all but the share `pkeep` replaced by random ones (taming-transformers' `pkeep`)."""
    kept = torch.rand(codes.shape, device=codes.device) < pkeep
    return torch.where(kept, codes, torch.randint_like(codes, codebook_size))


def hide(rows: int, positions: int, share: float, device: torch.device) -> Tensor:
    """Which positions are not read, (rows, positions) bool: of this share of the rows some, from none to all with equal
    chance (the word dropout of Bowman et al. 2016, section 3.1, its rate drawn for each row)."""
    rate = torch.rand(rows, 1, device=device) * (torch.rand(rows, 1, device=device) < share)
    return torch.rand(rows, positions, device=device) < rate


def random_order(rows: int, positions: int, raster_share: float, device: torch.device) -> Tensor:
    """A permutation of the image positions for each row, (rows, S); of this share of them in raster order."""
    raster = torch.arange(positions, device=device).expand(rows, -1)
    shuffled = torch.rand(rows, positions, device=device).argsort(1)
    return torch.where(torch.rand(rows, 1, device=device) < raster_share, raster, shuffled)


def raster_share(progress: float, annealing: tuple[float, float]) -> float:
    """The share of images read in raster order at this share of the run (Yu et al. 2024, equation 6)."""
    first, last = annealing
    if progress < first:
        return 0.0
    return 1.0 if progress >= last else (progress - first) / (last - first)


def train(recipe_path: str | Path, overrides: list[str] | None = None) -> Path:
    """Trains the prior of a recipe, or resumes; returns the folder of the result."""
    recipe = read_recipe(PriorRecipe, recipe_path, overrides)
    codes = Codes(recipe.codes)
    text_tokenizer = None
    if recipe.condition == "text" and recipe.text_tokenizer is not None:
        text_tokenizer = TextTokenizer.from_pretrained(recipe.text_tokenizer)
    image_tokenizer = find_image_tokenizer(recipe.image_tokenizer, codes, recipe.codes)
    torch.manual_seed(recipe.run.seed)
    prior = _prior(recipe, codes, text_tokenizer)
    check_lesson(recipe, prior)

    run = Run(recipe.run, recipe, _identities(recipe, codes, text_tokenizer, prior))
    if not isinstance(prior, PixelCNNPrior):
        prior.activation_checkpointing = recipe.activation_checkpointing
    objective = run.prepare("prior", Objective(prior, recipe.pkeep, recipe.code_dropout))
    average = run.averaged("average", prior)
    optimizers = run.optimizers("optimizer", prior, recipe.optimizer)
    if text_tokenizer is not None:
        captions = [caption for choices in codes.captions for caption in choices]
        run.say(describe(truncation(text_tokenizer, captions, prior.prefix_length), prior.prefix_length))

    def save(folder: Path) -> None:
        prior.save_pretrained(folder, dtype=torch.float16, max_shard_size="15MB")

    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    steps = CodesSteps(codes, recipe.run.batch_size, recipe.run.seed, rank, world)
    fit(run, recipe, prior, objective, optimizers, average, steps, save, Samples(codes, image_tokenizer))
    return run.folder / "model"


class Samples(NamedTuple):
    """What samples in training are conditioned on where there are no prompts, and decoded by."""

    codes: Codes
    image_tokenizer: Autoencoder | None  # None: no samples


def fit(
    run: Run,
    lesson: Lesson,
    prior: Trainable,
    objective: nn.Module,
    optimizers: Optimizers,
    average: AveragedWeights,
    steps: Dataset[CodesBatch],
    save: Callable[[Path], None],
    samples: Samples,
) -> None:
    """The loop of training and of fine-tuning: `objective` is the prior's, prepared; `save` exports the prior."""
    depth_weights = lesson.depth_decay ** torch.arange(prior.num_codebooks, device=run.device)
    depth_weights = depth_weights / depth_weights.sum()
    predicts_text = isinstance(prior, GPTPrior) and prior.condition == "text"
    text_weight = lesson.text_weight if predicts_text else 0.0
    annealing = lesson.order_annealing

    for batch in run.batches(steps):
        prefix = noisy_prefix(run, prior, batch, lesson)  # (B, P)
        order = None
        if isinstance(prior, GPTPrior) and prior.config.order == "random":
            raster = raster_share(run.step / lesson.run.steps, annealing)
            order = random_order(len(prefix), prior.length // prior.num_codebooks, raster, run.device)
        tokens = text_targets(prefix).sum()
        for part in run.parts(Step(prefix, batch.codes.to(run.device), order)):
            with run.autocast():
                text_loss, depth_losses = objective(*part)  # a mean over the part's tokens, and over its rows
            if run.share < 1:
                text_loss = text_loss * text_targets(part.prefix).sum() / tokens.clamp_min(1) / run.share
            image_loss = (depth_weights * depth_losses).sum()
            loss = (text_weight * text_loss + image_loss) / (text_weight + 1)
            run.backward(loss)
            text = {"text": text_loss} if predicts_text else {}
            run.log(loss=loss, **text, image=depth_losses.mean(), first=depth_losses[0])
        run.update(optimizers)
        average.update()

        if run.samples_due():
            with average.applied(), evaluating(prior), torch.no_grad():
                with run.optional("model") as folder:
                    save(folder)
                if samples.image_tokenizer is not None:
                    tokenizer = samples.image_tokenizer.to(run.device)
                    sample_images(run, prior, tokenizer, lesson.prompts, lesson.sampling, samples.codes)


class Step(NamedTuple):
    prefix: Tensor  # (B, P)
    codes: Tensor  # (B, T)
    order: Tensor | None  # (B, S)


def check_lesson(lesson: Lesson, prior: Trainable) -> None:
    """Raises InputError for what this kind of prior cannot be taught in this way."""
    if lesson.code_dropout and not isinstance(prior, GPTPrior):
        raise InputError(f"code_dropout is for a gpt, and the prior is a {prior.config.type}; leave it out")


def _identities(
    recipe: PriorRecipe, codes: Codes, text_tokenizer: TextTokenizer | None, prior: Trainable
) -> dict[str, str]:
    """What the recipe's paths lead to; `prior` as it is before the first step."""
    found = {"codes": codes.identity, "image_tokenizer": codes.meta.tokenizer_fingerprint}
    if text_tokenizer is not None:
        found["text_tokenizer"] = text_tokenizer.fingerprint
    if recipe.prior or recipe.trunk:
        found["prior" if recipe.prior else "trunk"] = base_fingerprint(prior)
    return found


def _prior(recipe: PriorRecipe, codes: Codes, text_tokenizer: TextTokenizer | None) -> Trainable:
    """A new prior for the codes, or the one that the recipe continues from."""
    condition = condition_of(recipe.condition, codes, text_tokenizer)
    begin = recipe.prior or recipe.trunk
    if begin is None:
        sizes = recipe.model.model_dump() | condition | {
            "codebook_size": codes.meta.codebook_size,
            "code_shape": codes.meta.code_shape,
            "image_tokenizer_fingerprint": codes.meta.tokenizer_fingerprint,
            "condition_dropout": recipe.condition_dropout,
        }  # fmt: skip
        condition_kind = {"condition": recipe.condition}
        match recipe.model:
            case GPTSize():
                return GPTPrior(validate(GPTConfig, sizes | condition_kind, where="model"), text_tokenizer)
            case PixelCNNSize():
                return PixelCNNPrior(validate(PixelCNNConfig, sizes | condition_kind, where="model"), text_tokenizer)
            case BartSize():
                return BartPrior(validate(BartConfig, sizes, where="model"), text_tokenizer)
            case _:
                assert_never(recipe.model)
    prior = load_prior(begin, text_tokenizer)
    if not isinstance(prior, Trainable):
        raise InputError(f"the prior in {begin} is of type {type(prior).__name__}, which cannot be trained here")
    if prior.condition != recipe.condition or any(getattr(prior.config, key) != condition[key] for key in condition):
        raise InputError(
            f"the prior in {begin} was trained with another condition, text tokenizer, other classes or other "
            "codes of maps than the recipe and its codes have; go on with the same"
        )
    if recipe.trunk is not None:
        if not isinstance(prior, GPTPrior):
            raise InputError(f"trunk needs a gpt, and the prior in {begin} is a {prior.config.type}; begin without it")
        prior = with_new_codes(prior, codes)
    else:
        check_codes(prior, begin, codes, recipe.codes)
    if recipe.condition_dropout > 0:  # else it keeps what it knows of drawing without a condition
        prior.config = prior.config.model_copy(update={"condition_dropout": recipe.condition_dropout})
    return prior.train()


def with_new_codes(prior: GPTPrior, codes: Codes) -> GPTPrior:
    """The prior with the codes of another image tokenizer to draw: it keeps what it knows of the condition, its blocks
    and, on a grid of the same size, its positions; embeddings and head of the codes are random."""
    update = {
        "codebook_size": codes.meta.codebook_size,
        "code_shape": codes.meta.code_shape,
        "image_tokenizer_fingerprint": codes.meta.tokenizer_fingerprint,
    }
    new = GPTPrior(prior.config.model_copy(update=update), prior.text_tokenizer)
    fresh = new.state_dict()
    kept = {
        name: weight
        for name, weight in prior.state_dict().items()
        if not name.startswith(("code_embedding.", "code_head.")) and fresh[name].shape == weight.shape
    }
    new.load_state_dict(fresh | kept)
    return new


def check_codes(prior: Prior, folder: Path, codes: Codes, codes_folder: Path) -> None:
    """Raises InputError unless the codes are those that a prior draws."""
    if prior.config.image_tokenizer_fingerprint != codes.meta.tokenizer_fingerprint:
        raise InputError(
            f"the prior in {folder} draws codes of tokenizer {prior.config.image_tokenizer_fingerprint}, "
            f"{codes_folder} holds codes of {codes.meta.tokenizer_fingerprint}; encode with the prior's own tokenizer"
        )


def find_image_tokenizer(folder: Path | None, codes: Codes, codes_folder: Path) -> Autoencoder | None:
    """The tokenizer in `folder`, None without one. Raises InputError unless it made the codes."""
    if folder is None:
        return None
    tokenizer = Autoencoder.from_pretrained(folder)
    if tokenizer.continuous:
        raise InputError(f"image_tokenizer: {folder} is continuous and has no codes; name the one the codes are of")
    if tokenizer.fingerprint != codes.meta.tokenizer_fingerprint:
        raise InputError(
            f"the codes in {codes_folder} were made by tokenizer {codes.meta.tokenizer_fingerprint}, "
            f"{folder} is {tokenizer.fingerprint}; encode again or name the right tokenizer"
        )
    return tokenizer


def sample_images(
    run: Run, prior: Prior, tokenizer: Autoencoder, prompts: tuple[str, ...], sampling: Sampling, codes: Codes
) -> None:
    """An image for each of the prompts, or of some conditions of the codes; the same seeds every time."""
    rows = range(0, len(codes), -(-len(codes) // 16))
    labels = [(codes.captions[i] or ("",))[0] for i in rows]
    prefix = prior.prefix(prompts) if prompts else batch_prefix(prior, codes.batch(rows, labels))
    if prompts:
        labels = list(prompts)
    elif prior.condition == "class":
        labels = [codes.meta.class_names[codes.labels[i]] for i in rows]
    drawn = sample(prior, prefix, range(len(labels)), sampling)
    images = tokenizer.decode(unflatten_codes(drawn, tokenizer.code_shape))
    run.save_images("samples", images, labels)
