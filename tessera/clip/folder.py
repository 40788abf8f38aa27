"""A CLIP in a folder of open_clip's `local-dir` layout, whole or not at all.

    open_clip_config.json         model_cfg and preprocess_cfg
    open_clip_model.safetensors   weights
    tokenizer.json, tokenizer_config.json

What `CLIP` and `FileTokenizer` know is loaded without open_clip, the rest is built by it, and both are filled strictly:
open_clip itself would start a model without weights at random and log a line.
"""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tessera.clip import foreign
from tessera.clip.model import CLIP, CLIPConfig, Pretrained
from tessera.clip.preprocessing import Preprocessing
from tessera.clip.text import FileTokenizer, save_tokenizer
from tessera.clip.towers import ViT
from tessera.config import validate
from tessera.errors import InputError, reason
from tessera.files import read_json_object
from tessera.paths import is_file
from tessera.weights.building import built_from
from tessera.weights.folder import Unfilled
from tessera.weights.writing import MARK, replacing, write_json

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILE = "open_clip_model.safetensors"
# What else open_clip writes or finds in such a folder; the last two are pickles, of which only tensors are read.
WEIGHT_FILES = (WEIGHT_FILE, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")


def save_clip(clip: Pretrained, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes the layout, whole or not at all; `dtype` casts floating point weights."""
    state = {
        name: tensor.detach().cpu().to(dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in clip.model.state_dict().items()
    }
    config = copy.deepcopy(clip.config)
    with replacing(folder) as part:
        if save_tokenizer(clip.tokenizer, part):
            config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "local"  # "read it from this folder"
        write_json(part / CONFIG_FILE, config)
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, part / WEIGHT_FILE, {MARK: "1"})


def load_clip(folder: Path) -> Pretrained:
    """Model in eval mode, tokenizer and config.

    Raises InputError for missing, partial, broken or wrong files, and for a config of no working CLIP.
    """
    text_cfg = _read_config(folder)["model_cfg"].get("text_cfg", {})
    if text_cfg.get("hf_tokenizer_name") and not (folder / "tokenizer_config.json").is_file():
        raise InputError(f"{folder} has no tokenizer_config.json; restore the file or write the folder again")
    if text_cfg.get("hf_tokenizer_name") == "local" and not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} has no tokenizer.json; restore the file or write the folder again")
    model, config = load_model(folder)
    clip = Pretrained(model, load_tokenizer(folder, config["model_cfg"]), config)
    if not isinstance(model, CLIP):
        _try(clip, folder)
    return clip


def load_model(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model in eval mode and its config, complete. Raises InputError as `load_clip`."""
    config = _read_config(folder)
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder} has no {WEIGHT_FILE}; restore the file or write the folder again")
    known = CLIPConfig.known(config["model_cfg"]) is not None
    with built_from(folder, CONFIG_FILE), Unfilled() if known else nullcontext():
        model, config = build_model(folder, config, str(folder))
    foreign.fill(model, found[0])
    return model.eval(), config


def build_model(folder: Path, config: dict[str, Any], what: str) -> tuple[nn.Module, dict[str, Any]]:
    """The untrained model of a config that stands in `folder`, and that config with its preprocess_cfg complete.

    `what` names it in the InputError that a config raises which open_clip cannot build either.
    """
    known = CLIPConfig.known(config["model_cfg"])
    if known is None:
        return foreign.build_local(folder, what)
    model = CLIP(known)
    given = config.get("preprocess_cfg") or {}
    if not isinstance(given, dict):
        raise InputError(f"the preprocess_cfg of {what} is a {type(given).__name__}, not keys and values; restore it")
    defaults, side = Preprocessing().model_dump(), known.vision_cfg.image_size
    preprocess_cfg = {
        **defaults,
        **{name: value for name, value in given.items() if name in defaults and value is not None},
        "size": (side, side) if isinstance(model.visual, ViT) else side,  # the model decides, as in open_clip
    }
    return model, {"model_cfg": config["model_cfg"], "preprocess_cfg": preprocess_cfg}


def load_tokenizer(folder: Path, model_cfg: dict[str, Any]) -> Any:
    """The tokenizer in `folder`, or open_clip's own where the config names none."""
    length = model_cfg["text_cfg"].get("context_length", 77)
    tokenizer = FileTokenizer.from_folder(folder, length) if model_cfg["text_cfg"].get("hf_tokenizer_name") else None
    # A config that is not known may ask for another cleaning, which our own tokenizers overrule.
    if tokenizer is None or (tokenizer.cleaning == "before" and CLIPConfig.known(model_cfg) is None):
        return foreign.tokenizer(f"local-dir:{folder}", str(folder))
    return tokenizer


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not is_file(path):
        raise InputError(f"{folder} has no {CONFIG_FILE}; give a folder written by tessera train reranker or open_clip")
    config = read_json_object(path)
    model_cfg = config.get("model_cfg")
    if not isinstance(model_cfg, dict) or not isinstance(model_cfg.get("text_cfg", {}), dict):
        raise InputError(f"{path} has no model_cfg of a CLIP; restore the file")
    return config


@torch.no_grad()
def _try(clip: Pretrained, folder: Path) -> None:
    """Raises InputError unless a text and an image can be embedded, because open_clip checks few values of a config."""
    try:
        preprocessing = validate(Preprocessing, clip.config["preprocess_cfg"], where="preprocess_cfg of the reranker")
        clip.model.encode_image(preprocessing.from_image(Image.new("RGB", (8, 8)))[None])  # type: ignore[operator]
        clip.model.encode_text(clip.tokenizer(["a"]))  # type: ignore[operator]
    except Exception as error:
        raise InputError(f"{folder / CONFIG_FILE} describes no working CLIP ({reason(error)}); restore it") from error
