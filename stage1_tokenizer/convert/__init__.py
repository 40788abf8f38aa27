"""Public image tokenizers made ours: `tessera convert FAMILY SOURCE... --out FOLDER`, one file per family."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from stage1_tokenizer.convert.vqgan import Converted, build
from tessera.errors import InputError, nearest
from tessera.paths import expand
from tessera.weights.choice import choosing
from tessera.weights.folder import save_pretrained
from tessera.weights.writing import refuse_foreign

FAMILIES = (
    "taming-vqgan",
    "openai-dvae",
    "mindalle-vqgan",
    "rudalle-vqgan",
    "min-dalle-detoker",
    "llamagen-vq",
    "janus-vq",
    "diffusers-vq",
    "ibq-vq",
    "sber-movqgan",
    "chameleon-vq",
)

__all__ = ["FAMILIES", "convert"]


def convert(
    family: str,
    sources: Sequence[str | Path],
    out: str | Path,
    image_size: int | None = None,
    weights: str | None = None,
) -> Path:
    """Writes the tokenizer in `sources`, files or folders as published, to the folder `out` and returns it.

    `image_size` is what it is used at, where the checkpoint does not say; `weights` says which are taken, `model` or
    `ema`, where there are both. Raises InputError when the sources are not
    such a checkpoint, or when one of its weights is missing or left over.
    """
    out = expand(out)
    refuse_foreign(out)
    try:
        with choosing(weights) as choice:
            config, tensors = _read(family, [Path(source) for source in sources])
    except ValidationError as error:  # sizes that no model of ours has
        raise InputError(f"{sources[0]} asks for a model that cannot be built: {error.errors()[0]['msg']}") from None
    except InputError:
        raise
    except (ValueError, IndexError, ZeroDivisionError) as error:  # where a shape was read that no such model has
        raise InputError(
            f"{sources[0]} has weights of other shapes than {family} ({error}); check the family and the file"
        ) from None
    if image_size is not None:
        if image_size < 1 or image_size % config.trunk.factor:
            raise InputError(f"image_size must be divisible by the factor {config.trunk.factor}, got {image_size}")
        config = config.model_copy(update={"image_size": image_size})
    config = config.model_copy(update={"origin": choice.noted(config.origin)})
    save_pretrained(build(config, tensors), config, out)
    return out


def _read(family: str, sources: list[Path]) -> Converted:
    match family:
        case "taming-vqgan":
            from stage1_tokenizer.convert.taming import read
        case "openai-dvae":
            from stage1_tokenizer.convert.openai_dvae import read
        case "mindalle-vqgan":
            from stage1_tokenizer.convert.mindalle import read
        case "rudalle-vqgan":
            from stage1_tokenizer.convert.rudalle import read
        case "min-dalle-detoker":
            from stage1_tokenizer.convert.min_dalle import read
        case "llamagen-vq":
            from stage1_tokenizer.convert.llamagen import read
        case "janus-vq":
            from stage1_tokenizer.convert.janus import read
        case "diffusers-vq":
            from stage1_tokenizer.convert.diffusers import read
        case "ibq-vq":
            from stage1_tokenizer.convert.ibq import read
        case "sber-movqgan":
            from stage1_tokenizer.convert.movqgan import read
        case "chameleon-vq":
            from stage1_tokenizer.convert.chameleon import read
        case _:
            raise InputError(f"'{family}' is not a family of tokenizers{nearest(family, list(FAMILIES))}")
    return read(sources)
