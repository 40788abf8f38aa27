"""What the converters of priors share."""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from common.text import TextTokenizer
from stage1_tokenizer import Autoencoder
from stage2_prior.base import Prior, PriorConfig
from stage2_prior.sampling import Sampling

P = TypeVar("P", bound=Prior)


class Converted(NamedTuple):
    prior: Prior  # in eval mode, with its text tokenizer if it reads text
    image_tokenizer: Autoencoder | None  # None when the sources hold none; then the bundle needs one of ours
    sampling: Sampling = Sampling()  # what its project draws with


def needed_shapes(kind: type[P], config: PriorConfig) -> dict[str, tuple[int, ...]]:
    """The parameters of a prior of ours with their shapes."""
    with torch.device("meta"):
        prior = kind(config, None)
    return {name: tuple(tensor.shape) for name, tensor in prior.state_dict().items()}


def build(kind: type[P], config: PriorConfig, weights: dict[str, Tensor], text_tokenizer: TextTokenizer | None) -> P:
    """The prior of `config` with exactly these `weights`, in eval mode."""
    with torch.device("meta"):
        prior = kind(config, text_tokenizer)
    prior.load_state_dict(weights, strict=True, assign=True)
    return prior.requires_grad_(True).eval()
