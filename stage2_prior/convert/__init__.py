"""Public priors made ours: `tessera convert FAMILY SOURCE... --out FOLDER`, one file per family.

A family's file says what is published where (`PUBLISHED`, a sentence), and its `convert(sources, settings)` reads it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

from pydantic import ValidationError

from stage2_prior.convert.base import Converted
from tessera.errors import InputError, nearest
from tessera.weights.choice import choosing

FAMILIES = ("mindalle", "rudalle", "min-dalle", "llamagen", "janus", "taming")

__all__ = ["FAMILIES", "Converted", "convert"]


def convert(
    family: str,
    sources: Sequence[str | Path],
    settings: Mapping[str, object] | None = None,
    weights: str | None = None,
) -> Converted:
    """The prior in `sources`, files or folders as published, with what else they hold.

    `settings` say what the files do not, such as a number of heads, as values or as texts of them; `weights` says which
    are taken, `model` or `ema`, where there are both. Raises InputError when the sources are not of the
    family, when one of its weights is missing or left over, and, where there are none, with what to get and where.
    """
    module = _module(family)
    paths = [Path(source) for source in sources]
    missing = [path for path in paths if not path.exists()]
    if missing or not paths:
        what = f"{missing[0]} is neither a file nor a folder" if missing else f"{family} needs its files"
        raise InputError(f"{what}; {module.PUBLISHED}")
    try:
        with choosing(weights) as choice:
            converted: Converted = module.convert(paths, settings or {})
    except ValidationError as error:  # sizes that no model of ours has
        raise InputError(f"{paths[0]} asks for a model that cannot be built: {error.errors()[0]['msg']}") from None
    except InputError:
        raise
    except (ValueError, IndexError, ZeroDivisionError) as error:  # where a shape was read that no such model has
        raise InputError(
            f"{paths[0]} has weights of other shapes than {family} ({error}); check the family and the files"
        ) from None
    for part in (converted.prior, converted.image_tokenizer, converted.segmentation_tokenizer):
        if part is not None and part.config.origin is not None:
            part.config = part.config.model_copy(update={"origin": choice.noted(part.config.origin)})
    return converted


def _module(family: str) -> ModuleType:
    """The file of a family, with `PUBLISHED` and `convert(sources, settings) -> Converted`."""
    match family:
        case "mindalle":
            from stage2_prior.convert import mindalle

            return mindalle
        case "rudalle":
            from stage2_prior.convert import rudalle

            return rudalle
        case "min-dalle":
            from stage2_prior.convert import min_dalle

            return min_dalle
        case "llamagen":
            from stage2_prior.convert import llamagen

            return llamagen
        case "janus":
            from stage2_prior.convert import janus

            return janus
        case "taming":
            from stage2_prior.convert import taming

            return taming
        case _:
            raise InputError(f"'{family}' is not a family of priors{nearest(family, list(FAMILIES))}")
