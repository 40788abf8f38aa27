"""Trains an image tokenizer: `tessera train tokenizer RECIPE.yaml` (VQGAN, Esser et al. 2021, section 3.1)."""

from pathlib import Path

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoded, Autoencoder, AutoencoderConfig
from stage1_tokenizer.doctor import Doctor, DoctorConfig
from stage1_tokenizer.doctor_page import exemplars, write_page
from stage1_tokenizer.losses.adversarial import (
    AdversarialKind,
    LeCam,
    PatchDiscriminator,
    adversarial_losses,
    frozen,
    gradient_penalty,
    gradient_ratio,
)
from stage1_tokenizer.losses.perceptual import PerceptualConfig, build_perceptual
from stage1_tokenizer.losses.pixels import bernoulli_loss, logit_laplace_loss
from tessera.config import Config, read_recipe
from tessera.data.source import DataConfig, ImageFolder, Steps, open_images
from tessera.metrics import perplexity, psnr
from tessera.training.averages import AveragedWeights
from tessera.training.optimizers import OptimizerConfig
from tessera.training.run import Run, RunConfig
from tessera.weights.writing import refuse_data_folder


class LossConfig(Config):
    l1_weight: float = Field(1.0, ge=0)
    l2_weight: float = Field(1.0, ge=0)
    bernoulli_weight: float = Field(0.0, ge=0)  # of -log p a number; needs model.pixels=bernoulli
    logit_laplace_weight: float = Field(0.0, ge=0)  # of -log p a number; needs model.pixels=logit-laplace
    perceptual: PerceptualConfig | None = None
    perceptual_weight: float = Field(1.0, ge=0)
    perceptual_from: int = Field(0, ge=0)  # the step at which it joins
    adversarial_weight: float = Field(0.5, ge=0)  # on top of the ratio of gradient norms; 0 for no discriminator
    adversarial: AdversarialKind = "hinge"
    adversarial_from: int = Field(10_000, ge=0)  # the step at which the discriminator joins; before, it changes nothing
    adversarial_warmup: int = Field(0, ge=0)  # steps from then on in which it learns and is not yet heard
    adversarial_ramp: int = Field(0, ge=0)  # steps after those over which the adversarial weight grows to its full size
    r1_weight: float = Field(0.0, ge=0)  # gamma of the discriminator's gradient penalty; StyleGAN 10. Off at 0
    lecam_weight: float = Field(0.0, ge=0)  # of the LeCam regularisation of the discriminator; 1e-4 to 1e-2. Off at 0
    decoder_only_from: int | None = Field(None, ge=0)  # from this step codes stay what they are and the decoder learns
    discriminator_channels: int = Field(64, ge=8, multiple_of=8)
    discriminator_depth: int = Field(3, ge=1)


class TokenizerRecipe(Config):
    data: DataConfig
    model: AutoencoderConfig
    loss: LossConfig = LossConfig()
    doctor: DoctorConfig = DoctorConfig()  # of the codebook; a continuous bottleneck has none
    optimizer: OptimizerConfig = OptimizerConfig()
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-4, betas=(0.5, 0.9))
    run: RunConfig

    @model_validator(mode="after")
    def _likelihood_fits(self) -> "TokenizerRecipe":
        weights = {"bernoulli": self.loss.bernoulli_weight, "logit-laplace": self.loss.logit_laplace_weight}
        for kind, weight in weights.items():
            if weight > 0 and self.model.pixels != kind:
                raise ValueError(
                    f"loss.{kind.replace('-', '_')}_weight needs model.pixels={kind}, but that is {self.model.pixels}"
                )
        return self


def train(recipe_path: str | Path, overrides: list[str] | None = None) -> Path:
    """Trains the tokenizer of a recipe, or resumes; returns the folder of the result."""
    recipe = read_recipe(TokenizerRecipe, recipe_path, overrides)
    data = open_images(recipe.data, recipe.model.image_size)
    validation = open_images(recipe.data, recipe.model.image_size, validation=True)
    torch.manual_seed(recipe.run.seed)
    bare = Autoencoder(recipe.model)
    bare_discriminator = PatchDiscriminator(recipe.loss.discriminator_channels, recipe.loss.discriminator_depth)

    refuse_data_folder(recipe.run.output, recipe.data.folder, "run.output")
    run = Run(recipe.run, recipe, {"data.folder": data.identity}, len(data))
    if data.left_out:
        run.say(data.left_out)
    autoencoder = run.prepare("autoencoder", bare)
    average = run.averaged("average", bare)
    discriminator = run.prepare("discriminator", bare_discriminator, compile=False)
    optimizers = run.optimizers("optimizer", bare, recipe.optimizer)
    discriminator_optimizers = run.optimizers(
        "discriminator_optimizer", bare_discriminator, recipe.discriminator_optimizer
    )
    losses, lecam = adversarial_losses(recipe.loss.adversarial), LeCam().to(run.device)
    if recipe.loss.lecam_weight > 0:
        run.state["lecam"] = lecam
    doctor = None if bare.continuous else Doctor(recipe.doctor, bare.bottleneck, run.device)
    if doctor is not None:
        run.state["doctor"] = doctor
    perceptual = build_perceptual(recipe.loss.perceptual).to(run.device) if recipe.loss.perceptual else None
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    folder = run.folder / "model"

    for batch in run.batches(Steps(data, recipe.run.batch_size, recipe.run.seed, rank, world)):
        if recipe.loss.decoder_only_from is not None and run.step >= recipe.loss.decoder_only_from:
            fix_codes(bare, average if run.step == recipe.loss.decoder_only_from else None)
        adversarial = recipe.loss.adversarial_weight > 0 and run.step >= recipe.loss.adversarial_from
        adversarial_weight = recipe.loss.adversarial_weight * adversarial_share(run.step, recipe.loss)
        if doctor is not None:
            doctor.treat(optimizers)
            adversarial_weight *= doctor.adversarial_share

        # The autoencoder learns to reconstruct and, later on, to fool the discriminator.
        reconstructions = []
        for part in run.parts(batch):
            images = part.images.to(run.device)  # (B, 3, H, W) in [-1, 1]
            with run.autocast():
                output = autoencoder(images)
            reconstruction = pixel_loss(output, images, recipe.loss)
            if perceptual is not None and run.step >= recipe.loss.perceptual_from:
                with run.autocast():
                    distance = perceptual(output.images, images)
                reconstruction = reconstruction + recipe.loss.perceptual_weight * distance
                run.log(perceptual=distance)
            loss = reconstruction + output.bottleneck_loss
            if adversarial_weight > 0:
                with frozen(bare_discriminator), run.autocast():
                    fooling = losses.generator(discriminator(output.images))
                balance = gradient_ratio(reconstruction, fooling, at=bare.decoder.conv_out.weight)
                loss = loss + adversarial_weight * balance * fooling
                run.log(balance=balance, fooling=fooling)
            run.backward(loss)
            reconstructions.append(output.images.detach())
            quality = psnr(output.images.detach(), images)  # (B,)
            run.log(loss=loss, bottleneck=output.bottleneck_loss, psnr=quality.mean())
            if output.codes is not None:
                run.log(perplexity=perplexity(bare.bottleneck.count(output.codes)))
            if doctor is not None:
                assert output.codes is not None
                doctor.observe(bare.bottleneck, output.codes, quality)
        run.update(optimizers)
        average.update()

        # The discriminator learns to tell reconstructions from real images.
        for part, reconstructed in zip(run.parts(batch), reconstructions, strict=True):
            if not adversarial:
                continue
            images = part.images.to(run.device).requires_grad_(recipe.loss.r1_weight > 0)
            with run.autocast():
                real, fake = discriminator(images), discriminator(reconstructed)
            discriminator_loss = losses.discriminator(real, fake)
            if recipe.loss.r1_weight > 0:
                penalty = gradient_penalty(real, images)
                discriminator_loss = discriminator_loss + recipe.loss.r1_weight / 2 * penalty
                run.log(gradient_penalty=penalty)
            if recipe.loss.lecam_weight > 0:
                discriminator_loss = discriminator_loss + recipe.loss.lecam_weight * lecam(real, fake)
            run.backward(discriminator_loss)
            run.log(discriminator=discriminator_loss)
        if adversarial:
            run.update(discriminator_optimizers)

        if doctor is not None and run.due_after(recipe.doctor.every):
            _visit(run, doctor, bare, adversarial_weight > 0, recipe.loss)
        if run.samples_due():
            with average.applied():
                with run.optional("model") as folder:
                    bare.save_pretrained(folder, dtype=torch.float16)
                _sample(run, bare, validation)
            if doctor is not None:
                with run.optional("doctor.html") as page:
                    write_page(page, doctor, exemplars(bare, data), run.step + 1)
    return folder


def _visit(run: Run, doctor: Doctor, autoencoder: Autoencoder, adversarial: bool, config: LossConfig) -> None:
    """The doctor's visit after the step under way: figures to the log, what it does and why to the terminal too."""
    before = len(doctor.actions)
    compared_from = config.perceptual_from if run.step >= config.perceptual_from and config.perceptual else 0
    found = doctor.visit(run.step + 1, autoencoder.bottleneck, adversarial, compared_from)
    run.log_now(
        **{
            "codebook/used": found.used,
            "codebook/perplexity": found.perplexity,
            "codebook/dead": found.dead,
            "codebook/revived": found.revived,
            "doctor/learning_rate_share": doctor.learning_rate_share,
            "doctor/adversarial_share": doctor.adversarial_share,
        }
    )
    for action in doctor.actions[before:]:
        run.say(f"doctor, step {action.step}: {action.what}, because {action.why}")


def fix_codes(autoencoder: Autoencoder, average: AveragedWeights | None) -> None:
    """Ends the learning of encoder and bottleneck, at the averaged ones if they are given.

    A prior can then be trained on the codes of the weights exported so far while the decoder learns on.
    """
    if average is not None:
        autoencoder.encoder.load_state_dict(average.part("encoder."))
        autoencoder.bottleneck.load_state_dict(average.part("bottleneck."))
    autoencoder.encoder.requires_grad_(False)
    autoencoder.bottleneck.eval().requires_grad_(False)


def pixel_loss(output: Autoencoded, reference: Tensor, config: LossConfig) -> Tensor:
    """Weighted sum of mean absolute differences, mean squared differences and -log likelihoods."""
    images, reference = output.images.float(), reference.float()
    loss = config.l1_weight * F.l1_loss(images, reference) + config.l2_weight * F.mse_loss(images, reference)
    if config.bernoulli_weight > 0:
        loss = loss + config.bernoulli_weight * bernoulli_loss(output.output, reference)
    if config.logit_laplace_weight > 0:
        loss = loss + config.logit_laplace_weight * logit_laplace_loss(output.output, reference)
    return loss


def adversarial_share(step: int, config: LossConfig) -> float:
    """Share of the adversarial weight at `step`: 0 until the discriminator has warmed up, then a ramp up to 1."""
    done = step - config.adversarial_from - config.adversarial_warmup
    if done < 0:
        return 0.0
    return min(1.0, (done + 1) / max(1, config.adversarial_ramp))


def _sample(run: Run, autoencoder: Autoencoder, validation: ImageFolder) -> None:
    """Figures on up to 256 validation images, and some of them above their reconstructions."""
    wanted = torch.linspace(0, len(validation) - 1, min(256, len(validation))).long().tolist()
    images, _, skipped = validation.readable(wanted)
    run.note_skipped(skipped)
    images = images.to(run.device)
    if not len(images):
        return run.say(f"none of {len(wanted)} validation pictures can be read, so there are no samples")
    decoded = torch.cat([autoencoder.decode_latents(autoencoder.encode_latents(part)) for part in images.split(64)])
    run.log_now(**{"validation/psnr": float(psnr(decoded, images).mean())})
    shown = [pair for i in range(0, min(256, len(images)), 16) for pair in (images[i], decoded[i])]
    labels = [label for i in range(len(shown) // 2) for label in ("image", "reconstruction")]
    run.save_images("reconstructions", torch.stack(shown), labels)
