"""The image tokenizer inside Janus and Janus-Pro (Wu et al. 2024): LlamaGen's VQ-16, in two layouts.

The original layout has LlamaGen's names and compares codes on the unit sphere. transformers renames the modules, and
its port compares unnormalized latents and codes but decodes normalized ones: each layout here does what its reference
does, which is the same where the codes are equally long.
"""

from collections.abc import Sequence
from pathlib import Path

from stage1_tokenizer.bottlenecks import VQConfig
from stage1_tokenizer.convert import llamagen
from stage1_tokenizer.convert.vqgan import LARGEST_SIZE, TAMING, Converted, read_vqgan, refuse_other_families
from tessera.config import Origin
from tessera.errors import InputError
from tessera.weights.foreign import Weights, find_files, read_settings, read_tensors

FAMILY = "janus-vq"
TRANSFORMERS = TAMING._replace(low_first=True)
ORIGINAL_INSIDE = "gen_vision_model."
INSIDE = ("model.vqmodel.", "vqmodel.", ORIGINAL_INSIDE)  # of a whole Janus
FILES = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors", "*.bin")
IMAGE_SIZE = 384  # of all published ones


def read(sources: Sequence[Path]) -> Converted:
    """From the folder of a whole Janus, one or all of its weight files, or a checkpoint of the tokenizer alone."""
    found = [path for path in find_files(sources, FILES) if path.suffix != ".json" or ".index." in path.name]
    if not found:
        raise InputError("a checkpoint is needed: a Janus folder or its weight files, and none was found")
    tensors = read_tensors(found, keep=lambda name: name.startswith(INSIDE)) or read_tensors(found)
    prefix = next((start for start in INSIDE if any(name.startswith(start) for name in tensors)), "")
    inside = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    original = llamagen.NAMES.encoder_block.format(level=0, block=0) + ".conv1.weight" in inside
    where = found[0].name if len(found) == 1 else found[0].parent.name
    weights = Weights(inside, where, llamagen.IGNORED)
    names = llamagen.NAMES if original else TRANSFORMERS
    refuse_other_families(weights, FAMILY, names.encoder_block.format(level=0, block=0) + ".conv1.weight")
    origin = Origin(
        family=FAMILY,
        project="deepseek-ai/Janus",
        files=tuple(path.name for path in found),
        code_licence="MIT",
        weights_licence="DeepSeek Model License",
    )
    bottleneck = VQConfig(codebook_size=weights.shape(names.codebook)[0], normalize="both" if original else "lookup")
    config, state = read_vqgan(weights, names, bottleneck, origin, image_size=IMAGE_SIZE)
    patches = _patches(sources)
    size = patches * config.trunk.factor if patches else config.image_size
    if size > LARGEST_SIZE:
        raise InputError(f"config.json says {patches} codes a side, far more than any Janus has; get the file again")
    return Converted(config.model_copy(update={"image_size": size}), state)


def _patches(sources: Sequence[Path]) -> int | None:
    """Codes a side, from the `config.json` of the transformers layout."""
    for path in find_files(sources, ("config.json",)):
        if path.suffix == ".json":
            settings = read_settings(path)
            inner = settings.get("vq_config", settings)
            patches = inner.get("num_patches") if isinstance(inner, dict) else None
            return patches if isinstance(patches, int) and patches > 0 else None
    return None
