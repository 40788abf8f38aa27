"""Which way a prior's steps are computed: the fastest that gives its numbers, and its own `prefill` and `step` if none.

    CPU              kernels.cpp (cpu.py): float32 as the prior, or weights kept in bfloat16 or int8 (`set_precision`)
    NVIDIA GPU       torch's kernels over a static cache, one CUDA graph a step (gpu.py): the prior's weights,
                     or copies in int8 or fp8 (`set_precision`)
    anything else    the prior itself; one line says why

An engine holds a copy of the weights in its own order, made on first use and made again when they change.
"""

import sys
from typing import Any, NamedTuple, Protocol, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from stage2_prior.attention import Attention
from stage2_prior.base import Cache, Prior
from stage2_prior.depth import DepthBlock, DepthHead
from stage2_prior.fused import Linear, RMSNorm
from stage2_prior.sampling.cpu import CPUEngine
from stage2_prior.sampling.gpu import GPUEngine
from stage2_prior.sampling.kernels import KINDS
from stage2_prior.sampling.quantized import MULTIPLE, without_fp8
from stage2_prior.sampling.settings import Precision
from stage2_prior.gpt import Block, GPTConfig, GPTPrior
from tessera.errors import InputError
from tessera.native import build as native

# What the engines were written for. A field that is not here must have its default, which is what priors had before it.
KNOWN = {
    "type", "codebook_size", "code_shape", "text_vocab_size", "text_length", "dim", "depth", "num_heads", "mlp_ratio",
    "dropout", "image_tokenizer_fingerprint", "text_tokenizer_fingerprint", "segmentation_tokenizer_fingerprint",
    "condition", "condition_dropout", "class_names", "segmentation_codebook_size", "segmentation_code_shape", "origin",
    "convolution_kernel",
}  # fmt: skip
MODULES = (
    GPTPrior, Block, Attention, DepthHead, DepthBlock, Linear, nn.Linear, nn.Embedding, RMSNorm, nn.RMSNorm, nn.Dropout,
    nn.ModuleList,
)  # fmt: skip
FP8_CAPABILITY = (8, 9)  # of a GPU that multiplies in it
PROBES = 64  # numbers of each weight that tell whether it changed
AGREEMENT: dict[Precision, float] = {
    "float32": 1e-3,
    "bfloat16": 0.1,
    "int8": 0.2,
    "fp8": 0.2,
}  # relative error of logits


class Engine(Protocol):
    """The two methods of a Prior that sampling goes through."""

    def prefill(self, prefix: Tensor, length: int) -> tuple[Tensor, Cache]: ...

    def step(self, codes: Tensor, cache: Cache) -> Tensor: ...


class Made(NamedTuple):
    state: Any  # of the weights it was made from
    engine: CPUEngine | GPUEngine | None  # None: the prior itself
    reason: str  # why it is the prior itself


_made: WeakKeyDictionary[Prior, Made] = WeakKeyDictionary()
_precisions: WeakKeyDictionary[Prior, Precision] = WeakKeyDictionary()


def set_precision(prior: Prior, precision: Precision | None) -> None:
    """How the engine keeps the prior's weights from now on; None is the precision of the prior itself.

    bfloat16 and int8 on a CPU, int8 and fp8 on a GPU read less memory and change the pictures a little:
    `docs/performance.md` has how much. Raises InputError for one that the prior or its device cannot have.
    """
    if precision is None:
        _precisions.pop(prior, None)
        return
    if precision not in get_args(Precision):
        raise InputError(f"the precision must be one of {', '.join(get_args(Precision))}, got {precision!r}")
    reason = unsupported(prior) or _unavailable(prior, precision)
    if reason:
        raise InputError(f"the prior's weights cannot be kept in {precision}: {reason}")
    _precisions[prior] = precision


def _unavailable(prior: Prior, precision: Precision) -> str:
    """Why the device of a prior that has an engine cannot keep its weights so, in one clause; empty when it can."""
    assert isinstance(prior, GPTPrior)
    weight = prior.text_embedding.weight
    if weight.device.type == "cpu":
        return "" if precision in KINDS else "it is on a CPU, whose engine knows " + ", ".join(KINDS)
    if precision not in ("int8", "fp8"):
        return "it is on a GPU; load it with the dtype you want"
    if precision == "fp8" and (reason := without_fp8()):
        return reason
    if precision == "fp8" and torch.cuda.get_device_capability(weight.device) < FP8_CAPABILITY:
        return f"{torch.cuda.get_device_name(weight.device)} does not multiply in fp8; take int8"
    if any(side % MULTIPLE for side in (prior.config.dim, int(prior.config.dim * prior.config.mlp_ratio))):
        return f"widths must be multiples of {MULTIPLE}"
    return ""


def engine_for(prior: Prior) -> Engine:
    """What draws from this prior fastest; a line on stderr says so when that is the prior itself."""
    return accelerated(prior) or prior


def accelerated(prior: Prior) -> CPUEngine | GPUEngine | None:
    """The prior's engine, None when there is none for it. Made on first use and when weights or precision changed."""
    state = (_precisions.get(prior), *_weights_state(prior))
    made = _made.get(prior)
    if made is None or made.state != state:
        before = None if made is None else made.reason
        engine, reason = _make(prior)
        made = _made[prior] = Made(state, engine, reason)
        if reason and reason != before:
            print(f"sampling takes the plain path, which is slower: {reason}", file=sys.stderr)
    return made.engine


def _make(prior: Prior) -> tuple[CPUEngine | GPUEngine | None, str]:
    """The engine, or None and why."""
    reason = unsupported(prior)
    if reason:
        return None, reason
    assert isinstance(prior, GPTPrior)
    weight = prior.text_embedding.weight
    precision = _precisions.get(prior) or ("bfloat16" if weight.dtype == torch.bfloat16 else "float32")
    engine: CPUEngine | GPUEngine
    try:
        engine = CPUEngine(prior, precision) if weight.device.type == "cpu" else GPUEngine(prior, precision)
        wrong = _disagreement(prior, engine)
    except native.Unavailable as error:
        return None, str(error)
    except NotImplementedError as error:  # torch has no such kernel for this device
        return None, f"{precision} products: {error}"
    tolerance = max(AGREEMENT[precision], 0.0 if weight.dtype == torch.float32 else AGREEMENT["bfloat16"])
    if wrong > tolerance:
        return None, f"its logits differ from the engine's by {wrong:.2g} of their size, which a mistake in it would do"
    return engine, ""


def unsupported(prior: Prior) -> str:
    """Why there is no engine for a prior, in one clause; empty when there may be one."""
    if type(prior) is not GPTPrior:
        return f"there is no engine for a {type(prior).__name__}"
    for name, field in GPTConfig.model_fields.items():
        if name not in KNOWN and getattr(prior.config, name) != field.get_default(call_default_factory=True):
            return f"there is no engine for priors with {name}={getattr(prior.config, name)!r}"
    if prior.training and prior.config.dropout > 0:
        return "the prior is in training mode and has dropout"
    for name, module in prior.named_modules():
        if type(module) not in MODULES or module._forward_hooks or module._forward_pre_hooks:
            return f"the engine does not know the prior's {name} ({type(module).__name__})"
    device = prior.text_embedding.weight.device.type
    return "" if device in ("cpu", "cuda") else f"there is no engine for {device} devices"


@torch.inference_mode()
def _disagreement(prior: GPTPrior, engine: Engine) -> float:
    """How far apart the engine's and the prior's logits are on the first codes of the null prefix, relative."""
    prefix = prior.null_prefix(1)
    given = torch.arange(1, prior.num_codebooks + 1, device=prefix.device) % prior.codebook_size
    given = given[: prior.length - 1]
    both = []
    for way in (prior, engine):
        logits, cache = way.prefill(prefix, prior.length - 1)
        both.append(torch.cat([logits, *(way.step(code[None], cache) for code in given)]).float())
    return float((both[0] - both[1]).norm() / both[0].norm().clamp_min(1e-20))


def _weights_state(prior: Prior) -> tuple[Any, ...]:
    """Changes when a weight does: storage, torch's count of changes, and some of the numbers.

    The count misses writes through `.data`, the numbers miss one that leaves all of those looked at alone.
    """
    weights = [*prior.parameters()]
    counts = [(one.data_ptr(), one.dtype, 0 if one.is_inference() else one._version) for one in weights]
    some = [one.detach().flatten()[:: max(1, one.numel() // PROBES)].double().sum() for one in weights]
    return prior.training, tuple(counts), tuple(torch.stack(some).tolist() if some else ())
