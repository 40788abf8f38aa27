"""Building a model from the config in a folder, whatever that says: sizes are bounded by the weights beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from tessera.errors import InputError, reason

FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "arange", "eye")  # of torch; their sizes come first
SPARE = 2**24  # numbers beyond those in the files: masks, tables of positions, what is made again when it is loaded


class _Bounded(TorchFunctionMode):
    """Inside, no more than `most` numbers are made: a config of a few bytes could ask for all memory there is."""

    def __init__(self, most: int, where: Path) -> None:
        super().__init__()
        self.most, self.where, self.made = most, where, 0

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", "") in FACTORIES:
            self.made += _count(arguments, keywords or {})
        result = function(*arguments, **(keywords or {})) if self.made <= self.most else None
        if self.made > self.most or (isinstance(result, Tensor) and result.numel() > self.most):
            raise InputError(
                f"{self.where} describes a model of more numbers than the weights beside it hold; restore the files"
            )
        return result


def _count(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> int:
    """How many numbers a factory is asked for: the product of its sizes, also in a tuple."""
    count = 1
    for one in (*arguments, keywords.get("size", ())):
        for side in one if isinstance(one, tuple | list) else (one,):
            count *= max(int(side), 1) if isinstance(side, int) else 1
    return count


@contextmanager
def built_from(folder: Path, config: str = "config.json") -> Iterator[None]:
    """Around the building of a model that `config` describes, and that is filled with the weights in `folder` next.

    Raises InputError, instead of what torch raises, for sizes that no model can have, and for one that is larger than
    its weights.
    """
    where = folder / config
    size = sum(path.stat().st_size for kind in ("safetensors", "bin") for path in folder.glob(f"*.{kind}"))
    try:
        with _Bounded(2 * size + SPARE if size else 2**62, where):  # without any, loading says so
            yield
    except InputError:
        raise
    except Exception as error:  # of shapes, of memory, of numbers that are too large: each has its own kind
        raise InputError(f"{where} describes a model that cannot be built ({reason(error)}); restore it") from error
