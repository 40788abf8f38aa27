"""Scores pictures by how well they fit a prompt: cosine similarity in CLIP's space (Radford et al. 2021).

Any model of open_clip, by name or from a folder in open_clip's own `local-dir` layout: `open_clip_config.json`,
`open_clip_model.safetensors`, `tokenizer.json`, `tokenizer_config.json`. open_clip starts a model that it finds no
weights for at random and logs a line; here that is an error. It is imported late, since that takes seconds.

Letters: N pictures, H W pixels, S side of the model's input, M texts, C context length, E embedding width.
"""

import copy
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import InputError, nearest
from common.text import END, PAD, SPECIALS, TextTokenizer
from common.weights import fingerprint, hub_at_once, new_folder, write_json

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILE = "open_clip_model.safetensors"
# What else open_clip writes or finds in such a folder; the last two are pickles, of which only tensors are read.
WEIGHT_FILES = (WEIGHT_FILE, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")


class ClipReranker:
    """A CLIP model with its tokenizer and preprocessing; `score` is what a pipeline calls."""

    def __init__(self, model: nn.Module, tokenizer: Any, config: dict[str, Any]) -> None:
        """`config` is the content of `open_clip_config.json`: model_cfg and preprocess_cfg."""
        from open_clip.transform import PreprocessCfg, image_transform_v2

        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.preprocessing = PreprocessCfg(**config["preprocess_cfg"])
        self.preprocess = image_transform_v2(self.preprocessing, is_train=False)  # PIL -> (3, S, S), open_clip's own

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        weights: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> "ClipReranker":
        """A local folder, or a model name of open_clip with `weights` (one of its tags or a local file), or a hub name.

        The model comes in eval mode. Raises InputError: unknown name or tag; missing, partial, broken or wrong weights;
        a tag or a hub name that cannot be downloaded.
        """
        if Path(name).is_dir():
            reranker = _from_folder(Path(name), weights)
        else:
            reranker = _from_name(str(name), None if weights is None else str(weights))
        return reranker.to(device, dtype)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes open_clip's `local-dir` layout, whole or not at all; `dtype` casts floating point weights."""
        state = {
            name: tensor.detach().cpu().to(dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=True)
            for name, tensor in self.model.state_dict().items()
        }
        config = copy.deepcopy(self.config)
        with new_folder(folder) as part:
            if _save_tokenizer(self.tokenizer, part):
                config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "local"  # "read it from this folder"
            write_json(part / CONFIG_FILE, config)
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, part / WEIGHT_FILE)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "ClipReranker":
        """Moves the model in place and returns self; None leaves that side as it is."""
        self.model.to(device=device, dtype=dtype)
        return self

    def with_model(self, model: nn.Module) -> "ClipReranker":
        """The same tokenizer and preprocessing around other weights of the same shape, put in eval mode."""
        return ClipReranker(model.eval(), self.tokenizer, self.config)

    # Scores ----------------------------------------------------------------------------------------------------------

    def score(self, prompt: str, images: Tensor | Sequence[Image.Image], codes: Tensor | None = None) -> Tensor:
        """Cosine similarity (N,) float32 in [-1, 1] of the prompt and each picture, higher fits better.

        `images` are (N, 3, H, W) float in [-1, 1] or N pictures; `codes` are not looked at.
        """
        return self.scores([prompt], images)[0]

    def scores(self, prompts: Sequence[str], images: Tensor | Sequence[Image.Image]) -> Tensor:
        """Cosine similarities (M, N) of M prompts and N pictures."""
        return (self.text_features(prompts) @ self.image_features(images).T).clamp(-1, 1)

    @torch.no_grad()
    def image_features(self, images: Tensor | Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        """N pictures -> (N, E) float32 of length 1, on the model's device."""
        features = [
            self.model.encode_image(self._pixels(images[start : start + batch_size]))  # type: ignore[operator]
            for start in range(0, len(images), batch_size)
        ]
        if not features:
            raise InputError("there are no pictures to score; give at least one")
        return F.normalize(torch.cat(features).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """M texts -> (M, E) float32 of length 1, on the model's device."""
        features: Tensor = self.model.encode_text(self.tokenize(prompts).to(self._weight.device))  # type: ignore[operator]
        return F.normalize(features.float(), dim=-1)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """M texts -> (M, C) int64, padded or cut to the context length; the end token stays."""
        tokens: Tensor = self.tokenizer(list(texts))
        return tokens

    def normalize(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 3, S, S), the model's input: what `preprocess` does to PIL pictures."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images must be (N, 3, H, W) in [-1, 1], got {tuple(images.shape)}")
        mean, std = (
            torch.tensor(values, device=images.device).expand(3).view(3, 1, 1)
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        return (self._resize((images.float() + 1) / 2) - mean) / std

    @property
    def fingerprint(self) -> str:
        """Changes when scores do: weights as they are held, tokenizer, model config and preprocessing."""
        state = [part for name, tensor in sorted(self.model.state_dict().items()) for part in (name, tensor)]
        config = copy.deepcopy(self.config)
        config["model_cfg"]["text_cfg"].pop("hf_tokenizer_name", None)  # where it was read from, not what it does
        return fingerprint(*state, _tokenizer_content(self.tokenizer), json.dumps(config, sort_keys=True))

    # Inside ----------------------------------------------------------------------------------------------------------

    @property
    def _weight(self) -> Tensor:
        return next(self.model.parameters())

    def _pixels(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        if isinstance(images, Tensor):
            pixels = self.normalize(images.to(self._weight.device))
        else:
            pixels = torch.stack([self.preprocess(image) for image in images])
        return pixels.to(self._weight)

    def _resize(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) in [0, 1] -> (N, 3, S, S) in [0, 1], in the mode the model was trained with."""
        from torchvision.transforms import InterpolationMode
        from torchvision.transforms.functional import center_crop, resize

        side = self.preprocessing.size
        target = (side, side) if isinstance(side, int) else tuple(side)
        size = _scaled(pixels.shape[2:], target, self.preprocessing.resize_mode)
        kind = InterpolationMode("bilinear" if self.preprocessing.interpolation == "bilinear" else "bicubic")
        # Width, then height, clipping what bicubic overshoots after each, as PIL does (which starts with the height
        # where that is squashed far more than the width).
        for step in ([pixels.shape[2], size[1]], size):
            if step != list(pixels.shape[2:]):
                pixels = resize(pixels, step, kind, antialias=True).clamp(0, 1)
        if self.preprocessing.resize_mode == "longest":
            pixels = _pad(pixels, target, self.preprocessing.fill_color / 255)
        return center_crop(pixels, list(target))


def new_clip(model_config: Mapping[str, Any], text_tokenizer: TextTokenizer) -> ClipReranker:
    """An untrained model in train mode from an open_clip model config (embed_dim, vision_cfg, text_cfg ...).

    What the tokenizer settles is filled in here: vocabulary, end and padding ids, pooling at the end token. Pixels are
    normalised to [-1, 1]. Raises InputError when open_clip cannot build it.
    """
    model_cfg = copy.deepcopy(dict(model_config))
    if missing := {"embed_dim", "vision_cfg", "text_cfg"} - model_cfg.keys():
        raise InputError(
            f"an open_clip model config needs {', '.join(sorted(missing))}; add them to the recipe's model"
        )
    settled = {
        "vocab_size": text_tokenizer.vocab_size,
        "hf_tokenizer_name": "local",
        "pool_type": "eos",
        "eos_id": END,
        "pad_id": PAD,
    }
    model_cfg["text_cfg"] = {**model_cfg["text_cfg"], **settled}
    halves = [0.5, 0.5, 0.5]
    with tempfile.TemporaryDirectory() as folder:
        write_json(
            Path(folder) / CONFIG_FILE, {"model_cfg": model_cfg, "preprocess_cfg": {"mean": halves, "std": halves}}
        )
        _write_tokenizer(_with_end(text_tokenizer), Path(folder))
        reranker = _load(
            f"local-dir:{folder}", "the model config of the recipe", load_weights=False, pretrained_text=False
        )
    reranker.model.train()
    return reranker


# Loading --------------------------------------------------------------------------------------------------------------


def _from_folder(folder: Path, weights: str | Path | None) -> ClipReranker:
    if weights is not None:
        raise InputError(f"{folder} is a folder, which brings its own weights; leave weights={weights} out")
    if not (folder / CONFIG_FILE).is_file():
        raise InputError(f"{folder} has no {CONFIG_FILE}; give a folder written by tessera train reranker or open_clip")
    text_cfg = _read_config(folder / CONFIG_FILE)["model_cfg"].get("text_cfg", {})
    if text_cfg.get("hf_tokenizer_name") and not (folder / "tokenizer_config.json").is_file():
        raise InputError(f"{folder} has no tokenizer_config.json; restore the file or write the folder again")
    if text_cfg.get("hf_tokenizer_name") == "local" and not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} has no tokenizer.json; restore the file or write the folder again")
    found = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder} has no {WEIGHT_FILE}; restore the file or write the folder again")
    reranker = _load(f"local-dir:{folder}", str(folder), load_weights=False, pretrained_text=False)
    _fill(reranker.model, folder / found[0])
    return reranker


def _from_name(name: str, weights: str | None) -> ClipReranker:
    import open_clip

    known, cleaned = open_clip.list_models(), name.replace("/", "-")  # open_clip takes ViT-B/32 for ViT-B-32
    if cleaned not in known:
        if (
            weights is None
            and len(name.removeprefix("hf-hub:").split("/")) == 2
            and not name.startswith((".", "~", "/"))
        ):
            return _load(f"hf-hub:{name.removeprefix('hf-hub:')}", f"the hub's '{name}'", require_pretrained=True)
        hint = nearest(name, known)
        hint = hint if hint.startswith(",") else "; open_clip.list_models() names them all"
        raise InputError(f"'{name}' is neither a folder nor a model name of open_clip{hint}")
    tags = open_clip.list_pretrained_tags_by_model(cleaned)
    if weights is None:
        raise InputError(f"open_clip's {name} needs weights: a file, or one of the tags {', '.join(tags) or '(none)'}")
    if weights in tags:
        return _from_tag(name, cleaned, weights)
    if not Path(weights).is_file():
        raise InputError(f"'{weights}' is neither a file nor a tag of open_clip's {name}{nearest(weights, tags)}")
    reranker = _load(cleaned, name, load_weights=False, pretrained_text=False)
    _fill(reranker.model, Path(weights))
    return reranker


def _from_tag(name: str, cleaned: str, tag: str) -> ClipReranker:
    """Weights that open_clip knows, downloaded. They are used with the activation that they were trained with."""
    import open_clip

    trained = bool(open_clip.get_pretrained_cfg(cleaned, tag).get("quick_gelu", False))
    built = bool(open_clip.get_model_config(cleaned).get("quick_gelu", False))
    if built and not trained:
        raise InputError(
            f"{tag} was not trained with QuickGELU, but {name} uses it; give {name.removesuffix('-quickgelu')}"
        )
    return _load(
        cleaned, f"{name} with {tag}", pretrained=tag, require_pretrained=True, force_quick_gelu=trained and not built
    )


def _load(source: str, what: str, **arguments: Any) -> ClipReranker:
    """What open_clip makes of `source`, in eval mode; whatever it raises becomes one sentence about `what`."""
    import open_clip

    network = source.startswith("hf-hub:") or "pretrained" in arguments
    with _quiet_about_random_weights(), hub_at_once() if network else nullcontext():
        try:
            model = open_clip.create_model(source, **arguments)
            tokenizer = open_clip.get_tokenizer(source)
            model_cfg = open_clip.get_model_config(source)
        except Exception as error:  # open_clip, torch, the hub and json each raise their own kinds here
            if network:
                raise InputError(
                    f"open_clip cannot get {what}; check the name and the network, or give local weights"
                ) from error
            raise InputError(f"open_clip cannot load {what}: {_one_line(error)}") from error
    if arguments.get("force_quick_gelu"):
        model_cfg["quick_gelu"] = True
    return ClipReranker(
        model.eval(), tokenizer, {"model_cfg": model_cfg, "preprocess_cfg": model.visual.preprocess_cfg}
    )


def _fill(model: nn.Module, path: Path) -> None:
    """Loads the file's weights strictly. Raises InputError unless it holds exactly this model's, all of them finite."""
    from open_clip.factory import load_checkpoint

    try:
        for name, shape in _shapes(path).items():
            # open_clip would stretch position embeddings of another image size or context length to fit.
            own = model.state_dict().get(name.removeprefix("module."))
            if name.endswith("positional_embedding") and own is not None and tuple(own.shape) != shape:
                raise ValueError(f"size mismatch for {name}: {shape} in the file, {tuple(own.shape)} in the model")
        load_checkpoint(model, str(path), strict=True, weights_only=True)
        broken = [name for name, tensor in model.state_dict().items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise ValueError(f"{broken[0]} is not finite")
    except Exception as error:  # a pickle, a cut-off file, missing or foreign names, other shapes
        raise InputError(f"the weights in {path} are not this model's: {_one_line(error)}; restore the file") from error


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in a weight file, without reading them where the format allows."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
    if path.suffix in (".npz", ".npy"):
        return {}
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state)
    return {name: tuple(tensor.shape) for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} is not valid JSON ({_one_line(error)}); restore the file") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise InputError(f"{path} has no model_cfg; restore the file")
    return config


@contextmanager
def _quiet_about_random_weights() -> Iterator[None]:
    """Drops open_clip's two lines on the root logger about starting without weights, and no others."""
    expected = ("No pretrained weights loaded", "Local config loaded, but no CLIP weights found")

    def unexpected(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(expected)

    root, silent = logging.getLogger(), logging.NullHandler()
    root.addFilter(unexpected)
    root.addHandler(silent)  # without a handler, the first line logged on the root logger would configure logging
    try:
        yield
    finally:
        root.removeHandler(silent)
        root.removeFilter(unexpected)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else text[:237] + "..."


# Tokenizers -----------------------------------------------------------------------------------------------------------


def _with_end(text_tokenizer: TextTokenizer) -> str:
    """The content of a `tokenizer.json` that appends the end token by itself, which is where CLIP pools."""
    tokenizer = Tokenizer.from_str(text_tokenizer.to_json())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {SPECIALS[END]}", special_tokens=[(SPECIALS[END], END)]
    )
    text: str = tokenizer.to_str()
    return text


def _write_tokenizer(content: str, folder: Path) -> None:
    pad, start, end = SPECIALS
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "bos_token": start,
        "eos_token": end,
        "split_special_tokens": True,  # an <end> written in a prompt is text
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)


def _save_tokenizer(tokenizer: Any, folder: Path) -> bool:
    """Writes the tokenizer's files; False when open_clip's own CLIP tokenizer is used, which needs none."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    if isinstance(tokenizer, SimpleTokenizer):
        return False
    if not isinstance(tokenizer, HFTokenizer):
        raise InputError(f"a {type(tokenizer).__name__} cannot be saved beside its model; use the model by its name")
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for where in ("name_or_path", "is_local", "local_files_only"):  # the place that it came from
        config.pop(where, None)
    write_json(path, config)
    if (folder / "tokenizer.json").is_file():
        (folder / "tokenizer.json").write_text(_tokenizer_content(tokenizer), encoding="utf-8")
    return True


def _tokenizer_content(tokenizer: Any) -> str:
    """All that decides its tokens, as text. Padding and truncation are set anew by each call, so they are left out."""
    backend = getattr(getattr(tokenizer, "tokenizer", None), "backend_tokenizer", None)
    if backend is None:
        return f"{type(tokenizer).__name__} {tokenizer.context_length}"
    content = json.loads(backend.to_str())
    return json.dumps(content | {"padding": None, "truncation": None}, ensure_ascii=False)


# Sizes ----------------------------------------------------------------------------------------------------------------


def _scaled(size: Sequence[int], target: tuple[int, ...], mode: str) -> list[int]:
    """The (height, width) that open_clip's transforms scale a picture of `size` to before they crop."""
    if mode == "squash":
        return list(target)
    ratios = [side / wanted for side, wanted in zip(size, target, strict=True)]
    if mode == "longest":
        return [round(side / max(ratios)) for side in size]
    if target[0] == target[1]:  # torchvision's Resize, which cuts off where the others round
        short = min(size)
        return [target[0] if side == short else int(target[0] * side / short) for side in size]
    return [round(side / min(ratios)) for side in size]


def _pad(pixels: Tensor, target: tuple[int, ...], fill: float) -> Tensor:
    """Adds `fill` around (N, 3, H, W) up to `target`; the odd pixel goes right and below."""
    missing = [max(0, wanted - side) for side, wanted in zip(pixels.shape[2:], target, strict=True)]
    top, left = (side // 2 for side in missing)
    return F.pad(pixels, [left, missing[1] - left, top, missing[0] - top], value=fill)
