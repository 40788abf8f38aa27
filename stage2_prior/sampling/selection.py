"""Which engine computes a prior's steps: the fastest that gives its numbers, and the prior itself if there is none.

CPU              kernels.cpp (cpu.py): float32 as the prior, or weights kept in bfloat16 or int8
NVIDIA GPU       torch's kernels over a static cache, one CUDA graph a step (gpu.py): the prior's weights,
                 or copies in int8 or fp8
anything else    the prior itself; one line says why
"""

import logging
from typing import get_args

import torch

from stage2_prior.base import Prior
from stage2_prior.gpt import GPTPrior, GPTSize
from stage2_prior.sampling.cpu import CPUEngine
from stage2_prior.sampling.engine import Engine, PlainEngine
from stage2_prior.sampling.gpu import GPUEngine
from stage2_prior.sampling.kernels import KINDS
from stage2_prior.sampling.quantized import MULTIPLE, without_fp8
from stage2_prior.sampling.settings import Precision
from stage2_prior.sampling.weights import read_weights
from tessera.errors import InputError
from tessera.native import build as native

# Fields of a GPT's config that engines take as they come. Every other one must have its default: a difference in later
# positions, as of an attention pattern, is not found by comparing the first ones.
SIZES = {"text_length", "dim", "depth", "num_heads", "mlp_ratio", "dropout", "convolution_kernel"}
KNOWN_MODULES = "stage2_prior.", "tessera.", "torch.nn."  # where the classes of a prior's modules come from
FP8_CAPABILITY = (8, 9)  # of a GPU that multiplies in it
# The largest relative error of logits that rounding explains.
AGREEMENT: dict[Precision, float] = {"float32": 1e-3, "bfloat16": 0.1, "int8": 0.2, "fp8": 0.2}

logger = logging.getLogger("stage2_prior")


def make_engine(prior: Prior, precision: Precision | None = None) -> Engine:
    """The fastest engine of the prior on its device; the plain one, with a warning that says why, if there is none.

    `precision` is what the weights are kept in, None the prior's own. bfloat16 and int8 on a CPU, int8 and fp8 on a GPU
    read less memory and change the images a little: `docs/performance.md` has how much. The engine is compared with the
    prior before it is returned. Raises InputError for a precision that the prior or its device cannot have.
    """
    check_precision(prior, precision)
    engine = _fast_engine(prior, precision)
    if isinstance(engine, Engine):
        return engine
    logger.warning("sampling takes the plain path, which is slower: %s", engine)
    return PlainEngine(prior, engine)


def check_precision(prior: Prior, precision: Precision | None) -> None:
    """Raises InputError unless the prior's weights can be kept in this precision on its device."""
    if precision is None:
        return
    if precision not in get_args(Precision):
        raise InputError(f"the precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    reason = unsupported(prior) or _unavailable(prior, precision)
    if reason:
        raise InputError(f"the prior's weights cannot be kept in {precision}: {reason}")


def unsupported(prior: Prior) -> str:
    """Why there is no engine for a prior, in one clause; empty when there may be one."""
    if type(prior) is not GPTPrior:
        return f"there is no engine for a {type(prior).__name__}"
    for name, field in GPTSize.model_fields.items():
        if name not in SIZES and getattr(prior.config, name) != field.default:
            return f"there is no engine for priors with {name}={getattr(prior.config, name)!r}"
    if prior.training and prior.config.dropout > 0:
        return "the prior is in training mode and has dropout"
    for name, module in prior.named_modules():
        known = type(module).__module__.startswith(KNOWN_MODULES)
        if not known or module._forward_hooks or module._forward_pre_hooks:
            return f"the engine does not know the prior's {name} ({type(module).__name__})"
    device = next(prior.parameters()).device.type
    return "" if device in ("cpu", "cuda") else f"there is no engine for {device} devices"


def _unavailable(prior: Prior, precision: Precision) -> str:
    """Why the device of a prior that has an engine cannot keep its weights so, in one clause; empty when it can."""
    assert isinstance(prior, GPTPrior)
    device = next(prior.parameters()).device
    if device.type == "cpu":
        return "" if precision in KINDS else "it is on a CPU, whose engine knows " + ", ".join(KINDS)
    if precision not in ("int8", "fp8"):
        return "it is on a GPU; load it with the dtype you want"
    if precision == "fp8" and (reason := without_fp8()):
        return reason
    if precision == "fp8" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} does not multiply in fp8; take int8"
    if any(side % MULTIPLE for side in read_weights(prior).layers[0].mlp_in.shape):
        return f"widths must be multiples of {MULTIPLE}"
    return ""


def _fast_engine(prior: Prior, precision: Precision | None) -> Engine | str:
    """The engine, or why there is none."""
    reason = unsupported(prior)
    if reason:
        return reason
    assert isinstance(prior, GPTPrior)
    weight = next(prior.parameters())
    precision = precision or ("bfloat16" if weight.dtype == torch.bfloat16 else "float32")
    try:
        engine = (CPUEngine if weight.device.type == "cpu" else GPUEngine)(prior, precision)
        error = _disagreement(engine)
    except native.Unavailable as unavailable:
        return str(unavailable)
    except NotImplementedError as missing:  # torch has no such kernel for this device
        return f"{precision} products: {missing}"
    largest = max(AGREEMENT[precision], 0.0 if weight.dtype == torch.float32 else AGREEMENT["bfloat16"])
    if not error <= largest:  # nor NaN
        return f"its logits differ from the engine's by {error:.2g} of their size, which a mistake in it would do"
    return engine


@torch.inference_mode()
def _disagreement(engine: Engine) -> float:
    """How far apart the engine's and its prior's logits are on the first codes of the null prefix, relative."""
    prior = engine.prior
    prefix = prior.null_prefix(1)
    given = torch.arange(1, prior.num_codebooks + 1, device=prefix.device) % prior.codebook_size
    given = given[: prior.length - 1]
    both = []
    for model in (prior, engine):
        logits, cache = model.prefill(prefix, prior.length - 1)
        both.append(torch.cat([logits, *(model.step(code[None], cache) for code in given)]).float())
    return float((both[0] - both[1]).norm() / both[0].norm().clamp_min(1e-20))
