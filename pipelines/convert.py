"""Public checkpoints as folders of ours: an image tokenizer alone, or a prior with all it needs as a bundle."""

from collections.abc import Sequence
from pathlib import Path

from pipelines.bundle import Bundle, new_bundle, save_bundle
from stage1_tokenizer import Autoencoder
from stage1_tokenizer.convert import FAMILIES as TOKENIZERS
from stage1_tokenizer.convert import convert as convert_tokenizer
from stage2_prior.convert import convert as convert_prior
from tessera.errors import InputError


def convert(
    family: str,
    sources: Sequence[Path],
    out: Path,
    *,
    image_size: int | None = None,
    image_tokenizer: Path | None = None,
    settings: Sequence[str] = (),
    weights: str | None = None,
) -> Path:
    """Writes what `sources` hold to the folder `out` and returns it.

    `image_tokenizer` is a folder of ours, for priors that are published without theirs; `settings` are `key=value`
    and say what a prior's files do not; `weights` is `model` or `ema` where a file has both. Raises InputError for what
    does not go together.
    """
    if family in TOKENIZERS:
        given = [name for name, value in (("--image-tokenizer", image_tokenizer), ("--set", settings)) if value]
        if given:
            raise InputError(f"{given[0]} is for priors, and {family} is an image tokenizer; leave it out")
        return convert_tokenizer(family, sources, out, image_size, weights)
    if image_size is not None:
        raise InputError(f"--image-size is for image tokenizers, and {family} is a prior, whose size is fixed")
    new_bundle(out)
    tokenizer = Autoencoder.from_pretrained(image_tokenizer) if image_tokenizer is not None else None
    prior, own_tokenizer, sampling, maps = convert_prior(family, sources, dict(map(_setting, settings)), weights)
    tokenizer = tokenizer or own_tokenizer
    if tokenizer is None:
        raise InputError(
            f"{family}'s prior is published without an image tokenizer; convert that first "
            f"({', '.join(TOKENIZERS)}) and give its folder with --image-tokenizer"
        )
    prior.config = prior.config.model_copy(update={"image_tokenizer_fingerprint": tokenizer.fingerprint})
    return save_bundle(out, Bundle(tokenizer, prior, sampling=sampling, segmentation_tokenizer=maps))


def _setting(text: str) -> tuple[str, str]:
    """A setting and its value as it is written: what it stands for is up to the family's settings."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InputError(f"the setting '{text}' must look like key=value")
    return key, value
