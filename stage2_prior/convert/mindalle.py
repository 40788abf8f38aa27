"""minDALL-E (Kakao Brain 2021) from its published archive: `1.3B.tar.gz`, or the folder it unpacks to.

It holds both stages, the text tokenizer and a `config.yaml` whose missing entries have defaults. Sizes are read from
the weights and compared with what the file says; it alone says the number of heads and which GELU is meant.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers

from stage1_tokenizer.convert.mindalle import read as read_tokenizer
from stage1_tokenizer.convert.vqgan import build as build_tokenizer
from stage2_prior.convert.base import Converted, bpe, build, check_vocabulary, finished, read_merges, read_vocabulary
from stage2_prior.imported.mindalle import MinDALLEConfig, MinDALLEPrior
from stage2_prior.sampling import Sampling
from tessera.config import Config, Origin, validate
from tessera.errors import InputError
from tessera.text import TextTokenizer
from tessera.weights.foreign import Weights, need, read_settings, read_tensors, section, unpacked

FAMILY = "mindalle"
PUBLISHED = (
    "minDALL-E is published as one archive, 1.3B.tar.gz (about 5 GB), at arena.kakaocdn.net/brainrepo/models/minDALL-E/"
    "57b008f02ceaa02b779c8b7463143315/1.3B.tar.gz: give it, or the folder 1.3B in it with config.yaml, "
    "stage1_last.ckpt, stage2_last.ckpt, tokenizer/bpe-16k-vocab.json and tokenizer/bpe-16k-merges.txt"
)
HEADS = 24  # where config.yaml does not say
NAMES = {
    "text_embedding": "tok_emb_txt",
    "text_position": "pos_emb_txt",
    "code_embedding": "tok_emb_img",
    "code_position": "pos_emb_img",
    "decoder.norm": "ln_f",
    "text_head": "head_txt",
    "code_head": "head_img",
}


class Settings(Config):
    """Everything is in the archive."""


def convert(sources: list[Path], settings: Mapping[str, Any]) -> Converted:
    validate(Settings, dict(settings), where="--set")
    with unpacked(sources) as places:
        prior_file = need(places, PUBLISHED, "stage2_last.ckpt", "*/stage2_last.ckpt")
        tokenizer_file = need(places, PUBLISHED, "stage1_last.ckpt", "*/stage1_last.ckpt")
        vocabulary = need(places, PUBLISHED, "tokenizer/bpe-16k-vocab.json", "*/tokenizer/bpe-16k-vocab.json")
        merges = need(places, PUBLISHED, "tokenizer/bpe-16k-merges.txt", "*/tokenizer/bpe-16k-merges.txt")
        yaml = need(places, PUBLISHED, "config.yaml", "*/config.yaml")
        text_tokenizer, padding = read_text_tokenizer(vocabulary, merges)
        weights = Weights(read_tensors([prior_file]), prior_file.name)
        prior = read(weights, read_settings(yaml), text_tokenizer, padding)
        config, tensors = read_tokenizer([tokenizer_file, yaml])
    size = prior.code_shape[1] * config.trunk.factor
    image_tokenizer = build_tokenizer(config.model_copy(update={"image_size": size}), tensors)
    return Converted(prior, image_tokenizer, Sampling(top_k=256))


def read(weights: Weights, settings: dict[str, Any], text_tokenizer: TextTokenizer, padding: int) -> MinDALLEPrior:
    """The prior in `weights`; `settings` are those of config.yaml, `padding` is the id of [PAD]."""
    given = section(settings, "stage2", "hparams")
    text_vocabulary, dim = weights.shape("tok_emb_txt.weight")
    codes, text_length = weights.shape("tok_emb_img.weight")[0], weights.shape("pos_emb_txt.weight")[0]
    length = weights.shape("pos_emb_img.weight")[0]
    depth = weights.count("blocks.{}.ln1.weight")
    stated = section(settings, "stage2") | given
    read_off = {
        "embed_dim": dim, "n_layers": depth, "ctx_len_img": length, "ctx_len_txt": text_length,
        "vocab_size_txt": text_vocabulary, "vocab_size_img": codes,
    }  # fmt: skip
    for key, value in read_off.items():
        if stated.get(key, value) != value:
            raise InputError(
                f"config.yaml says {key} {stated[key]}, but {weights.where} has {value}; "
                "give the files that belong together"
            )
    check_vocabulary(text_tokenizer, text_vocabulary)
    side = math.isqrt(length)
    config = MinDALLEConfig(
        codebook_size=codes,
        code_shape=(1, side, length // side),
        text_vocab_size=text_vocabulary,
        text_length=text_length,
        text_padding=padding,
        dim=dim,
        depth=depth,
        num_heads=given.get("n_heads", HEADS),
        mlp_dim=weights.shape("blocks.0.mlp.0.weight")[0],
        activation="gelu-sigmoid" if given.get("gelu_use_approx", False) else "gelu",
        attention_bias="blocks.0.attn.query.bias" in weights,
        mlp_bias="blocks.0.mlp.0.bias" in weights,
        text_tokenizer_fingerprint=text_tokenizer.fingerprint,
        origin=Origin(
            family=FAMILY,
            project="kakaobrain/minDALL-E",
            files=(weights.where,),
            code_licence="Apache-2.0",
            weights_licence="CC-BY-NC-SA-4.0",
        ),
    )
    names: dict[str, str | tuple[str, ...]] = dict(NAMES)
    for layer in range(depth):
        ours, theirs = f"decoder.blocks.{layer}", f"blocks.{layer}"
        names |= {
            f"{ours}.attention_norm": f"{theirs}.ln1",
            f"{ours}.mlp_norm": f"{theirs}.ln2",
            f"{ours}.attention.qkv": (f"{theirs}.attn.query", f"{theirs}.attn.key", f"{theirs}.attn.value"),
            f"{ours}.attention.out": f"{theirs}.attn.proj",
            f"{ours}.mlp_in": f"{theirs}.mlp.0",
            f"{ours}.mlp_out": f"{theirs}.mlp.2",
        }
    return build(MinDALLEPrior, config, weights, names, text_tokenizer)


def read_text_tokenizer(vocabulary: Path, merges: Path) -> tuple[TextTokenizer, int]:
    """Its lower-case character BPE, and the id of its [PAD]: words split as BERT does, `</w>` at their ends."""
    words = read_vocabulary(vocabulary)
    for special in ("[PAD]", "[UNK]"):
        if special not in words:
            raise InputError(f"{vocabulary} has no token {special}; give minDALL-E's bpe-16k-vocab.json")
    model = bpe(words, read_merges(merges), str(merges), unk_token="[UNK]", end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    # Accents are kept: the normalizer strips them only where it makes lower case itself.
    tokenizer.normalizer = normalizers.Sequence([normalizers.BertNormalizer(lowercase=False), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return finished(tokenizer), words["[PAD]"]
