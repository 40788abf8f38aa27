"""ruDALL-E (Sber AI 2021): Malevich v2 and v3, Emojich, Surrealist XL, Kandinsky; with its VAE and its `bpe.model`.

The weights of the prior do not say their version, nor their number of heads: both follow from the published sizes and
the file's name where they can, else they have to be given. All text is lower case.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from stage1_tokenizer.convert.rudalle import read as read_tokenizer
from stage1_tokenizer.convert.vqgan import build as build_tokenizer
from stage2_prior.convert.base import Converted, bpe, build, check_vocabulary, finished
from stage2_prior.imported.rudalle import END, PADDING, START, RuDALLEConfig, RuDALLEPrior
from stage2_prior.sampling import Sampling
from tessera.config import Config, Origin, validate
from tessera.errors import InputError
from tessera.files import read_lines
from tessera.text import TextTokenizer
from tessera.weights.containers import refuse_stand_in
from tessera.weights.foreign import Weights, need, read_tensors

FAMILY = "rudalle"
PUBLISHED = (
    "ruDALL-E is published on the hub: the prior as pytorch_model_v3.bin or pytorch_model_v2.bin of "
    "sberbank-ai/rudalle-Malevich, or pytorch_model.bin of sberbank-ai/rudalle-Emojich (--set version=v2), "
    "shonenkov-AI/rudalle-xl-surrealist or sberbank-ai/rudalle-Kandinsky (both --set version=v3); "
    "vqgan.gumbelf8-sber.model.ckpt is in sberbank-ai/rudalle-utils, bpe.model in shonenkov/rudalle-utils: give all "
    "three files, or a folder of them"
)
HEADS = {(24, 2048): 16, (64, 3840): 60}  # of the published ones by depth and width
UNKNOWN = 1  # of the text
IGNORED = r"transformer\.(row|col|conv)_mask$"  # made anew
SPACE = "\u2581"  # in front of each word


class Settings(Config):
    version: Literal["v2", "v3"] | None = None
    num_heads: int | None = Field(None, ge=1)


def convert(sources: list[Path], settings: Mapping[str, Any]) -> Converted:
    given = validate(Settings, dict(settings), where="--set")
    prior_file = need(sources, PUBLISHED, "pytorch_model*.bin", "*.bin", "*.safetensors", "*.pt")
    tokenizer_file = need(sources, PUBLISHED, "vqgan.gumbelf8-sber.model.ckpt", "*.ckpt")
    text_file = need(sources, PUBLISHED, "bpe.model", "*.model")
    text_tokenizer = read_text_tokenizer(text_file)
    weights = Weights(read_tensors([prior_file]), prior_file.name, IGNORED)
    prior = read(weights, given, text_tokenizer)
    config, tensors = read_tokenizer([tokenizer_file])
    size = prior.code_shape[1] * config.trunk.factor
    image_tokenizer = build_tokenizer(config.model_copy(update={"image_size": size}), tensors)
    return Converted(prior, image_tokenizer, Sampling(top_k=2048, top_p=0.995))


def read(weights: Weights, given: Settings, text_tokenizer: TextTokenizer) -> RuDALLEPrior:
    """The prior in `weights`, which lose some of their tensors to it."""
    text_vocabulary, dim = weights.shape("text_embeddings.weight")
    codes, side = weights.shape("image_embeddings.weight")[0], weights.shape("image_row_embeddings.weight")[0]
    text_length = weights.shape("text_pos_embeddings.weight")[0] - 1
    depth = weights.count("transformer.layers.{}.input_layernorm.weight")
    version = given.version or _version(weights.where)
    heads = given.num_heads or HEADS.get((depth, dim))
    if heads is None:
        raise InputError(
            f"{weights.where} has {depth} layers of width {dim}, which is none of the published sizes, and does not "
            "say how many heads it has; give their number with --set num_heads=N"
        )
    check_vocabulary(text_tokenizer, text_vocabulary - text_length)
    config = RuDALLEConfig(
        version=version,
        codebook_size=codes,
        code_shape=(1, side, side),
        text_vocab_size=text_vocabulary,
        text_length=text_length,
        dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_dim=weights.shape("transformer.layers.0.mlp.dense_h_to_4h.weight")[0],
        text_tokenizer_fingerprint=text_tokenizer.fingerprint,
        origin=Origin(
            family=FAMILY,
            project="ai-forever/ru-dalle",
            files=(weights.where,),
            code_licence="Apache-2.0",
            weights_licence="see the model page",
        ),
    )
    positions = text_length + (version == "v2")  # version 3 has no use for the last one
    weights.split("text_pos_embeddings.weight", [positions, text_length + 1 - positions], ["positions.weight", "spare"])
    weights.tensors.pop("spare")
    for kind in ("weight", "bias"):
        halves = [f"text_head.{kind}", f"code_head.{kind}"]
        weights.split(f"to_logits.1.{kind}", [text_vocabulary, codes], halves)
    names: dict[str, str | tuple[str, ...]] = {
        "text_embedding": "text_embeddings",
        "text_position": "positions",
        "code_embedding": "image_embeddings",
        "row_position": "image_row_embeddings",
        "column_position": "image_col_embeddings",
        "decoder.norm": "transformer.final_layernorm",
        "head_norm": "to_logits.0",
        "text_head": "text_head",
        "code_head": "code_head",
    }
    for layer in range(depth):
        ours, theirs = f"decoder.blocks.{layer}", f"transformer.layers.{layer}"
        names |= {
            f"{ours}.attention_norm": f"{theirs}.input_layernorm",
            f"{ours}.attention.qkv": f"{theirs}.attention.query_key_value",
            f"{ours}.attention.out": f"{theirs}.attention.dense",
            f"{ours}.attention_norm_out": f"{theirs}.before_first_addition_layernorm",
            f"{ours}.mlp_norm": f"{theirs}.post_attention_layernorm",
            f"{ours}.mlp_in": f"{theirs}.mlp.dense_h_to_4h",
            f"{ours}.mlp_out": f"{theirs}.mlp.dense_4h_to_h",
            f"{ours}.mlp_norm_out": f"{theirs}.before_second_addition_layernorm",
        }
    return build(RuDALLEPrior, config, weights, names, text_tokenizer)


def _version(file: str) -> Literal["v2", "v3"]:
    if "v3" in file:
        return "v3"
    if "v2" in file:
        return "v2"
    raise InputError(
        f"{file} does not say which version it is: give --set version=v2 for Emojich and Malevich v2, "
        "--set version=v3 for Malevich v3, Surrealist XL and Kandinsky"
    )


def read_text_tokenizer(path: Path) -> TextTokenizer:
    """A model of YouTokenToMe: lines of numbers, which are characters, merges and special ids, in this order."""
    refuse_stand_in(path)
    try:
        lines = [[int(number) for number in line.split()] for line in read_lines(path)]
        characters, merges = lines[0]
        letters = {i: chr(point) for point, i in lines[1 : characters + 1]}
        rules = [(left, right, new) for left, right, new in lines[characters + 1 : characters + merges + 1]]
        (specials,) = lines[characters + merges + 1 :]
    except (ValueError, OverflowError, IndexError):
        raise InputError(f"{path} is not a text model of YouTokenToMe; give bpe.model of ruDALL-E") from None
    if specials != [UNKNOWN, PADDING, START, END]:
        raise InputError(f"{path} has unknown, padding, start and end as {specials}, but ruDALL-E's are 1, 0, 2 and 3")
    words = {"<PAD>": PADDING, "<UNK>": UNKNOWN, "<BOS>": START, "<EOS>": END}
    words |= {letter: i for i, letter in letters.items()}
    pieces, pairs = dict(letters), []
    for left, right, new in rules:
        if left not in pieces or right not in pieces or pieces[left] + pieces[right] in words:
            raise InputError(f"{path}: the merge of {left} and {right} to {new} is not of BPE; get the file again")
        pieces[new] = pieces[left] + pieces[right]
        words[pieces[new]] = new
        pairs.append((pieces[left], pieces[right]))
    tokenizer = Tokenizer(bpe(words, pairs, str(path), unk_token="<UNK>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"[ \t\n\x0b\f\r{SPACE}]+"), behavior="removed"),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=False),
        ]
    )
    return finished(tokenizer)
