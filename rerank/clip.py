"""Scores images by how well they fit a prompt: cosine similarity in CLIP's space (Radford et al. 2021).

Any model of open_clip, by name or from a folder in open_clip's `local-dir` layout; see `tessera/clip/`.

Letters: N images, H W pixels, S side of the model's input, M texts, C context length, E embedding width.
"""

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from tessera.clip.folder import CONFIG_FILE, build_model, load_clip, load_tokenizer, save_clip
from tessera.clip.foreign import named_clip
from tessera.clip.model import Pretrained
from tessera.clip.preprocessing import Preprocessing
from tessera.clip.text import tokenizer_content, write_tokenizer
from tessera.config import validate
from tessera.errors import InputError
from tessera.paths import expand, is_folder
from tessera.text import END, PAD, TextTokenizer
from tessera.text.normalization import visible
from tessera.weights.folder import fingerprint
from tessera.weights.writing import write_json


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
        folder = expand(name)
        if not is_folder(folder):
            clip = named_clip(str(name), None if weights is None else str(weights))
        elif weights is None:
            clip = load_clip(folder)
        else:
            raise InputError(f"{folder} is a folder, which brings its own weights; leave weights={weights} out")
        return cls(*clip).to(device, dtype)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes open_clip's `local-dir` layout, whole or not at all; `dtype` casts floating point weights."""
        save_clip(Pretrained(self.model, self.tokenizer, self.config), folder, dtype)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "ClipReranker":
        """Moves the model in place and returns self; None leaves that side as it is."""
        self.model.to(device=device, dtype=dtype)
        return self

    def with_model(self, model: nn.Module) -> "ClipReranker":
        """The same tokenizer and preprocessing around other weights of the same shape, put in eval mode."""
        return ClipReranker(model.eval(), self.tokenizer, self.config)

    # Scores ----------------------------------------------------------------------------------------------------------

    def score(self, prompt: str, images: Tensor | Sequence[Image.Image], codes: Tensor | None = None) -> Tensor:
        """Cosine similarity (N,) float32 in [-1, 1] of the prompt and each image, higher fits better.

        `images` are (N, 3, H, W) float in [-1, 1] or N PIL images; `codes` are not read.
        """
        return self.scores([prompt], images)[0]

    def scores(self, prompts: Sequence[str], images: Tensor | Sequence[Image.Image]) -> Tensor:
        """Cosine similarities (M, N) of M prompts and N images."""
        return (self.text_features(prompts) @ self.image_features(images).T).clamp(-1, 1)

    @torch.no_grad()
    def image_features(self, images: Tensor | Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        """N images -> (N, E) float32 of length 1, on the model's device."""
        features = [
            self.model.encode_image(self._pixels(images[start : start + batch_size]))  # type: ignore[operator]
            for start in range(0, len(images), batch_size)
        ]
        if not features:
            raise InputError("there are no images to score; give at least one")
        return F.normalize(torch.cat(features).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """M texts -> (M, E) float32 of length 1, on the model's device."""
        features: Tensor = self.model.encode_text(self.tokenize(prompts).to(self._weight.device))  # type: ignore[operator]
        return F.normalize(features.float(), dim=-1)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """M texts -> (M, C) int64, padded or truncated to the context length; the end token stays."""
        tokens: Tensor = self.tokenizer(list(texts))
        return tokens

    def normalize(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 3, S, S), the model's input."""
        return self.preprocessing.from_tensor(images)

    def left_out(self, prompt: str) -> str:
        """The end of a prompt that does not fit the context length; empty when all of it is scored."""
        tokens = self.tokenize([prompt])
        if not torch.equal(self.tokenize([f"{prompt} a"]), tokens):  # there is room for more
            return ""
        read, end = 0, len(prompt)  # the shortest beginning with all those tokens ends between them
        while end - read > 1:
            middle = (read + end) // 2
            if torch.equal(self.tokenize([prompt[:middle]]), tokens):
                end = middle
            else:
                read = middle
        return visible(prompt[end:])

    @property
    def fingerprint(self) -> str:
        """Changes when scores do: weights in their dtype, tokenizer, model config and preprocessing."""
        state = [part for name, tensor in sorted(self.model.state_dict().items()) for part in (name, tensor)]
        config = copy.deepcopy(self.config)
        config["model_cfg"]["text_cfg"].pop("hf_tokenizer_name", None)  # where it is read from, not what it does
        cleaning = getattr(self.tokenizer, "cleaning", "before")
        recorded = [] if cleaning == "before" else [cleaning]  # older fingerprints do not have it
        return fingerprint(*state, tokenizer_content(self.tokenizer), json.dumps(config, sort_keys=True), *recorded)

    # Inside ----------------------------------------------------------------------------------------------------------

    @property
    def _weight(self) -> Tensor:
        return next(self.model.parameters())

    def _pixels(self, images: Tensor | Sequence[Image.Image]) -> Tensor:
        if isinstance(images, Tensor):
            pixels = self.normalize(images.to(self._weight.device))
        else:
            pixels = torch.stack([self.preprocessing.from_image(image) for image in images])
        return pixels.to(self._weight)


def new_clip(model_config: Mapping[str, Any], text_tokenizer: TextTokenizer) -> ClipReranker:
    """An untrained model in train mode from an open_clip model config (embed_dim, vision_cfg, text_cfg ...).

    Vocabulary, end and padding ids and pooling at the end token follow from the tokenizer. Pixels are normalised to
    [-1, 1]. Raises InputError for a config that open_clip cannot build either.
    """
    model_cfg = copy.deepcopy(dict(model_config))
    if missing := {"embed_dim", "vision_cfg", "text_cfg"} - model_cfg.keys():
        raise InputError(
            f"an open_clip model config needs {', '.join(sorted(missing))}; add them to the recipe's model"
        )
    from_tokenizer = {
        "vocab_size": text_tokenizer.vocab_size,
        "hf_tokenizer_name": "local",
        "pool_type": "eos",
        "eos_id": END,
        "pad_id": PAD,
    }
    model_cfg["text_cfg"] = {**model_cfg["text_cfg"], **from_tokenizer}
    half = [0.5, 0.5, 0.5]
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": half, "std": half}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / CONFIG_FILE, config)
        write_tokenizer(text_tokenizer, folder)
        model, config = build_model(folder, config, "the model config of the recipe")
        return ClipReranker(model.train(), load_tokenizer(folder, model_cfg), config)
