"""Loads any prior from its folder: the `type` in config.json says which."""

from pathlib import Path

from pydantic import BaseModel

from stage2_prior.base import Prior, PriorConfig
from tessera.config import read_config
from tessera.errors import InputError, nearest
from tessera.text import FILE, TextTokenizer
from tessera.weights.building import built_from
from tessera.weights.folder import Unfilled, find_folder, load_weights

KINDS = ("gpt", "bart", "pixelcnn", "mindalle", "rudalle", "llamagen", "janus", "taming")


class Tagged(BaseModel):
    """As much of a prior's config as says which kind it is."""

    type: str = "gpt"


def load_prior(folder: str | Path, text_tokenizer: TextTokenizer | None = None) -> Prior:
    """The prior in a local folder or of a hub name, in eval mode.

    Without a `text_tokenizer` it takes the one in the folder, or the bundle's `text_tokenizer/` beside the folder, or
    none where there is none. Raises InputError when a file is missing or broken, or when the text tokenizer is not the
    one it was trained with.
    """
    folder = find_folder(folder)
    kind, model = prior_kind(read_config(Tagged, folder).type, str(folder))
    config = read_config(kind, folder)
    if text_tokenizer is None:
        beside = (folder, folder.parent / "text_tokenizer")
        found = next((place for place in beside if (place / FILE).is_file()), None)
        if found is not None or config.text_tokenizer_fingerprint:
            text_tokenizer = TextTokenizer.from_pretrained(found or beside[1])
    if text_tokenizer is not None and config.text_tokenizer_fingerprint not in ("", text_tokenizer.fingerprint):
        raise InputError(
            f"the prior in {folder} was trained with text tokenizer {config.text_tokenizer_fingerprint}, got "
            f"{text_tokenizer.fingerprint}; put the tokenizer.json it was trained with beside it"
        )
    with built_from(folder), Unfilled():
        prior = model(config, text_tokenizer)
    load_weights(prior, folder)
    return prior


def prior_kind(kind: str, where: str) -> tuple[type[PriorConfig], type[Prior]]:
    """The config and the model of a `type`. Raises InputError for an unknown one."""
    match kind:
        case "gpt":
            from stage2_prior.gpt import GPTConfig, GPTPrior

            return GPTConfig, GPTPrior
        case "pixelcnn":
            from stage2_prior.pixelcnn import PixelCNNConfig, PixelCNNPrior

            return PixelCNNConfig, PixelCNNPrior
        case "bart":
            from stage2_prior.bart import BartConfig, BartPrior

            return BartConfig, BartPrior
        case "mindalle":
            from stage2_prior.imported.mindalle import MinDALLEConfig, MinDALLEPrior

            return MinDALLEConfig, MinDALLEPrior
        case "rudalle":
            from stage2_prior.imported.rudalle import RuDALLEConfig, RuDALLEPrior

            return RuDALLEConfig, RuDALLEPrior
        case "llamagen":
            from stage2_prior.imported.llamagen import LlamaGenConfig, LlamaGenPrior

            return LlamaGenConfig, LlamaGenPrior
        case "janus":
            from stage2_prior.imported.janus import JanusConfig, JanusPrior

            return JanusConfig, JanusPrior
        case "taming":
            from stage2_prior.imported.taming import TamingConfig, TamingPrior

            return TamingConfig, TamingPrior
        case _:
            raise InputError(f"{where}: '{kind}' is not a type of prior{nearest(kind, list(KINDS))}")
