"""taming-transformers' priors (Esser et al. 2021), by class and by segmentation map, from Lightning checkpoints.

A checkpoint holds the transformer, the image tokenizer (`first_stage_model`) and, where it draws from maps, the
tokenizer of these (`cond_stage_model`). Sizes are read from the weights; the YAML beside it says how many heads and
classes there are and how large an image is.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor

from stage1_tokenizer.bottlenecks import GumbelConfig, VQConfig
from stage1_tokenizer.convert.taming import IBQ_INSTEAD, is_ibq, model_settings, read_taming
from stage1_tokenizer.convert.taming import IGNORED as TOKENIZER_IGNORED
from stage1_tokenizer.convert.vqgan import Converted as ConvertedTokenizer
from stage1_tokenizer.convert.vqgan import build as build_tokenizer
from stage2_prior.convert.base import Converted, build, one_file
from stage2_prior.imported.taming import TamingConfig, TamingPrior
from stage2_prior.sampling import Sampling
from tessera.config import Config, Origin, validate
from tessera.errors import InputError
from tessera.weights.containers import matching
from tessera.weights.foreign import Weights, pick_settings, read_tensors, section

FAMILY = "taming"
PUBLISHED = (
    "taming-transformers' priors are published as folders with checkpoints/last.ckpt and configs/*-project.yaml, "
    "linked in the table of github.com/CompVis/taming-transformers: by class cin_transformer (ImageNet), "
    "k00.fr/s511rwcv; by segmentation map sflckr, heibox.uni-heidelberg.de/d/73487ab6e5314cb5adba, coco_transformer, "
    "k00.fr/2zz6i2ce, and ade20k_transformer, k00.fr/ot46cksa: give the folder, or both files"
)
PARTS = ("transformer.", "first_stage_model.", "cond_stage_model.")
CHECKPOINTS = (
    "checkpoints/last.ckpt",
    "ckpts/last.ckpt",
    "*.ckpt",
    "checkpoints/*.ckpt",
    "*.safetensors",
    "*.bin",
    "*.pt",
)
SETTINGS = ("configs/*project.yaml", "*project.yaml", "configs/*.yaml", "*.yaml", "*.yml")
MASK = r"blocks\.\d+\.attn\.mask$"


class Settings(Config):
    num_heads: int | None = Field(None, ge=1)
    num_classes: int | None = Field(None, ge=1)


def convert(sources: list[Path], settings: Mapping[str, Any]) -> Converted:
    given = validate(Settings, dict(settings), where="--set")
    file = one_file(sources, PUBLISHED, *CHECKPOINTS)
    assert file is not None
    yamls = [path for pattern in SETTINGS for source in sources for path in matching(source, pattern)]
    params = _describes(pick_settings(yamls, _describes))
    tensors = read_tensors([file])
    unknown = sorted(name for name in tensors if not name.startswith(PARTS))
    if unknown:
        raise InputError(
            f"{file.name} is not a checkpoint of {FAMILY}: its weight '{unknown[0]}' is of none of "
            f"{', '.join(part + '*' for part in PARTS)}; give a Net2NetTransformer's checkpoint"
        )
    transformer, images, maps = (_inside(tensors, part) for part in PARTS)
    image_tokenizer = _tokenizer(images, file.name, section(params, "first_stage_config"), channels=3)
    segmentation_tokenizer = None
    if maps:
        weights = Weights(maps, file.name)
        labels = weights.shape("encoder.conv_in.weight")[1]
        if labels <= 3:  # drin draws from depth
            raise InputError(
                f"{file.name} draws from pictures of {labels} channels, not from segmentation maps; only priors by "
                "class or by segmentation map can be converted"
            )
        segmentation_tokenizer = _tokenizer(maps, file.name, section(params, "cond_stage_config"), channels=labels)
    prior = read(transformer, file.name, given, params, image_tokenizer, segmentation_tokenizer)
    maps_tokenizer = None
    if segmentation_tokenizer is not None:
        maps_tokenizer = build_tokenizer(*segmentation_tokenizer)
        fingerprint = {"segmentation_tokenizer_fingerprint": maps_tokenizer.fingerprint}
        prior.config = prior.config.model_copy(update=fingerprint)
    sampling = Sampling(top_k=600, top_p=0.92) if maps_tokenizer is None else Sampling(top_k=100)
    return Converted(prior, build_tokenizer(*image_tokenizer), sampling, maps_tokenizer)


def _describes(settings: dict[str, Any]) -> dict[str, Any]:
    """What settings say of a transformer and its tokenizers, empty where that is nothing."""
    params = section(settings, "model", "params")
    return params if any(name.endswith("_config") for name in params) else {}


def read(
    tensors: dict[str, Tensor],
    where: str,
    given: Settings,
    params: dict[str, Any],
    images: ConvertedTokenizer,
    maps: ConvertedTokenizer | None,
) -> TamingPrior:
    """The prior in `tensors`; `params` are those of the YAML's model, empty without one."""
    weights = Weights(tensors, where, MASK)
    vocabulary, dim = weights.shape("tok_emb.weight")
    depth = weights.count("blocks.{}.ln1.weight")
    heads = given.num_heads or section(params, "transformer_config", "params").get("n_head")
    if not isinstance(heads, int):
        raise InputError(
            f"{where} does not say how many heads it has; give the YAML published with it, or --set num_heads=N"
        )
    classes = None if maps is not None else given.num_classes or _classes(params, where)
    masks = [tensor for name, tensor in tensors.items() if re.match(MASK, name)]
    ahead = int(masks[0].flatten(0, 2)[0].sum()) if masks else 1  # what the first position sees
    weights.tensors["position"] = weights.tensors.get("pos_emb", weights.tensors["tok_emb.weight"][None])[0]
    weights.shape("pos_emb")
    del weights.tensors["pos_emb"]
    config = TamingConfig(
        codebook_size=_codes(images),
        code_shape=_code_shape(images),
        num_classes=classes,
        segmentation_shape=_code_shape(maps) if maps is not None else None,
        vocab_size=vocabulary,
        positions=weights.shape("position")[0],
        looks_ahead=ahead if ahead > 1 else 0,
        dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_dim=weights.shape("blocks.0.mlp.0.weight")[0],
        origin=_origin(where),
    )
    names: dict[str, str | tuple[str, ...]] = {
        "embedding": "tok_emb",
        "position": "position",
        "decoder.norm": "ln_f",
        "head": "head",
    }
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
    return build(TamingPrior, config, weights, names, None)


def _inside(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}


def _tokenizer(tensors: dict[str, Tensor], where: str, stage: dict[str, Any], channels: int) -> ConvertedTokenizer:
    """A VQGAN inside the checkpoint; `stage` is its part of the YAML."""
    if is_ibq({"model": stage}):
        raise InputError(f"the tokenizer inside {where} is {IBQ_INSTEAD}")
    weights = Weights(tensors, where, TOKENIZER_IGNORED)
    return read_taming(weights, FAMILY, _origin(where), model_settings({"model": stage}), image_channels=channels)


def _origin(where: str) -> Origin:
    return Origin(
        family=FAMILY,
        project="CompVis/taming-transformers",
        files=(where,),
        code_licence="MIT",
        weights_licence="none stated apart from the code's",
    )


def _code_shape(tokenizer: ConvertedTokenizer) -> tuple[int, int, int]:
    side = tokenizer.config.image_size // tokenizer.config.factor
    return 1, side, side


def _codes(tokenizer: ConvertedTokenizer) -> int:
    bottleneck = tokenizer.config.bottleneck
    assert isinstance(bottleneck, VQConfig | GumbelConfig)  # what taming's checkpoints are read as
    return bottleneck.codebook_size


def _classes(params: dict[str, Any], where: str) -> int:
    """From the YAML. Raises InputError when the prior draws from something else, or there is none."""
    condition = params.get("cond_stage_config")
    target = str(condition.get("target", "")) if isinstance(condition, dict) else str(condition or "")
    if target and not target.endswith("Labelator"):
        raise InputError(
            f"{where} draws from {params.get('cond_stage_key', 'something')} ({target}); only priors by class or by "
            "segmentation map can be converted"
        )
    classes = section(params, "cond_stage_config", "params").get("n_classes")
    if not isinstance(classes, int):
        raise InputError(
            f"{where} does not say how many classes it knows; give the YAML published with it, or --set num_classes=N"
        )
    return classes
