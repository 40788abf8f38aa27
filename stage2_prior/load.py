"""Loads any prior from its folder: the `type` in config.json says which."""

from pathlib import Path

from common.config import read_config
from common.errors import InputError
from common.text import FILE, TextTokenizer
from common.weights import find_folder, load_weights
from stage2_prior.transformer import GPTConfig, GPTPrior


def load_prior(folder: str | Path, text_tokenizer: TextTokenizer | None = None) -> GPTPrior:
    """The prior in a local folder or of a hub name, in eval mode.

    Without a `text_tokenizer` it takes the one in the folder, or the bundle's `text_tokenizer/` beside the folder.
    Raises InputError when a file is missing or broken, or when the text tokenizer is not the one it was trained with.
    """
    folder = find_folder(folder)
    config = read_config(GPTConfig, folder)
    if text_tokenizer is None:
        text_tokenizer = TextTokenizer.from_pretrained(
            folder if (folder / FILE).is_file() else folder.parent / "text_tokenizer"
        )
    if config.text_tokenizer_fingerprint not in ("", text_tokenizer.fingerprint):
        raise InputError(
            f"the prior in {folder} was trained with text tokenizer {config.text_tokenizer_fingerprint}, got "
            f"{text_tokenizer.fingerprint}; put the tokenizer.json it was trained with beside it"
        )
    prior = GPTPrior(config, text_tokenizer)
    load_weights(prior, folder)
    return prior
