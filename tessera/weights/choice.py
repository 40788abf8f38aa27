"""Which weights of a checkpoint are taken, and under which names.

A training checkpoint may hold its weights twice, as they were trained and as their moving average (EMA). The average is
taken where it is whole, because it is what its project samples with; `choosing` says otherwise, and what was taken.
What wrappers of modules put into names (DataParallel, torch.compile, FSDP, Lightning) is taken off.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from tessera.config import Origin
from tessera.errors import InputError, InputWarning

# An average beside the weights: latent-diffusion's LitEma writes `model_ema.` and names without dots, MoVQGAN one for
# each part, others `ema.` or `ema_model.` before whole names.
AVERAGED = re.compile(
    r"(?:model_ema|ema_model|ema)\.(.+)|ema_(encoder|decoder|quantize|quant_conv|post_quant_conv)\.(.+)"
)
COUNTERS = ("decay", "num_updates", "initted", "step", "n_averaged")  # beside an average
WRAPPED = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")  # anywhere in a name
PREFIXES = ("module.", "model.")  # in front of all names
TRAINING = re.compile(r"(loss|discriminator|perceptual_loss|lpips)\.")  # of use to nobody but training

Kind = Literal["model", "ema"]


@dataclass
class Choice:
    """Which of the weights of a checkpoint are wanted, and which were taken."""

    wanted: Kind | None = None  # None: the average where it is whole
    taken: dict[str, Kind] = field(default_factory=dict)  # by the names of files that have an average

    def noted(self, origin: Origin | None) -> Origin | None:
        """`origin` with what was taken of its files."""
        taken = [self.taken[name] for name in (origin.files if origin else ()) if name in self.taken]
        return origin.model_copy(update={"weights": taken[0]}) if origin and taken else origin


_choice: ContextVar[Choice | None] = ContextVar("choice", default=None)


@contextmanager
def choosing(wanted: str | None) -> Iterator[Choice]:
    """Within the block, what is taken where a checkpoint has both: `model` or `ema`.

    Raises InputError for another word, and at the end where `ema` was wanted and no checkpoint had one.
    """
    if wanted not in (None, "model", "ema"):
        raise InputError(f"weights must be model or ema, got '{wanted}'")
    choice = Choice(wanted)  # type: ignore[arg-type]
    token = _choice.set(choice)
    try:
        yield choice
    finally:
        _choice.reset(token)
    if wanted == "ema" and not choice.taken:
        raise InputError("there is no moving average (EMA) among the weights; leave --weights ema out")


def chosen(raw: dict[str, Tensor], average: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The weights as trained or their average, under names without what wrappers put into them.

    `raw` may have an average among its names, `average` is one that stood apart. Warns (InputWarning) where there are
    both and nobody said which. Raises InputError where what was asked for is not there.
    """
    choice = _choice.get() or Choice()
    averaged = {_bare(name): tensor for name, tensor in unwrapped(average).items()}
    plain: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        match = AVERAGED.fullmatch(WRAPPED.sub("", name).lstrip(".").removeprefix("module."))
        if match is None:
            plain[name] = tensor
        elif match[1] not in COUNTERS and match[3] not in COUNTERS:
            averaged[_bare(match[1] or f"{match[2]}.{match[3]}")] = tensor
    weights = unwrapped(plain)
    if not averaged:
        return weights
    if not plain:
        if choice.wanted == "model" or not average:
            raise InputError(
                f"{where} has a moving average (EMA) and not the weights it is of; give the whole checkpoint"
            )
        choice.taken[where] = "ema"
        return unwrapped(average)
    found = _averages(dict(zip(plain, weights, strict=True)), averaged)
    lacking = [name for name, tensor in weights.items() if _needed(name) and not _fits(found.get(name), tensor)]
    if choice.wanted == "ema" and lacking:
        raise InputError(
            f"{where} has a moving average (EMA) that lacks {len(lacking)} weights, {lacking[0]} among them; take "
            "--weights model"
        )
    taken: Kind = choice.wanted or ("model" if lacking else "ema")
    choice.taken[where] = taken
    if choice.wanted is None:
        told = f"the average lacks {len(lacking)} of them, so they are taken as trained"
        told = told if lacking else "the average is taken; --weights model takes them as trained"
        warnings.warn(f"{where} has weights and their moving average (EMA): {told}", InputWarning, stacklevel=3)
    return weights | found if taken == "ema" else weights


def _averages(names: dict[str, str], averaged: dict[str, Tensor]) -> dict[str, Tensor]:
    """Averages by our names; `names` says which name of the file each of them was.

    latent-diffusion averages what is inside `model.`, so that names of averages may lack it.
    """
    found = {}
    for theirs, ours in names.items():
        keys = [_bare(name) for name in (theirs, theirs.partition(".")[2], ours)]
        if key := next((key for key in keys if key in averaged), None):
            found[ours] = averaged[key]
    return found


def _needed(name: str) -> bool:
    """Whether an average without this weight is not whole. Buffers are not averaged, codebooks may be one already."""
    return name.endswith((".weight", ".bias")) and not TRAINING.match(name) and "quantize" not in name


def _fits(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.shape == other.shape


def _bare(name: str) -> str:
    """A name without dots and wrappers, as averages are named."""
    return re.sub(r"_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|^module\.|\.", "", name)


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` without what wrappers put into names, in front of all of them or anywhere, in the same order."""
    found = {WRAPPED.sub("", name).lstrip("."): tensor for name, tensor in tensors.items()}
    if len(found) != len(tensors):  # two names became one
        return tensors
    needed = [name for name in found if not TRAINING.match(name)]
    start = ""
    while more := next((p for p in PREFIXES if needed and all(n.startswith(start + p) for n in needed)), None):
        start += more
    plain = {name.removeprefix(start): tensor for name, tensor in found.items()}
    return plain if len(plain) == len(tensors) else found
