"""LlamaGen's priors (Sun et al. 2024), by text (`t2i_*.pt`) and by class (`c2i_*.pt`), with their VQ-16 (`vq_ds*.pt`).

The weights say neither how many heads there are nor how large an image is: the first follows from the published sizes,
the second from the file's name, and where they do not they have to be given. The T5 that the former reads text with is
named in the config, and found when the first text comes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from stage1_tokenizer import Autoencoder
from stage1_tokenizer.convert.llamagen import read as read_tokenizer
from stage1_tokenizer.convert.vqgan import LARGEST_SIZE
from stage1_tokenizer.convert.vqgan import build as build_tokenizer
from stage2_prior.convert.base import Converted, build, one_file
from stage2_prior.imported.llamagen import LlamaGenConfig, LlamaGenPrior
from stage2_prior.imported.t5 import FILES
from stage2_prior.sampling import Sampling
from tessera.config import Config, Origin, validate
from tessera.errors import InputError
from tessera.weights.foreign import Weights, read_settings, read_tensors

FAMILY = "llamagen"
PUBLISHED = (
    "LlamaGen is published on the hub: by text t2i_XL_stage1_256.pt or t2i_XL_stage2_512.pt with vq_ds16_t2i.pt, all "
    "in peizesun/llamagen_t2i; by class c2i_B_256.pt, c2i_B_384.pt, c2i_L_256.pt, c2i_L_384.pt, c2i_XL_384.pt, "
    "c2i_XXL_384.pt or c2i_3B_384.pt with vq_ds16_c2i.pt, all in FoundationVision/LlamaGen: give one of each, the "
    f"prior and its tokenizer; text is read with google/flan-t5-xl ({FILES}), from the hub or --set text_encoder=FOLDER"
)
HEADS = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1536): 24, (24, 3200): 32}  # of the published ones
FACTOR = 16  # pixels a side for a code, where the tokenizer is not among the sources
IGNORED = r".*\.kv_cache\.|freqs_cis$|causal_mask$"  # left from drawing
NAMES = {
    "class_embedding": "cls_embedding.embedding_table",
    "null_features": "cls_embedding.uncond_embedding",
    "feature_in": "cls_embedding.cap_proj.fc1",
    "feature_out": "cls_embedding.cap_proj.fc2",
    "code_embedding": "tok_embeddings",
    "decoder.norm": "norm",
    "code_head": "output",
}


class Settings(Config):
    num_heads: int | None = Field(None, ge=1)
    image_size: int | None = Field(None, ge=1)  # pixels a side
    text_encoder: str = "google/flan-t5-xl"


def convert(sources: list[Path], settings: Mapping[str, Any]) -> Converted:
    given = validate(Settings, dict(settings), where="--set")
    tokenizer_file = one_file(sources, PUBLISHED, "vq_ds*.pt", optional=True)
    priors = [source for source in sources if source != tokenizer_file]
    prior_file = one_file(priors, PUBLISHED, "[tc]2i_*.pt", "*.pt", "*.ckpt", "*.safetensors", "*.bin")
    assert prior_file is not None
    tokenizer, factor = None, FACTOR
    if tokenizer_file is not None:
        tokenizer = read_tokenizer([tokenizer_file])
        factor = tokenizer.config.trunk.factor
    side = _image_size(prior_file.name, given, factor) // factor
    prior = read(Weights(read_tensors([prior_file]), prior_file.name, IGNORED), given, side)
    image_tokenizer: Autoencoder | None = None
    if tokenizer is not None:
        config = tokenizer.config.model_copy(update={"image_size": side * factor})
        image_tokenizer = build_tokenizer(config, tokenizer.weights)
    by_text = prior.condition == "text"
    sampling = Sampling(guidance_scale=7.5, top_k=1000) if by_text else Sampling(guidance_scale=4.0, top_k=2000)
    return Converted(prior, image_tokenizer, sampling)


def read(weights: Weights, given: Settings, side: int) -> LlamaGenPrior:
    """The prior in `weights`, which draws `side` x `side` codes."""
    codes, dim = weights.shape("tok_embeddings.weight")
    depth = weights.count("layers.{}.attention_norm.weight")
    heads = given.num_heads or HEADS.get((depth, dim))
    if heads is None:
        raise InputError(
            f"{weights.where} has {depth} layers of width {dim}, which is none of the published sizes, and does not "
            "say how many heads it has; give their number with --set num_heads=N"
        )
    if dim % heads:
        raise InputError(f"{weights.where} is {dim} wide, which {heads} heads do not divide; check --set num_heads")
    shared = (weights.shape("layers.0.attention.wqkv.weight")[0] - dim) // 2  # width of all keys
    by_text = "cls_embedding.uncond_embedding" in weights
    text_length, feature_dim = weights.shape("cls_embedding.uncond_embedding") if by_text else (None, None)
    config = LlamaGenConfig(
        codebook_size=codes,
        code_shape=(1, side, side),
        num_classes=None if by_text else weights.shape("cls_embedding.embedding_table.weight")[0] - 1,
        feature_dim=feature_dim,
        text_length=text_length,
        text_encoder=_text_encoder(given.text_encoder, feature_dim) if feature_dim else None,
        dim=dim,
        depth=depth,
        num_heads=heads,
        num_kv_heads=shared // (dim // heads),
        mlp_dim=weights.shape("layers.0.feed_forward.w1.weight")[0],
        origin=Origin(
            family=FAMILY,
            project="FoundationVision/LlamaGen",
            files=(weights.where,),
            code_licence="MIT",
            weights_licence="MIT",
        ),
    )
    names: dict[str, str | tuple[str, ...]] = dict(NAMES)
    for layer in range(depth):
        ours, theirs = f"decoder.blocks.{layer}", f"layers.{layer}"
        names |= {
            f"{ours}.attention_norm": f"{theirs}.attention_norm",
            f"{ours}.attention.qkv": f"{theirs}.attention.wqkv",
            f"{ours}.attention.out": f"{theirs}.attention.wo",
            f"{ours}.mlp_norm": f"{theirs}.ffn_norm",
            f"{ours}.mlp_in": (f"{theirs}.feed_forward.w1", f"{theirs}.feed_forward.w3"),
            f"{ours}.mlp_out": f"{theirs}.feed_forward.w2",
        }
    return build(LlamaGenPrior, config, weights, names, None)


def _image_size(file: str, given: Settings, factor: int) -> int:
    """Pixels a side: given, or the number at the end of the file's name. Raises InputError for what cannot be."""
    named = re.search(r"_(\d+)\.\w+$", file)
    size = given.image_size or (int(named[1]) if named else None)
    if size is None:
        raise InputError(f"{file} does not say how large its pictures are; give --set image_size=256, 384 or 512")
    if size % factor or not factor <= size <= LARGEST_SIZE:
        raise InputError(
            f"image_size must be a multiple of the {factor} pixels a side of a code, at most {LARGEST_SIZE}, got {size}"
        )
    return size


def _text_encoder(name: str, feature_dim: int) -> str:
    """The hub name, or the whole path of a local folder. Raises InputError when the T5 in it has another width."""
    folder = Path(name)
    if not folder.is_dir():
        if len(folder.parts) != 2 or folder.is_absolute():
            raise InputError(f"text_encoder must be a folder or a hub name like google/flan-t5-xl, got {name}")
        return name
    config = folder / "config.json"
    width = read_settings(config).get("d_model") if config.is_file() else None
    if width != feature_dim:
        raise InputError(
            f"{folder} holds no T5 with features of {feature_dim} channels, which this prior reads; "
            f"give the folder of google/flan-t5-xl ({FILES})"
        )
    return str(folder.resolve())
