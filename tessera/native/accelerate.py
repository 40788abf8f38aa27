"""`accelerate(model)`: what is faster on this kind of machine, swapped into a model from outside.

A model is written in plain PyTorch and works without it. Parameters, their names and the state dict stay as they are;
only what computes with them changes.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn

from tessera.native import gradients


def accelerate(model: nn.Module) -> None:
    """Swaps, in place, operations for training on a CPU (gradients.py).

    It finds torch's own norms and linear layers without biases by their class, attention by its `attend(q, k, v, mask)`
    and `normalize(x, scale)`, and a block with a GELU between `mlp_in` and `mlp_out` by its `mlp(x)`
    (stage2_prior/decoder.py). What is swapped in falls back to torch's operations without gradients, on other devices
    and under a compiler.
    """
    for module in model.modules():
        if type(module) is nn.RMSNorm:
            module.__class__ = gradients.RMSNorm
        elif type(module) is nn.Linear and module.bias is None:
            module.__class__ = gradients.Linear
        part: Any = module
        if hasattr(module, "attend") and hasattr(module, "normalize"):
            part.attend, part.normalize = gradients.attend, partial(gradients.rms_norm, eps=part.eps)
        if hasattr(module, "mlp_in") and getattr(module, "activation", "") == "gelu":
            if type(part.mlp_hidden_norm) is nn.Identity:
                part.mlp = partial(_gelu_mlp, module)


def _gelu_mlp(block: Any, x: Tensor) -> Tensor:
    return gradients.gelu_linear(block.mlp_in(x), block.mlp_out)
