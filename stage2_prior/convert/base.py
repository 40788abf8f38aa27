"""What the converters of priors share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tokenizers import AddedToken, Tokenizer, models

from stage1_tokenizer import Autoencoder
from stage2_prior.base import Prior, PriorConfig
from stage2_prior.sampling import Sampling
from tessera.errors import InputError
from tessera.files import read_json, read_lines
from tessera.text import SPECIALS, TextTokenizer
from tessera.weights.containers import matching, refuse_stand_in
from tessera.weights.foreign import Weights, by_checkpoint, need

P = TypeVar("P", bound=Prior)


class Converted(NamedTuple):
    prior: Prior  # in eval mode, with its text tokenizer if it reads text
    image_tokenizer: Autoencoder | None  # None when the sources hold none; then the bundle needs one of ours
    sampling: Sampling = Sampling()  # what its project draws with
    segmentation_tokenizer: Autoencoder | None = None  # of a prior that draws from segmentation maps


def build(
    kind: type[P],
    config: PriorConfig,
    weights: Weights,
    names: Mapping[str, str | tuple[str, ...]],
    text_tokenizer: TextTokenizer | None,
) -> P:
    """The prior of `config` with `weights`, in eval mode.

    `names` says of each of our modules or parameters which of theirs it is, or which one after another. Raises
    InputError that names what is missing, left over, or of another shape.
    """
    with torch.device("meta"):
        prior = kind(config, text_tokenizer)
    shapes = {name: tuple(tensor.shape) for name, tensor in prior.state_dict().items()}
    prior.load_state_dict(weights.assemble({ours: _theirs(ours, names) for ours in shapes}, shapes), assign=True)
    return prior.requires_grad_(True).eval()


def _theirs(ours: str, names: Mapping[str, str | tuple[str, ...]]) -> tuple[str, ...]:
    """Their names of our parameter: what `names` says of itself, or of its module with the last part of its name."""
    module, _, last = ours.rpartition(".")
    whole = ours in names
    found = names[ours] if whole else names[module]
    parts = (found,) if isinstance(found, str) else found
    return parts if whole else tuple(f"{part}.{last}" for part in parts)


def foreign_vocabulary(vocabulary: Mapping[str, int]) -> dict[str, int]:
    """Tokens of another project's tokenizer with the ids that ours gives them: after our own specials."""
    shifted = {f"foreign {token}" if token in SPECIALS else token: i + len(SPECIALS) for token, i in vocabulary.items()}
    return {special: i for i, special in enumerate(SPECIALS)} | shifted


def finished(tokenizer: Tokenizer) -> TextTokenizer:
    """A text tokenizer of a vocabulary by `foreign_vocabulary`."""
    tokenizer.add_special_tokens([AddedToken(special, special=True, normalized=False) for special in SPECIALS])
    return TextTokenizer(tokenizer)


def bpe(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]], where: str, **options: Any) -> models.BPE:
    """Byte-pair encoding with ids by `foreign_vocabulary`. Raises InputError where the merges do not fit."""
    try:
        return models.BPE(vocab=foreign_vocabulary(vocabulary), merges=list(merges), **options)
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"the merges in {where} do not fit the vocabulary ({error}); give those of one model"
        ) from None


def check_vocabulary(tokenizer: TextTokenizer, known: int) -> None:
    """Raises InputError where a tokenizer has ids that a prior with `known` ones does not know."""
    count = tokenizer.vocab_size - len(SPECIALS)
    if count > known:
        raise InputError(f"the text tokenizer has {count} tokens, the prior knows {known}; give those of one model")


def read_vocabulary(path: Path) -> dict[str, int]:
    """A JSON file of tokens and their ids."""
    refuse_stand_in(path)
    content = read_json(path, "get the file again")
    if not isinstance(content, dict) or not all(isinstance(i, int) for i in content.values()):
        raise InputError(f"{path} must hold tokens with their ids; give a tokenizer's vocabulary")
    return content


def read_merges(path: Path) -> list[tuple[str, str]]:
    """A text file with a pair of tokens a line below `#version`, the first to be merged first."""
    refuse_stand_in(path)
    lines = read_lines(path)
    pairs = [line.split(" ") for line in lines[lines[0].startswith("#version") :] if line.strip()]
    if not all(len(pair) == 2 for pair in pairs):
        raise InputError(f"{path} must hold two tokens a line; give a tokenizer's merges")
    return [(first, second) for first, second in pairs]


def one_file(sources: Sequence[Path], what: str, *patterns: str, optional: bool = False) -> Path | None:
    """The only file of the first of `patterns` that any file among or in `sources` matches.

    Raises InputError when there are several, or when there is none and it is not `optional`; the latter ends with
    `what`.
    """
    for pattern in patterns:
        found = by_checkpoint(path for source in sources for path in matching(source, pattern))
        if len(found) > 1:
            listed = ", ".join(path.name for path in found)
            raise InputError(f"{listed} are {len(found)} checkpoints; give the one that is to be converted")
        if found:
            return found[0]
    return None if optional else need(sources, what, *patterns)
