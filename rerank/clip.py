"""Scores pictures by how well they fit a prompt: cosine similarity in CLIP's space (Radford et al. 2021).

Any model of open_clip, by name or from a folder in open_clip's own `local-dir` layout: `open_clip_config.json`,
`open_clip_model.safetensors`, `tokenizer.json`, `tokenizer_config.json`. open_clip starts a model that it finds no
weights for at random and logs a line; here that is an error. Importing it takes seconds, so it is imported late, and
not at all for a folder that holds nothing but what `towers.py`, `tokenizer.py` and `preprocessing.py` know.

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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rerank import towers
from rerank.preprocessing import Preprocessing
from rerank.tokenizer import FileTokenizer, save_tokenizer, tokenizer_content, write_tokenizer
from tessera.config import validate
from tessera.errors import InputError, nearest, reason
from tessera.files import read_json_object
from tessera.paths import expand, is_file, is_folder
from tessera.text import END, PAD, TextTokenizer
from tessera.text.normalization import visible
from tessera.weights.averages import choosing
from tessera.weights.building import built_from
from tessera.weights.folder import Unfilled, fingerprint, hub_at_once
from tessera.weights.foreign import read_tensors
from tessera.weights.writing import MARK, replacing, write_json

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILE = "open_clip_model.safetensors"
# What else open_clip writes or finds in such a folder; the last two are pickles, of which only tensors are read.
WEIGHT_FILES = (WEIGHT_FILE, "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin")


class ClipReranker:
    """A CLIP model with its tokenizer and preprocessing; `score` is what a pipeline calls."""

    def __init__(self, model: nn.Module, tokenizer: Any, config: dict[str, Any]) -> None:
        """`config` is the content of `open_clip_config.json`: model_cfg and preprocess_cfg."""
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.preprocessing = validate(Preprocessing, config["preprocess_cfg"], where="preprocess_cfg of the reranker")

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
        if is_folder(expand(name)):
            reranker = _from_folder(expand(name), weights)
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
        with replacing(folder) as part:
            if save_tokenizer(self.tokenizer, part):
                config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "local"  # "read it from this folder"
            write_json(part / CONFIG_FILE, config)
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, part / WEIGHT_FILE, {MARK: "1"})

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
        """(N, 3, H, W) in [-1, 1] -> (N, 3, S, S), the model's input."""
        return self.preprocessing.of_tensor(images)

    def left_out(self, prompt: str) -> str:
        """The end of a prompt that is cut off because the context is full; empty when all of it is scored."""
        tokens = self.tokenize([prompt])
        if not torch.equal(self.tokenize([f"{prompt} a"]), tokens):  # there is room for more
            return ""
        read, end = 0, len(prompt)  # the shortest start with all those tokens ends between them
        while end - read > 1:
            middle = (read + end) // 2
            if torch.equal(self.tokenize([prompt[:middle]]), tokens):
                end = middle
            else:
                read = middle
        return visible(prompt[end:])

    @property
    def fingerprint(self) -> str:
        """Changes when scores do: weights as they are held, tokenizer, model config and preprocessing."""
        state = [part for name, tensor in sorted(self.model.state_dict().items()) for part in (name, tensor)]
        config = copy.deepcopy(self.config)
        config["model_cfg"]["text_cfg"].pop("hf_tokenizer_name", None)  # where it was read from, not what it does
        cleaning = getattr(self.tokenizer, "cleaning", "before")
        recorded = [] if cleaning == "before" else [cleaning]  # models of before have fingerprints without it
        return fingerprint(*state, tokenizer_content(self.tokenizer), json.dumps(config, sort_keys=True), *recorded)

    # Inside ----------------------------------------------------------------------------------------------------------

    @property
    def _weight(self) -> Tensor:
        return next(self.model.parameters())

    def _pixels(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        if isinstance(images, Tensor):
            pixels = self.normalize(images.to(self._weight.device))
        else:
            pixels = torch.stack([self.preprocessing.of_picture(image) for image in images])
        return pixels.to(self._weight)


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
        write_tokenizer(text_tokenizer, Path(folder))
        reranker = _load(
            f"local-dir:{folder}", "the model config of the recipe", load_weights=False, pretrained_text=False
        )
    reranker.model.train()
    return reranker


# Loading --------------------------------------------------------------------------------------------------------------


def _from_folder(folder: Path, weights: str | Path | None) -> ClipReranker:
    if weights is not None:
        raise InputError(f"{folder} is a folder, which brings its own weights; leave weights={weights} out")
    if not is_file(folder / CONFIG_FILE):
        raise InputError(f"{folder} has no {CONFIG_FILE}; give a folder written by tessera train reranker or open_clip")
    text_cfg = _read_config(folder / CONFIG_FILE)["model_cfg"].get("text_cfg", {})
    if text_cfg.get("hf_tokenizer_name") and not (folder / "tokenizer_config.json").is_file():
        raise InputError(f"{folder} has no tokenizer_config.json; restore the file or write the folder again")
    if text_cfg.get("hf_tokenizer_name") == "local" and not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} has no tokenizer.json; restore the file or write the folder again")
    found = [name for name in WEIGHT_FILES if (folder / name).is_file()]
    if not found:
        raise InputError(f"{folder} has no {WEIGHT_FILE}; restore the file or write the folder again")
    plain = _plain(folder, found[0])
    if plain is not None:
        return plain
    with built_from(folder, CONFIG_FILE):
        reranker = _load(f"local-dir:{folder}", str(folder), load_weights=False, pretrained_text=False)
    _fill(reranker.model, folder / found[0])
    _try(reranker, folder)
    return reranker


def _try(reranker: ClipReranker, folder: Path) -> None:
    """Raises InputError unless a text and a picture can be scored: open_clip checks few values of a config when it
    builds from it. A folder that needs open_clip takes seconds to load, one score is little beside that."""
    try:
        reranker.score("a", [Image.new("RGB", (8, 8))])
    except Exception as error:
        raise InputError(
            f"{folder / CONFIG_FILE} describes no working CLIP ({_one_line(error)}); restore it"
        ) from error


def _plain(folder: Path, weights: str) -> ClipReranker | None:
    """The reranker without open_clip, None unless all of the folder is known: what is wrong, open_clip is to say."""
    content = _read_config(folder / CONFIG_FILE)
    config = towers.known(content["model_cfg"])
    if config is None or not config.text_cfg.hf_tokenizer_name or not weights.endswith(".safetensors"):
        return None
    try:
        with built_from(folder, CONFIG_FILE), Unfilled():
            model = towers.CLIP(config)
        state = load_file(folder / weights)
        model.load_state_dict(state)
    except Exception:  # sizes that cannot be, a file that is cut off, other names or shapes: each has its own kind
        return None
    texts = FileTokenizer.from_folder(folder, config.text_cfg.context_length)
    preprocess_cfg = _preprocess_cfg(content.get("preprocess_cfg"), config.vision_cfg)
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    if texts is None or preprocess_cfg is None or not finite:
        return None
    return ClipReranker(model.eval(), texts, {"model_cfg": content["model_cfg"], "preprocess_cfg": preprocess_cfg})


def _preprocess_cfg(given: Any, vision: towers.ViTConfig | towers.ResNetConfig) -> dict[str, Any] | None:
    """What open_clip makes of a `preprocess_cfg`: its defaults, what of them is given, the size of the model."""
    defaults = Preprocessing().model_dump()
    if not isinstance(given, dict | None):
        return None
    own = {name: value for name, value in (given or {}).items() if name in defaults and value is not None}
    side = vision.image_size
    return {**defaults, **own, "size": side if isinstance(vision, towers.ResNetConfig) else (side, side)}


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
    if not is_file(expand(weights)):
        raise InputError(f"'{weights}' is neither a file nor a tag of open_clip's {name}{nearest(weights, tags)}")
    reranker = _load(cleaned, name, load_weights=False, pretrained_text=False)
    _fill(reranker.model, expand(weights))
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
            if source.startswith("local-dir:"):
                length = model_cfg["text_cfg"].get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
                plain = FileTokenizer.from_folder(Path(source.removeprefix("local-dir:")), length)
                if plain is not None and plain.cleaning != "before":  # which open_clip's tokenizer cannot do
                    tokenizer = plain
        except InputError:
            raise
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
    """Loads the file's weights strictly, without what wrappers of modules put into their names.

    Raises InputError unless it holds exactly this model's, all of them finite.
    """
    from open_clip.factory import load_checkpoint

    try:
        if path.suffix in (".npz", ".npy"):
            load_checkpoint(model, str(path), strict=True, weights_only=True)
        else:
            with choosing("model"):
                _load_state(model, read_tensors([path]))
        broken = [name for name, tensor in model.state_dict().items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise ValueError(f"{broken[0]} is not finite")
    except InputError as error:  # of another kind, cut off, ...
        raise InputError(f"the weights are not this model's: {error}") from error
    except Exception as error:  # missing or foreign names, other shapes
        raise InputError(f"the weights in {path} are not this model's: {_one_line(error)}; restore the file") from error


def _load_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """What open_clip does with a file's tensors before it loads them, but for stretching what has another size."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_state_dict(model, state)
    own = model.state_dict()
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    if (positions := "text.transformer.embeddings.position_ids") not in own:  # of old transformers
        state.pop(positions, None)
    for name in ("logit_scale", "logit_bias"):  # a number, with or without an axis
        if name in state and name in own and state[name].numel() == 1:
            state[name] = state[name].reshape(own[name].shape)
    if "logit_scale" in state and "logit_bias" in own:  # a model of before SigLIP's loss
        state.setdefault("logit_bias", torch.zeros_like(own["logit_bias"]))
    model.load_state_dict(state, strict=True)


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json_object(path)
    model_cfg = config.get("model_cfg")
    if not isinstance(model_cfg, dict) or not isinstance(model_cfg.get("text_cfg", {}), dict):
        raise InputError(f"{path} has no model_cfg of a CLIP; restore the file")
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
    return reason(error)
