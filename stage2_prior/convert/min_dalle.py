"""DALL·E mini and mega (Dayma et al. 2021) in min-dalle's layout (Kuprel 2022), with text tokenizer and detokenizer.

Norms that were trained without a scale have no weight in the files; it is one. The decoder's tables have more rows than
there are codes: one is the start token, the others are never drawn and are left out. Our own specials take their rows
of the text's table from BART's.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from stage1_tokenizer.convert.min_dalle import read as read_tokenizer
from stage1_tokenizer.convert.vqgan import build as build_tokenizer
from stage2_prior.bart import BartConfig, BartPrior
from stage2_prior.convert.base import Converted, bpe, build, check_vocabulary, finished, read_merges, read_vocabulary
from stage2_prior.sampling import Sampling
from tessera.config import Config, Origin, validate
from tessera.errors import InputError
from tessera.text import SPECIALS, TextTokenizer
from tessera.weights.foreign import Weights, need, pick, read_tensors

FAMILY = "min-dalle"
PUBLISHED = (
    "DALL·E mini and mega are published on the hub in kuprel/min-dalle: give the five files encoder.pt, decoder.pt, "
    "vocab.json, merges.txt and detoker.pt for mega, or encoder_mini.pt, decoder_mini.pt, vocab_mini.json, "
    "merges_mini.txt and detoker.pt for mini, or a folder of them"
)
HEAD_DIM = 64  # of both published sizes, where --set does not say
BART = {"<pad>": 1, "<start>": 0, "<end>": 2}  # our specials in its vocabulary: <pad>, <s>, </s>
UNSCALED = (  # norms
    "final_ln",
    "layers.{}.pre_self_attn_layer_norm",
    "layers.{}.pre_encoder_attn_layer_norm",
    "layers.{}.glu.ln0",
    "layers.{}.glu.ln1",
)
SPACE = "\u0120"  # in front of each word


class Settings(Config):
    num_heads: int | None = Field(None, ge=1)
    start: int | None = Field(None, ge=0)  # row of the start token; later versions of min-dalle start from 16383


def convert(sources: list[Path], settings: Mapping[str, Any]) -> Converted:
    given = validate(Settings, dict(settings), where="--set")
    mini = pick(sources, "encoder_mini.pt") is not None
    if mini and pick(sources, "encoder.pt") is not None:
        raise InputError("both DALL·E mini and mega are there; give the files of one of them")
    suffix = "_mini" if mini else ""
    files = [need(sources, PUBLISHED, f"{half}{suffix}.pt") for half in ("encoder", "decoder")]
    vocabulary, merges = (
        need(sources, PUBLISHED, f"vocab{suffix}.json"),
        need(sources, PUBLISHED, f"merges{suffix}.txt"),
    )
    detoker = need(sources, PUBLISHED, "detoker.pt")
    encoder, decoder = (Weights(read_tensors([path]), path.name) for path in files)
    config, tensors = read_tokenizer([detoker])
    size = math.isqrt(decoder.shape("embed_positions.weight")[0]) * config.trunk.factor
    image_tokenizer = build_tokenizer(config.model_copy(update={"image_size": size}), tensors)
    text_tokenizer = read_text_tokenizer(vocabulary, merges)
    prior = read(encoder, decoder, image_tokenizer.codebook_size, given, text_tokenizer)
    return Converted(prior, image_tokenizer, Sampling(top_k=256, guidance_scale=16))


def read(encoder: Weights, decoder: Weights, codes: int, given: Settings, text_tokenizer: TextTokenizer) -> BartPrior:
    """The prior in both; `codes` is the size of the codebook that it draws for."""
    text_vocabulary, dim = encoder.shape("embed_tokens.weight")
    rows, positions = decoder.shape("embed_tokens.weight")[0], decoder.shape("embed_positions.weight")[0]
    side = math.isqrt(positions)
    start = rows - 1 if given.start is None else given.start
    if rows <= max(codes, start):
        raise InputError(
            f"{decoder.where} has {rows} rows for codes, too few for the detokenizer's {codes} and the start token "
            f"{start}; give the files of one model"
        )
    check_vocabulary(text_tokenizer, text_vocabulary)
    config = BartConfig(
        codebook_size=codes,
        code_shape=(1, side, positions // side),
        text_vocab_size=text_vocabulary + len(SPECIALS),
        text_length=encoder.shape("embed_positions.weight")[0],
        dim=dim,
        encoder_depth=encoder.count("layers.{}.self_attn.q_proj.weight"),
        depth=decoder.count("layers.{}.self_attn.q_proj.weight"),
        num_heads=given.num_heads or _heads(dim, encoder.where),
        mlp_dim=decoder.shape("layers.0.glu.fc0.weight")[0],
        spell_emoji=True,
        text_tokenizer_fingerprint=text_tokenizer.fingerprint,
        origin=Origin(
            family=FAMILY,
            project="kuprel/min-dalle",
            files=(encoder.where, decoder.where),
            code_licence="MIT",
            weights_licence="see the model page, kuprel/min-dalle",
        ),
    )
    both = {
        f"{half}.{name}": tensor for half, w in (("e", encoder), ("d", decoder)) for name, tensor in w.tensors.items()
    }
    weights = Weights(both, f"{encoder.where} with {decoder.where}")
    for half, depth in (("e", config.encoder_depth), ("d", config.depth)):
        for name in (f"{half}.{norm.format(layer)}" for norm in UNSCALED for layer in range(depth)):
            if f"{name}.bias" in weights and f"{name}.weight" not in weights:
                weights.tensors[f"{name}.weight"] = torch.ones(weights.shape(f"{name}.bias"))
    text = weights.tensors["e.embed_tokens.weight"]
    weights.tensors["specials"] = text[[BART[special] for special in SPECIALS]]
    table, head = weights.tensors.pop("d.embed_tokens.weight"), weights.tensors.pop("d.lm_head.weight", None)
    if head is None or head.shape != table.shape:
        raise InputError(
            f"{decoder.where} needs lm_head.weight of the shape {tuple(table.shape)} of embed_tokens.weight"
        )
    weights.tensors |= {"codes": table[:codes], "start": table[start], "head": head[:codes]}
    return build(BartPrior, config, weights, _names(config), text_tokenizer)


def _heads(dim: int, where: str) -> int:
    if dim % HEAD_DIM:
        raise InputError(
            f"{where} does not say how many heads it has, and its width {dim} is none of the published ones; "
            "give their number with --set num_heads=N"
        )
    return dim // HEAD_DIM


def _names(config: BartConfig) -> dict[str, str | tuple[str, ...]]:
    names: dict[str, str | tuple[str, ...]] = {
        "text_embedding.weight": ("specials", "e.embed_tokens.weight"),
        "text_position": "e.embed_positions",
        "text_norm": "e.layernorm_embedding",
        "encoder.norm": "e.final_ln",
        "start": "start",
        "code_embedding.weight": "codes",
        "code_position": "d.embed_positions",
        "code_norm": "d.layernorm_embedding",
        "decoder.norm": "d.final_ln",
        "head.weight": "head",
    }
    for layer in range(config.encoder_depth):
        names |= _block(f"encoder.blocks.{layer}", f"e.layers.{layer}")
    for layer in range(config.depth):
        names |= _block(f"decoder.blocks.{layer}", f"d.layers.{layer}") | _cross(layer)
    return names


def _block(ours: str, theirs: str) -> dict[str, str | tuple[str, ...]]:
    return {
        f"{ours}.attention_norm": f"{theirs}.pre_self_attn_layer_norm",
        f"{ours}.attention.qkv": tuple(f"{theirs}.self_attn.{part}_proj" for part in "qkv"),
        f"{ours}.attention.out": f"{theirs}.self_attn.out_proj",
        f"{ours}.attention_norm_out": f"{theirs}.self_attn_layer_norm",
        f"{ours}.mlp_norm": f"{theirs}.glu.ln0",
        f"{ours}.mlp_in": (f"{theirs}.glu.fc0", f"{theirs}.glu.fc1"),
        f"{ours}.mlp_hidden_norm": f"{theirs}.glu.ln1",
        f"{ours}.mlp_out": f"{theirs}.glu.fc2",
    }


def _cross(layer: int) -> dict[str, str | tuple[str, ...]]:
    ours, theirs = f"decoder.blocks.{layer}", f"d.layers.{layer}"
    names: dict[str, str | tuple[str, ...]] = {
        f"{ours}.cross.{part}": f"{theirs}.encoder_attn.{part}_proj" for part in ("q", "k", "v", "out")
    }
    return names | {
        f"{ours}.cross_norm": f"{theirs}.pre_encoder_attn_layer_norm",
        f"{ours}.cross_norm_out": f"{theirs}.encoder_attn_layer_norm",
    }


def read_text_tokenizer(vocabulary: Path, merges: Path) -> TextTokenizer:
    """BART's BPE as min-dalle reads it: lower-case ASCII, words between spaces, unknown pieces as <unk>."""
    words = read_vocabulary(vocabulary)
    if [words.get(token) for token in ("<pad>", "<s>", "</s>")] != [BART[special] for special in SPECIALS]:
        raise InputError(f"{vocabulary} must have <s>, <pad> and </s> as ids 0, 1 and 2; give that of min-dalle")
    if "<unk>" not in words:
        raise InputError(f"{vocabulary} has no token <unk>; give that of min-dalle")
    tokenizer = Tokenizer(bpe(words, read_merges(merges), str(merges), unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\x00-\x7f]"), "")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(" +"), behavior="removed"),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=False),
        ]
    )
    return finished(tokenizer)
