"""What is fast on one kind of machine, swapped into plain PyTorch models from outside, and C++ and how it is built.

A swap gives a module another way to compute the same result, up to rounding, where that saves at least a tenth of time
or memory on the machine at hand (docs/performance-training.md, docs/performance-tokenizer.md). Parameters, names, hooks
and state dicts stay what they are; copies of the module are swapped too.
"""

from functools import partial
from typing import Any

from torch import nn

from tessera.native.attention import causal_attention
from tessera.native.linear import OneDNNLinear, multiplies_by_onednn
from tessera.native.norm import LeanRMSNorm, rms_norm
from tessera.native.winograd import WinogradConv2d, suits


def accelerate(model: nn.Module) -> list[str]:
    """Swaps what is faster in inference, in place; returns the names of the swapped modules.

    On a CPU with a C++ compiler 3x3 convolutions of many pixels become Winograd's. Its rounding is larger than the
    plain convolution's: images do not show it, codes may, so call this on a decoder and never on an encoder.
    """
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Conv2d and suits(module)}
    for module in found.values():
        module.__class__ = WinogradConv2d
    return list(found)


def accelerate_training(model: nn.Module) -> list[str]:
    """Swaps what is faster or smaller in training, in place; returns the names of the swapped modules.

    On a CPU linear layers multiply large float32 matrices by oneDNN where there is AVX-512, root-mean-square norms keep
    less for the backward pass, and attention is computed in bfloat16 by plain products. Attention is a module with
    methods `attend(q, k, v, mask)` and `normalize(x, scale)` (stage2_prior/decoder.py). A model on another device stays
    as it is. Call it after adapters are injected, which have linear layers too.
    """
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return []
    found = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and multiplies_by_onednn():
            module.__class__ = OneDNNLinear
        elif type(module) is nn.RMSNorm and module.elementwise_affine and len(module.normalized_shape) == 1:
            module.__class__ = LeanRMSNorm
        elif hasattr(module, "attend") and hasattr(module, "normalize"):
            attention: Any = module
            attention.attend, attention.normalize = causal_attention, partial(rms_norm, eps=attention.eps)
        else:
            continue
        found.append(name)
    return found
