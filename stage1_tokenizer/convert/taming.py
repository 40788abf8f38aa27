"""taming-transformers' VQGAN and GumbelVQ (Esser et al. 2021), from Lightning checkpoints.

Also the VQGANs of latent-diffusion (vq-f8), and the tokenizer inside a taming transformer's checkpoint. The reference
adds Gumbel noise even in evaluation; ours takes the largest logit. It does not clamp images to [-1, 1]; ours does.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stage1_tokenizer.bottlenecks import BottleneckConfig, GumbelConfig, VQConfig
from stage1_tokenizer.bottlenecks.vq import Metric
from stage1_tokenizer.convert.vqgan import SPATIAL, TAMING, Converted, read_vqgan, refuse_other_families
from tessera.config import Origin
from tessera.errors import InputError
from tessera.weights.foreign import Weights, find_files, mentions, one_checkpoint, pick_settings, read_tensors, section

FAMILY = "taming-vqgan"
INSIDE = "first_stage_model."  # of a transformer's checkpoint
# Discriminator and LPIPS; colours that show a map; what a codebook of moving averages counts.
IGNORED = r"loss\.|colorize$|quantize\.(embedding\.|embed\.)?(cluster_size|embed_avg)$"
GUMBEL = TAMING._replace(codebook="quantize.embed.weight")
FILES = ("*.ckpt", "ckpts/*.ckpt", "checkpoints/*.ckpt", "*.safetensors", "*.bin", "*.pt", "*.pth")
SETTINGS = ("*.yaml", "*.yml", "configs/*.yaml")
# IBQ has the same names and chooses codes in another way (see ibq.py): told by its class, or by arguments of its own.
IBQ = re.compile(r"(^|[._/\- ])IBQ$|Index_?(Back)?_?Propagation", re.IGNORECASE)
IBQ_ARGUMENTS = ("entropy_temperature", "sample_minimization_weight", "batch_maximization_weight")


def read(sources: Sequence[Path]) -> Converted:
    """From a checkpoint, with its YAML if that is given, or from the folder of both."""
    weights, settings = open_checkpoint(sources, FILES, SETTINGS)
    if is_ibq(settings) or says_ibq(sources):
        raise InputError(f"{weights.where} is {IBQ_INSTEAD}")
    origin = Origin(
        family=FAMILY,
        project="CompVis/taming-transformers",
        files=(weights.where,),
        code_licence="MIT",
        weights_licence="none stated apart from the code's",
    )
    return read_taming(weights, FAMILY, origin, model_settings(settings))


IBQ_INSTEAD = (
    f"an IBQ tokenizer, which has the same names as {FAMILY} but chooses codes in another way; convert it as ibq-vq"
)


def is_ibq(settings: dict[str, Any]) -> bool:
    """Whether settings say that the model is an IBQ tokenizer."""
    arguments = model_settings(settings)
    return bool(IBQ.search(target(settings))) or any(name in arguments for name in IBQ_ARGUMENTS)


def says_ibq(sources: Sequence[Path]) -> bool:
    """Whether a checkpoint among the sources says, beside its weights, that it is of an IBQ tokenizer."""
    return any(mentions(path, IBQ) for path in find_files(sources, FILES))


# Settings -------------------------------------------------------------------------------------------------------------


def model_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the model and what is below them in `ddconfig`, side by side; empty where there are none.

    Projects write them as `model.params`, as `model.init_args` (LightningCLI), or alone (Emu3.5).
    """
    places = (section(settings, "model", "params"), section(settings, "model", "init_args"), settings)
    arguments = next((place for place in places if "ddconfig" in place or "embed_dim" in place), places[0])
    return section(arguments, "ddconfig") | arguments


def target(settings: dict[str, Any]) -> str:
    """The class of the model, empty where the settings do not say."""
    model = section(settings, "model")
    return str(model.get("target") or model.get("class_path") or settings.get("target") or "")


def describes(settings: dict[str, Any]) -> dict[str, Any]:
    """What settings say of a model of this kind: its class and its arguments; empty where that is nothing."""
    arguments = model_settings(settings)
    return {"class": target(settings), **arguments} if arguments else {}


def open_checkpoint(
    sources: Sequence[Path],
    files: Sequence[str],
    settings: Sequence[str],
    told: Callable[[dict[str, Any]], Any] = describes,
) -> tuple[Weights, dict[str, Any]]:
    """The VQGAN's weights, and the settings beside them, empty when there are none.

    `told` gives what settings say of the model: of several files the one that says something is taken.
    """
    configs = [path for pattern in settings for path in find_files(sources, (pattern,)) if _is_yaml(path)]
    found = [path for path in find_files(sources, files) if not _is_yaml(path)]
    file = one_checkpoint(found, "one checkpoint is needed, a .ckpt file or its folder")
    tensors = read_tensors([file])
    inside = {name.removeprefix(INSIDE): t for name, t in tensors.items() if name.startswith(INSIDE)}
    return Weights(inside or tensors, file.name, IGNORED), pick_settings(configs, told)


def _is_yaml(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml")


# Weights --------------------------------------------------------------------------------------------------------------


def read_taming(
    weights: Weights,
    family: str,
    origin: Origin,
    settings: dict[str, Any],
    *,
    image_size: int | None = None,
    image_channels: int = 3,
    metric: Metric = "euclidean",
) -> Converted:
    """A checkpoint with taming's names; `settings` are compared with it as far as they go.

    `image_size` is what it is used at where they do not say.
    """
    refuse_other_families(weights, family, TAMING.encoder_block.format(level=0, block=0) + ".conv1.weight")
    if SPATIAL in weights:
        raise InputError(
            f"{weights.where} has a decoder with spatial norms, so it is a MoVQGAN; convert it as sber-movqgan"
        )
    gumbel = GUMBEL.codebook in weights
    names = GUMBEL if gumbel else TAMING
    codes = compare(weights, names.codebook, settings)
    bottleneck: BottleneckConfig = GumbelConfig(codebook_size=codes)
    if not gumbel:
        bottleneck = VQConfig(codebook_size=codes, metric=metric)
    size = settings.get("resolution")
    return read_vqgan(
        weights,
        names,
        bottleneck,
        origin,
        image_size=size if isinstance(size, int) else image_size,
        image_channels=image_channels,
    )


def compare(weights: Weights, codebook: str, settings: dict[str, Any]) -> int:
    """The number of codes. Raises InputError where `settings` say another one, or codes of another width."""
    codes, dim = weights.shape(codebook)
    for key, value in {"n_embed": codes, "embed_dim": dim}.items():
        if settings.get(key, value) != value:
            raise InputError(
                f"the settings say {key} {settings[key]}, but {weights.where} has {value}; "
                "give the checkpoint and the settings that belong together"
            )
    return codes
