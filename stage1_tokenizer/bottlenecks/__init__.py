"""Bottlenecks: what sits between encoder and decoder, told apart by `type` in the config."""

from typing import Annotated, Literal, assert_never

from pydantic import Field, field_validator

from stage1_tokenizer.bottlenecks.base import Bottleneck, Bottlenecked
from stage1_tokenizer.bottlenecks.codebook import Gradient
from stage1_tokenizer.bottlenecks.fsq import FiniteScalarQuantizer
from stage1_tokenizer.bottlenecks.gaussian import Gaussian
from stage1_tokenizer.bottlenecks.gumbel import GumbelQuantizer
from stage1_tokenizer.bottlenecks.hierarchy import HierarchicalQuantizer
from stage1_tokenizer.bottlenecks.identity import Identity
from stage1_tokenizer.bottlenecks.lfq import LookupFreeQuantizer
from stage1_tokenizer.bottlenecks.residual import ResidualQuantizer
from stage1_tokenizer.bottlenecks.simvq import SimVectorQuantizer
from stage1_tokenizer.bottlenecks.vq import Metric, Normalize, VectorQuantizer
from stage1_tokenizer.bottlenecks.vq_ema import EMAVectorQuantizer
from tessera.config import Config

__all__ = [
    "Bottleneck",
    "BottleneckConfig",
    "Bottlenecked",
    "FSQConfig",
    "GaussianConfig",
    "GumbelConfig",
    "HierarchyConfig",
    "IdentityConfig",
    "LFQConfig",
    "ResidualConfig",
    "SimVQConfig",
    "VQConfig",
    "VQEMAConfig",
    "build_bottleneck",
]


class IdentityConfig(Config):
    type: Literal["identity"] = "identity"


class GaussianConfig(Config):
    type: Literal["gaussian"] = "gaussian"
    # Of the KL in nats a position. With a likelihood as loss, a mean over numbers, 1 / (3 factor^2) is the ELBO.
    kl_weight: float = Field(1e-4, ge=0)


class VQConfig(Config):
    type: Literal["vq"] = "vq"
    codebook_size: int = Field(1024, ge=2)  # K
    beta: float = Field(0.25, ge=0)  # commitment weight
    patience: int = Field(100, ge=0)  # steps without use after which a code is revived; 0 never revives
    gradient: Gradient = "straight-through"  # past the nearest code; rotation: Fifty et al. 2024
    # What is brought to length 1: nothing, looked-up codes (transformers' Janus), or latents too (LlamaGen)
    normalize: Normalize = "none"
    metric: Metric = "euclidean"  # by which a code is chosen; IBQ's tokenizers take the largest dot product


class VQEMAConfig(Config):
    type: Literal["vq-ema"] = "vq-ema"
    codebook_size: int = Field(1024, ge=2)  # K
    beta: float = Field(0.25, ge=0)  # commitment weight
    decay: float = Field(0.99, gt=0, lt=1)  # of the running means
    patience: int = Field(100, ge=0)  # steps without use after which a code is revived; 0 never revives
    gradient: Gradient = "straight-through"


class SimVQConfig(Config):
    type: Literal["simvq"] = "simvq"
    codebook_size: int = Field(8192, ge=2)  # K
    beta: float = Field(0.25, ge=0)  # commitment weight
    gradient: Gradient = "straight-through"


class ResidualConfig(Config):
    type: Literal["residual"] = "residual"
    num_codebooks: int = Field(4, ge=1)  # Q
    codebook_size: int = Field(1024, ge=2)  # K, of each
    beta: float = Field(0.25, ge=0)  # commitment weight
    decay: float = Field(0.99, gt=0, lt=1)  # of the running means
    patience: int = Field(100, ge=0)  # steps without use after which a code is revived; 0 never revives
    gradient: Gradient = "straight-through"


class HierarchyConfig(Config):
    type: Literal["hierarchy"] = "hierarchy"
    codebook_size: int = Field(512, ge=2)  # K, of both levels
    beta: float = Field(0.25, ge=0)  # commitment weight
    decay: float = Field(0.99, gt=0, lt=1)  # of the running means
    patience: int = Field(100, ge=0)  # steps without use after which a code is revived; 0 never revives


class GumbelConfig(Config):
    """The schedules are those of Ramesh et al. 2021, appendix A.2; shorten them for shorter runs."""

    type: Literal["gumbel"] = "gumbel"
    codebook_size: int = Field(8192, ge=2)  # K
    temperature: float = Field(1.0, gt=0)  # at the start
    final_temperature: float = Field(1 / 16, gt=0)
    temperature_steps: int = Field(150_000, ge=0)  # along half a cosine; 0 starts with the final one
    # Of the KL in nats a position. The paper's beta of 6.6 is for a loss summed over an image; divided by 3 factor^2,
    # 192 at factor 8, it goes with losses that are means over numbers.
    kl_weight: float = Field(6.6 / 192, ge=0)
    kl_steps: int = Field(5_000, ge=0)  # from 0 along half a cosine; 0 starts with all of it


class FSQConfig(Config):
    type: Literal["fsq"] = "fsq"
    levels: tuple[Annotated[int, Field(ge=3)], ...] = Field((8, 5, 5, 5), min_length=1)  # K is their product


class LFQConfig(Config):
    type: Literal["lfq"] = "lfq"
    codebook_size: int = Field(1024, ge=2)  # K, a power of two
    beta: float = Field(0.25, ge=0)  # commitment weight
    entropy_weight: float = Field(0.1, ge=0)
    # Of the entropies. At 1 the loss is felt wherever numbers are of the size of their signs; at the 0.01 of other
    # implementations only where they are almost 0.
    temperature: float = Field(1.0, gt=0)

    @field_validator("codebook_size")
    @classmethod
    def _whole_bits(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("codebook_size must be a power of two")
        return value


BottleneckConfig = Annotated[
    IdentityConfig
    | GaussianConfig
    | VQConfig
    | VQEMAConfig
    | SimVQConfig
    | ResidualConfig
    | HierarchyConfig
    | GumbelConfig
    | FSQConfig
    | LFQConfig,
    Field(discriminator="type"),
]


def build_bottleneck(config: BottleneckConfig, dim: int, decoder_dim: int | None = None) -> Bottleneck:
    """The bottleneck of `config` for latents of `dim` channels; gumbel alone may give a decoder another number."""
    if decoder_dim not in (None, dim) and config.type != "gumbel":
        raise ValueError(f"bottleneck {config.type} needs an encoder and a decoder with the same number of channels")
    match config:
        case IdentityConfig():
            return Identity()
        case GaussianConfig():
            return Gaussian(dim, config.kl_weight)
        case VQConfig():
            return VectorQuantizer(
                config.codebook_size,
                dim,
                config.beta,
                config.patience,
                config.normalize,
                config.gradient,
                config.metric,
            )
        case VQEMAConfig():
            return EMAVectorQuantizer(
                config.codebook_size, dim, config.beta, config.decay, config.patience, config.gradient
            )
        case SimVQConfig():
            return SimVectorQuantizer(config.codebook_size, dim, config.beta, config.gradient)
        case ResidualConfig():
            return ResidualQuantizer(
                config.num_codebooks,
                config.codebook_size,
                dim,
                config.beta,
                config.decay,
                config.patience,
                config.gradient,
            )
        case HierarchyConfig():
            return HierarchicalQuantizer(config.codebook_size, dim, config.beta, config.decay, config.patience)
        case GumbelConfig():
            return GumbelQuantizer(
                config.codebook_size,
                dim,
                decoder_dim or dim,
                temperature=config.temperature,
                final_temperature=config.final_temperature,
                temperature_steps=config.temperature_steps,
                kl_weight=config.kl_weight,
                kl_steps=config.kl_steps,
            )
        case FSQConfig():
            return FiniteScalarQuantizer(config.levels, dim)
        case LFQConfig():
            return LookupFreeQuantizer(
                config.codebook_size, dim, config.beta, config.entropy_weight, config.temperature
            )
        case _:
            assert_never(config)
