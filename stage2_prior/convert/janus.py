"""Janus and Janus-Pro (Wu et al. 2024, Chen et al. 2025) from a folder of either layout, with their image tokenizer.

The original layout is deepseek-ai's, the other one transformers'. Widths and depths are read from the weights and
compared with `config.json`, which alone says how many heads there are and how positions turn. What was trained to
understand images, and the head for text, are left behind.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from tokenizers import Tokenizer

from stage1_tokenizer.convert.janus import read as read_tokenizer
from stage1_tokenizer.convert.vqgan import build as build_tokenizer
from stage2_prior.convert.base import Converted, build, check_vocabulary, foreign_vocabulary
from stage2_prior.imported.janus import PROMPT, JanusConfig, JanusPrior
from stage2_prior.sampling import Sampling
from tessera.config import Config, Origin, validate
from tessera.errors import InputError
from tessera.files import read_json_object
from tessera.text import SPECIALS, TextTokenizer
from tessera.weights.containers import refuse_stand_in
from tessera.weights.foreign import Weights, find_files, need, pick, read_settings, read_tensors, section

FAMILY = "janus"
PUBLISHED = (
    "Janus is published on the hub: deepseek-ai/Janus-1.3B, deepseek-ai/Janus-Pro-1B and deepseek-ai/Janus-Pro-7B "
    "(pytorch_model*.bin), or deepseek-community/Janus-Pro-1B and deepseek-community/Janus-Pro-7B "
    "(model*.safetensors): give the folder with the weights, config.json, generation_config.json or "
    "processor_config.json, tokenizer.json and tokenizer_config.json"
)
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors", "*.bin")
# Beginnings of names, without transformers' `model.`, of what no image is drawn with.
IGNORED = r"(vision_model|aligner|vqmodel|gen_vision_model)\.|(language_model\.)?lm_head\.|.*rotary_emb\.inv_freq$"
TEMPLATES = {  # by what the tokenizer has a token of its own for
    "<|User|>": "<|User|>: {prompt}\n\n<|Assistant|>:",  # Janus-Pro
    "": "User: {prompt}\n\nAssistant:",  # Janus
}
BEGIN, PADDING, BEGIN_IMAGE = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"  # where no file names others
LLAMA = {"hidden_size": 4096, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}  # where unsaid


class Settings(Config):
    template: str | None = None  # of the prompt, with {prompt} in it; \n in it stands for the end of a line
    text_length: int = Field(256, ge=2)  # tokens of a prompt and its template


def convert(sources: list[Path], settings: Mapping[str, Any]) -> Converted:
    given = validate(Settings, dict(settings), where="--set")
    config = read_settings(need(sources, PUBLISHED, "config.json"))
    files = [path for path in find_files(sources, WEIGHTS) if path.suffix in (".safetensors", ".bin", ".pt", ".ckpt")]
    if not files:
        need(sources, PUBLISHED, *WEIGHTS)
    tokens = need(sources, PUBLISHED, "tokenizer.json")
    text_tokenizer = read_text_tokenizer(tokens)
    specials = Specials(sources, config, text_tokenizer, str(tokens))
    where = files[0].name if len(files) == 1 else files[0].parent.name
    everything = read_tensors(files, keep=lambda name: not re.match(IGNORED, name.removeprefix("model.")))
    weights = Weights({name.removeprefix("model."): tensor for name, tensor in everything.items()}, where)
    tokenizer = read_tokenizer(sources)
    side = tokenizer.config.image_size // tokenizer.config.factor
    prior = read(weights, config, given, text_tokenizer, specials, side, tuple(path.name for path in files))
    return Converted(prior, build_tokenizer(*tokenizer), Sampling(guidance_scale=5.0))


class Specials:
    """The ids that a prompt is made with, from the files that name them or from the tokenizer."""

    def __init__(self, sources: list[Path], config: dict[str, Any], tokenizer: TextTokenizer, where: str) -> None:
        self.tokenizer, self.where = tokenizer, where
        self.named = {token: i - len(SPECIALS) for token, i in added_tokens(tokenizer).items()}
        read = {
            name: read_settings(path)
            for name in ("generation_config", "tokenizer_config", "processor_config")
            if (path := pick(sources, f"{name}.json")) is not None
        }
        generation = read.get("generation_config", {})
        inner = section(config, "text_config") or section(config, "language_config")
        words, tags = read.get("tokenizer_config", {}), read.get("processor_config", {})
        self.begin = self._id(
            [generation.get("bos_token_id"), inner.get("bos_token_id")], [words.get("bos_token"), BEGIN]
        )
        self.padding = self._id(
            [generation.get("pad_token_id"), inner.get("pad_token_id")],
            [tags.get("pad_tag"), words.get("pad_token"), PADDING],
        )
        self.begin_image = self._id(
            [section(generation, "generation_kwargs").get("boi_token_id")], [tags.get("image_start_tag"), BEGIN_IMAGE]
        )

    def _id(self, ids: list[Any], words: list[Any]) -> int:
        """The first of `ids` that is a number, or that of the first of `words` that is a token."""
        for number in ids:
            if isinstance(number, int):
                return number
        texts = [word.get("content") if isinstance(word, dict) else word for word in words if word]
        for text in texts:
            if text in self.named:
                return self.named[text]
        raise InputError(f"{self.where} has no token {' or '.join(map(str, texts))}; give the files of one Janus")

    def template(self, text: str) -> tuple[int | str, ...]:
        """A template as token ids and, between them, pieces of text."""
        known = "|".join(re.escape(token) for token in sorted(self.named, key=len, reverse=True)) or "(?!)"
        pieces = [piece for piece in re.split(f"({known})", text) if piece]
        return self.begin, *(self.named.get(piece, piece) for piece in pieces), self.begin_image


def read(
    weights: Weights,
    config: dict[str, Any],
    given: Settings,
    text_tokenizer: TextTokenizer,
    specials: Specials,
    side: int,
    files: tuple[str, ...],
) -> JanusPrior:
    """The prior in `weights`, which draws `side` x `side` codes."""
    original = "gen_embed.weight" in weights
    names = _original_names(weights) if original else _transformers_names(weights)
    llama = LLAMA | (section(config, "language_config") or section(config, "text_config"))
    theirs = str(names["text_embedding"]).removesuffix("embed_tokens")
    vocabulary, dim = weights.shape(f"{theirs}embed_tokens.weight")
    depth = weights.count(theirs + "layers.{}.input_layernorm.weight")
    heads, mlp_dim = _number(llama, "num_attention_heads"), weights.shape(f"{theirs}layers.0.mlp.gate_proj.weight")[0]
    read_off = {"hidden_size": dim, "num_hidden_layers": depth, "intermediate_size": mlp_dim, "vocab_size": vocabulary}
    for key, value in read_off.items():
        if llama.get(key, value) != value:
            raise InputError(
                f"config.json says {key} {llama[key]}, but {weights.where} has {value}; give the files that belong "
                "together"
            )
    rows = weights.shape(f"{theirs}layers.0.self_attn.q_proj.weight")[0]
    if rows % heads:
        raise InputError(f"config.json says {heads} heads, which do not divide the {rows} rows of {weights.where}")
    head_dim = _number(llama, "head_dim") if llama.get("head_dim") else rows // heads
    check_vocabulary(text_tokenizer, vocabulary)
    pro = "<|User|>" if "<|User|>" in specials.named else ""
    template = TEMPLATES[pro] if given.template is None else given.template.replace("\\n", "\n")
    if template.count(PROMPT) != 1:
        raise InputError(f"the template must have {PROMPT} in it once, got '{template}'")
    widths = [weights.shape(f"{names[f'code_mlp.{i}']}.weight")[0] for i in range(_aligner_depth(names))]
    sizes = JanusConfig(
        codebook_size=weights.shape(f"{names['code_embedding']}.weight")[0],
        code_shape=(1, side, side),
        template=specials.template(template),
        padding=specials.padding,
        text_length=given.text_length,
        text_vocab_size=vocabulary,
        dim=dim,
        depth=depth,
        num_heads=heads,
        num_kv_heads=weights.shape(f"{theirs}layers.0.self_attn.k_proj.weight")[0] // head_dim,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        norm_eps=_number(llama, "rms_norm_eps"),
        rope_theta=_rope_theta(llama),
        code_dim=weights.shape(f"{names['code_embedding']}.weight")[1],
        code_mlp=tuple(widths),
        head_mlp=weights.shape(f"{names['head_in']}.weight")[0],
        text_tokenizer_fingerprint=text_tokenizer.fingerprint,
        origin=Origin(
            family=FAMILY,
            project="deepseek-ai/Janus",
            files=files,
            code_licence="MIT",
            weights_licence="DeepSeek Model License",
        ),
    )
    for layer in range(depth):
        block, source = f"decoder.blocks.{layer}", f"{theirs}layers.{layer}"
        names |= {
            f"{block}.attention_norm": f"{source}.input_layernorm",
            f"{block}.attention.qkv": tuple(f"{source}.self_attn.{part}_proj" for part in "qkv"),
            f"{block}.attention.out": f"{source}.self_attn.o_proj",
            f"{block}.mlp_norm": f"{source}.post_attention_layernorm",
            f"{block}.mlp_in": (f"{source}.mlp.gate_proj", f"{source}.mlp.up_proj"),
            f"{block}.mlp_out": f"{source}.mlp.down_proj",
        }
    return build(JanusPrior, sizes, weights, names, text_tokenizer)


def _transformers_names(weights: Weights) -> dict[str, str | tuple[str, ...]]:
    names: dict[str, str | tuple[str, ...]] = {
        "text_embedding": "language_model.embed_tokens",
        "decoder.norm": "language_model.norm",
        "code_embedding": "generation_embeddings",
        "code_mlp.0": "generation_aligner.fc1",
        "head_in": "generation_head.proj_out",
        "head_out": "generation_head.vision_head",
    }
    for i in range(weights.count("generation_aligner.hidden_layers.{}.weight")):
        names[f"code_mlp.{i + 1}"] = f"generation_aligner.hidden_layers.{i}"
    return names


def _original_names(weights: Weights) -> dict[str, str | tuple[str, ...]]:
    names: dict[str, str | tuple[str, ...]] = {
        "text_embedding": "language_model.model.embed_tokens",
        "decoder.norm": "language_model.model.norm",
        "code_embedding": "gen_embed",
        "head_in": "gen_head.output_mlp_projector",
        "head_out": "gen_head.vision_head",
    }
    i = 0
    while f"gen_aligner.layers.{2 * i}.weight" in weights:  # every other one is the activation
        names[f"code_mlp.{i}"] = f"gen_aligner.layers.{2 * i}"
        i += 1
    return names


def _aligner_depth(names: Mapping[str, object]) -> int:
    return max(sum(name.startswith("code_mlp.") for name in names), 1)


def _rope_theta(llama: dict[str, Any]) -> float:
    """Raises InputError for positions that are stretched, which no published Janus has."""
    rope = section(llama, "rope_parameters") or section(llama, "rope_scaling")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise InputError(f"config.json asks for rotary positions of the kind {kind}; only the default can be converted")
    return _number(llama | rope, "rope_theta")


def _number(settings: dict[str, Any], key: str) -> Any:
    """Raises InputError unless it is a number above 0."""
    value = settings.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"config.json must have a {key} above 0, got {value!r}; get the file again")
    return value


# Text -----------------------------------------------------------------------------------------------------------------


def read_text_tokenizer(path: Path) -> TextTokenizer:
    """The tokenizer with our specials before its own tokens, whose ids move up by their number."""
    plain = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    refuse_stand_in(path)
    content = read_json_object(path, "get the file again")
    try:
        content["model"]["vocab"] = foreign_vocabulary(content["model"]["vocab"])
        added = [{"id": i, "content": special, **plain} for i, special in enumerate(SPECIALS)]
        for entry in content["added_tokens"]:
            (name,) = foreign_vocabulary({entry["content"]: 0}).keys() - set(SPECIALS)
            added.append(entry | {"id": entry["id"] + len(SPECIALS), "content": name})
        content |= {"added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
        return TextTokenizer(Tokenizer.from_str(json.dumps(content)))
    except Exception as error:  # another structure, or what the library refuses, as bare Exception
        raise InputError(f"{path} is not the tokenizer of a Janus ({error}); get the file again") from None


def added_tokens(tokenizer: TextTokenizer) -> dict[str, int]:
    """Tokens that stand apart from the vocabulary, with our ids, but for our own specials."""
    entries = json.loads(tokenizer.to_json())["added_tokens"]
    return {entry["content"]: entry["id"] for entry in entries if entry["content"] not in SPECIALS}
