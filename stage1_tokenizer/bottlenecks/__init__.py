"""Bottlenecks: what sits between encoder and decoder, told apart by `type` in the config."""

from typing import Annotated, Literal, assert_never

from pydantic import Field

from common.config import Config
from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.gumbel import GumbelQuantizer
from stage1_tokenizer.bottlenecks.residual import ResidualQuantizer
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer
from stage1_tokenizer.bottlenecks.vq_ema import EMAVectorQuantizer

__all__ = [
    "Bottleneck",
    "BottleneckConfig",
    "Bottlenecked",
    "GumbelConfig",
    "ResidualConfig",
    "VQConfig",
    "VQEMAConfig",
    "build_bottleneck",
]


class VQConfig(Config):
    type: Literal["vq"] = "vq"
    codebook_size: int = Field(1024, ge=2)  # K
    beta: float = Field(0.25, ge=0)  # commitment weight
    patience: int = Field(100, ge=0)  # steps without use after which a code is revived; 0 never revives
    # What is brought to length 1: nothing, looked-up codes (transformers' Janus), or latents too (LlamaGen)
    normalize: Literal["none", "lookup", "both"] = "none"


class VQEMAConfig(Config):
    type: Literal["vq-ema"] = "vq-ema"
    codebook_size: int = Field(1024, ge=2)  # K
    beta: float = Field(0.25, ge=0)  # commitment weight
    decay: float = Field(0.99, gt=0, lt=1)  # of the running means
    patience: int = Field(100, ge=0)  # steps without use after which a code is revived; 0 never revives


class ResidualConfig(Config):
    type: Literal["residual"] = "residual"
    num_codebooks: int = Field(4, ge=1)  # Q
    codebook_size: int = Field(1024, ge=2)  # K, of each
    beta: float = Field(0.25, ge=0)  # commitment weight
    decay: float = Field(0.99, gt=0, lt=1)  # of the running means
    patience: int = Field(100, ge=0)  # steps without use after which a code is revived; 0 never revives


class GumbelConfig(Config):
    type: Literal["gumbel"] = "gumbel"
    codebook_size: int = Field(8192, ge=2)  # K
    temperature: float = Field(1.0, gt=0)  # of the noisy choice in training
    kl_weight: float = Field(5e-4, ge=0)  # of the divergence from a uniform choice, taming's value


BottleneckConfig = Annotated[VQConfig | VQEMAConfig | ResidualConfig | GumbelConfig, Field(discriminator="type")]


def build_bottleneck(
    config: VQConfig | VQEMAConfig | ResidualConfig | GumbelConfig, dim: int, decoder_dim: int | None = None
) -> Bottleneck:
    """The bottleneck of `config` for latents of `dim` channels; gumbel alone may give a decoder another number."""
    if decoder_dim not in (None, dim) and config.type != "gumbel":
        raise ValueError(f"bottleneck {config.type} needs an encoder and a decoder with the same number of channels")
    match config:
        case VQConfig():
            return VectorQuantizer(config.codebook_size, dim, config.beta, config.patience, config.normalize)
        case VQEMAConfig():
            return EMAVectorQuantizer(config.codebook_size, dim, config.beta, config.decay, config.patience)
        case ResidualConfig():
            return ResidualQuantizer(
                config.num_codebooks, config.codebook_size, dim, config.beta, config.decay, config.patience
            )
        case GumbelConfig():
            code_dim = dim if decoder_dim is None else decoder_dim
            return GumbelQuantizer(config.codebook_size, dim, code_dim, config.temperature, config.kl_weight)
        case _:
            assert_never(config)
