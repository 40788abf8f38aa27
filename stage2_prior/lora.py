"""LoRA (Hu et al. 2022, section 4.1): what a prior learned anew, as an addition of low rank to its matrices.

    W + weight · scale · B A,    A (r, in), B (out, r),    scale = alpha / r

or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023).

On disk it is peft's two files, `adapter_config.json` and `adapter_model.safetensors`; `revision` in the first is the
fingerprint of the base, for on another prior the numbers mean nothing. Training (`finetune.py`) needs peft, drawing
does not: here the addition is made once, so that a prior with LoRAs is as fast as one without.

Our attention computes queries, keys and values by one matrix `qkv` of three thirds. Each third has its own A and B, as
three separate matrices would; the layers `qkv.q`, `qkv.k` and `qkv.v` are those thirds. Release 0.1 named the layers of
the trunk without `decoder.`, and so does the base's fingerprint still, so that its adapters belong to the same base.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file
from torch import Tensor, nn

from stage2_prior.upgrade import TRUNK
from tessera.config import validate
from tessera.errors import InputError
from tessera.files import read_json
from tessera.paths import expand, is_file
from tessera.weights.folder import find_folder, fingerprint

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every name in peft's files
Target = Literal["q", "k", "v", "out", "mlp"]


class AdapterFile(BaseModel):
    """What is read of `adapter_config.json`, and what must not be in it: variants that are no plain addition."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    lora_alpha: float = Field(gt=0)
    use_rslora: bool = False
    revision: str | None = None  # fingerprint of the base
    bias: Literal["none"] = "none"
    fan_in_fan_out: Literal[False] = False
    lora_bias: Literal[False] = False
    use_dora: Literal[False] = False
    modules_to_save: None = None
    rank_pattern: dict[str, Any] = Field({}, max_length=0)
    alpha_pattern: dict[str, Any] = Field({}, max_length=0)

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Lora(NamedTuple):
    name: str  # of its folder
    base: str  # fingerprint of the prior it was trained on
    fingerprint: str  # its own
    scale: float
    layers: dict[str, tuple[Tensor, Tensor]]  # layer -> A (r, in), B (out, r), float32


class Applied(NamedTuple):
    """Which LoRA a prior draws with, and how much of it."""

    lora: Lora
    weight: float


class Loras:
    """The LoRAs of one prior, added to its weights; taken away again, they leave it as it was, bit by bit."""

    def __init__(self, prior: nn.Module) -> None:
        self.prior = prior
        self.applied: list[Applied] = []
        self.fused: list[Applied] = []  # those that are the prior's own weights by now
        self._base: str | None = None
        self._before: dict[str, Tensor] = {}  # the weights that were changed, as they were

    def add(self, folder: str | Path, weight: float = 1.0) -> Lora:
        """Adds `weight` times the LoRA in a folder or of a hub name.

        Raises InputError when it cannot be read, is one of another base, does not fit the prior, or when the sum is not
        finite; the prior is then as it was.
        """
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise InputError(f"the weight of a LoRA must be a finite number, got {weight!r:.40}")
        lora = read_lora(folder)
        if self._base is None:
            self._base = base_fingerprint(self.prior)
        if lora.base != self._base:
            raise InputError(
                f"the LoRA {folder} was trained on the prior {lora.base or '(it does not say which)'}, this one is "
                f"{self._base}; use it with the model that it was trained on, or train it again on this one"
            )
        _check_layers(self.prior, lora, folder)
        self.applied.append(Applied(lora, float(weight)))
        try:
            self._apply()
        except InputError:
            self.applied.pop()
            self._apply()
            raise
        return lora

    def remove(self) -> None:
        """The prior without its LoRAs, those that were fused excepted."""
        self.applied = []
        self._apply()

    def fuse(self) -> None:
        """Makes them part of the prior for good; it is another base from then on."""
        self.fused += self.applied
        self.applied, self._before, self._base = [], {}, None

    @torch.no_grad()
    def _apply(self) -> None:
        for name, before in self._before.items():
            self.prior.get_parameter(name).copy_(before)
        self._before = {}
        sums: dict[str, Tensor] = {}
        for lora, weight in self.applied:
            for layer, (a, b) in lora.layers.items():
                delta = weight * lora.scale * (b @ a)
                sums[layer] = delta if layer not in sums else sums[layer] + delta
        for layer, delta in sums.items():
            name, part = _place(self.prior, layer)
            matrix = self.prior.get_parameter(name)
            self._before.setdefault(name, matrix.detach().clone())
            rows = matrix if part is None else matrix.chunk(3)[part]
            changed = (rows.float() + delta.to(rows.device)).to(rows.dtype)
            if not bool(torch.isfinite(changed.float()).all()):
                weights = ", ".join(f"{weight:g} of {lora.name}" for lora, weight in self.applied)
                raise InputError(
                    f"with {weights} the weights of '{layer}' are no longer finite in {str(rows.dtype)[6:]}; "
                    "give smaller weights of the LoRAs"
                )
            rows.copy_(changed)


def read_lora(folder: str | Path) -> Lora:
    """The LoRA in a folder or of a hub name. Raises InputError when a file is missing, broken or of another kind."""
    place = expand(folder)
    if is_file(place):
        if place.name not in (CONFIG, WEIGHTS):
            raise InputError(
                f"{folder} is a file; give the folder of a LoRA, with {CONFIG} and {WEIGHTS}, as tessera finetune "
                "writes it"
            )
        folder = place.parent
    found = find_folder(folder)
    for name in (CONFIG, WEIGHTS):
        if not is_file(found / name):
            raise InputError(f"{folder} is not a LoRA, it has no {name}; give a folder that tessera finetune wrote")
    config = validate(AdapterFile, read_json(found / CONFIG, "restore its files"), where=str(found / CONFIG))
    try:
        state = load_file(found / WEIGHTS)
    except Exception as error:  # safetensors and torch each raise their own kinds, for a header of odd types say
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise InputError(f"the LoRA {folder} cannot be read ({found / WEIGHTS}: {reason}); restore its files") from None
    layers: dict[str, tuple[Tensor, Tensor]] = {}
    for name in sorted({key.rpartition(".lora_")[0] for key in state if ".lora_" in key}):
        a, b = (state.pop(f"{name}.lora_{half}.weight", None) for half in "AB")
        if not name.startswith(PREFIX) or a is None or b is None:
            raise InputError(f"{found / WEIGHTS} has no whole pair of A and B for '{name}'; restore the file")
        if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == config.r:
            raise InputError(f"{found / WEIGHTS}: '{name}' is not of rank {config.r}; restore the files")
        pair = a.float(), b.float()
        if not all(bool(torch.isfinite(half).all()) for half in pair):
            raise InputError(
                f"{found / WEIGHTS}: the weights of '{name}' are not finite; restore the file, or train it again"
            )
        layers[name.removeprefix(PREFIX)] = pair
    if state:
        raise InputError(
            f"{found / WEIGHTS} has '{sorted(state)[0]}', which is no part of a plain LoRA; train it again"
        )
    numbers = [part for name, pair in layers.items() for part in (name, *pair)]
    digest = fingerprint(str(config.scale), *numbers)
    return Lora(found.resolve().name, config.revision or "", digest, config.scale, layers)


def base_fingerprint(prior: nn.Module) -> str:
    """16 hex digits of a prior's weights, the same with adapters of peft in it and with `qkv` in three parts.

    Weights are rounded to bfloat16 first, so that a prior is the same base when it is used at that precision.
    """
    parts: dict[str, Tensor] = {}
    for name, weight in prior.named_parameters():
        if ".lora_" in name:
            continue
        name = name.replace(".base_layer", "").removeprefix(TRUNK)
        owner, _, kind = name.rpartition(".")
        if owner.endswith(".qkv"):
            thirds = zip("qkv", weight.chunk(3), strict=True)
            parts |= {f"{owner}.{third}.{kind}": part for third, part in thirds}
        else:
            parts[name] = weight
    return fingerprint(*(part for name in sorted(parts) for part in (name, parts[name].to(torch.bfloat16))))


def target_layers(prior: nn.Module, targets: Iterable[Target]) -> list[str]:
    """The names of the layers that `targets` stand for. Raises InputError where the prior has none for one of them.

    q, k, v: the thirds of every attention's `qkv`. out: its output. mlp: both matrices of every MLP, those of the depth
    head of a prior with several codebooks among them.
    """
    found: dict[str, list[str]] = {target: [] for target in get_args(Target)}
    for name, module in prior.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parts = name.split(".")
        if parts[-1] == "qkv" and module.out_features == 3 * module.in_features:
            for third in "qkv":
                found[third].append(f"{name}.{third}")
        elif parts[-2:] == ["attention", "out"]:
            found["out"].append(name)
        elif any(part.startswith("mlp") for part in parts):
            found["mlp"].append(name)
    wanted = list(dict.fromkeys(targets))
    missing = [target for target in wanted if not found[target]]
    if missing:
        available = ", ".join(target for target, layers in found.items() if layers) or "none"
        raise InputError(f"lora.targets: this prior has no layers '{missing[0]}'; it has {available}")
    return [layer for target in wanted for layer in found[target]]


def _check_layers(prior: nn.Module, lora: Lora, folder: str | Path) -> None:
    for layer, (a, b) in lora.layers.items():
        try:
            name, part = _place(prior, layer)
            shape = tuple(prior.get_parameter(name).shape)
        except AttributeError:
            raise InputError(f"the LoRA {folder} changes '{layer}', which this prior does not have") from None
        out, inside = (shape[0] if part is None else shape[0] // 3), shape[1]
        if (len(b), a.shape[1]) != (out, inside):
            raise InputError(
                f"the LoRA {folder} changes '{layer}' by {len(b)}x{a.shape[1]} numbers, this prior's is {out}x{inside}"
            )


def _place(prior: nn.Module, layer: str) -> tuple[str, int | None]:
    """The weight that a layer's addition goes to, and which third of it, None for the whole."""
    layer = TRUNK + layer if layer.startswith("blocks.") else layer
    owner, _, last = layer.rpartition(".")
    if owner.endswith("qkv") and last in ("q", "k", "v"):
        return f"{owner}.weight", "qkv".index(last)
    return f"{layer}.weight", None
