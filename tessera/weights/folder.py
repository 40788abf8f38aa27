"""Weights on disk: a folder with `config.json` and `model.safetensors` (sharded over a size), read strictly.

Nothing is ever unpickled from such a folder, and a name is looked up on the hub only if no folder has it.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import load_torch_model, save_torch_state_dict
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tessera.errors import InputError
from tessera.files import read_json_object
from tessera.paths import expand, is_folder
from tessera.weights.writing import replacing, write_text

WEIGHT_FILES = WHOLE, INDEX = ("model.safetensors", "model.safetensors.index.json")


def save_pretrained(
    model: nn.Module,
    config: BaseModel,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes `config.json` and `model.safetensors` into `folder`, whole or not at all (`writing.replacing`).

    `texts` are further files by their names. `dtype` casts floating point tensors on the way to disk (torch.float16
    halves the file). Where the parameters are split over several processes all of them call this, and the first one
    writes. Raises InputError when a weight is not finite, in that type, or a file in the way is not ours.
    """
    state, split = model.state_dict(), False
    for name, tensor in state.items():
        if hasattr(tensor, "full_tensor"):  # a DTensor; gathering it is collective
            tensor, split = tensor.full_tensor().clone(), True  # without the padding of its storage
        state[name] = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
    if split and torch.distributed.get_rank() != 0:
        return
    refuse_not_finite(state, f"the model for {folder}")
    with replacing(folder) as part:
        save_torch_state_dict(state, part, max_shard_size=max_shard_size)
        for name, text in {**(texts or {}), "config.json": config.model_dump_json(indent=2) + "\n"}.items():
            write_text(part / name, text)


def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Fills `model` with the weights in `folder` and puts it in eval mode.

    Raises InputError when a file is missing or broken, when names or shapes differ from the model's, or when a weight
    is not finite.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        raise InputError(f"{folder} has no model.safetensors; restore the file or write the folder again")
    try:
        if (folder / WHOLE).is_file():
            load_torch_model(model, folder, strict=True)
        else:
            _load_shards(model, folder)
    except Exception as error:  # safetensors, json and torch each raise their own kinds here
        reason = " ".join(str(error).split())
        raise InputError(f"the weights in {folder} cannot be loaded: {reason[:300]}") from error
    refuse_not_finite(model.state_dict(), str(folder))
    model.eval()


def _load_shards(model: nn.Module, folder: Path) -> None:
    """Fills `model` file by file. huggingface_hub 0.34 to 0.36 would ask each of the files for all of the weights."""
    files = read_json_object(folder / INDEX).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{INDEX} has no weight_map")
    missing, names = set(model.state_dict()), sorted(set(files.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX} names {name}, which is no safetensors file of the folder")
    if files.keys() != missing and model._load_state_dict_pre_hooks:
        # Weights of an earlier release, whose parts may be in several files: a hook of the model renames them.
        model.load_state_dict({key: value for name in names for key, value in load_file(folder / name).items()})
        return
    for name in names:
        shard = load_file(folder / name)
        if unexpected := sorted(shard.keys() - missing):
            raise ValueError(f"{name} has the weight {unexpected[0]}, which is not the model's or is there twice")
        model.load_state_dict(shard, strict=False)  # a shape that differs is an error all the same
        missing -= shard.keys()
    if missing:
        raise ValueError(f"the weight {min(missing)} is missing")


def refuse_not_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raises InputError, which starts with `where`, for the first tensor that holds a number that is not finite."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
            least, most = torch.aminmax(tensor)  # both are nan where any number is
            if not bool(torch.isfinite(least) & torch.isfinite(most)):
                raise InputError(
                    f"{where}: the weight '{name}' holds numbers that are not finite; restore the file, or train or "
                    "convert it again"
                )


class Unfilled(TorchFunctionMode):
    """Modules built inside get no random start: the weights that are loaded next take less time than it would.

    Torch's own ways to this go through its meta device, which imports the compiler's half of torch first.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        if function in (Tensor.uniform_, Tensor.normal_) or getattr(function, "__module__", "") == nn.init.__name__:
            return arguments[0] if arguments else keywords["tensor"]
        return function(*arguments, **keywords)


def find_folder(name: str | Path) -> Path:
    """The local folder of a model: `name` itself when it is a folder, else a download from the hub under that name.

    Raises InputError when `name` is neither, or when the hub cannot be reached.
    """
    if is_folder(expand(name)):
        return expand(name)
    parts = str(name).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise InputError(f"'{name}' is neither an existing folder nor a hub name like 'owner/model'")
    from huggingface_hub import snapshot_download

    try:
        with hub_at_once():
            return Path(snapshot_download(str(name), etag_timeout=5))
    except Exception as error:  # a dozen kinds: offline, unknown, gated, interrupted
        raise InputError(
            f"'{name}' is not a folder here, and the hub did not give it ({type(error).__name__}); "
            "check the name and the network, or give a local folder"
        ) from error


@contextmanager
def hub_at_once() -> Iterator[None]:
    """Where the hub does not answer, what is in its cache is used, at once instead of after a minute of retries."""
    from huggingface_hub import constants, get_session

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # no network, or HF_HUB_OFFLINE=1
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def fingerprint(*parts: Tensor | bytes | str) -> str:
    """16 hex digits that change when any of `parts` does (SHA-256; tensors as float32 bytes with their shape)."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            digest.update(str(tuple(part.shape)).encode())
            digest.update(part.detach().float().cpu().contiguous().numpy().tobytes())
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:16]
