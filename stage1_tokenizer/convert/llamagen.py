"""LlamaGen's VQ-8 and VQ-16 (Sun et al. 2024): codes are compared on the unit sphere; files `vq_ds*.pt`."""

from collections.abc import Sequence
from pathlib import Path

from stage1_tokenizer.bottlenecks import VQConfig
from stage1_tokenizer.convert.vqgan import Converted, Names, read_vqgan, refuse_other_families
from tessera.config import Origin
from tessera.weights.foreign import Weights, find_files, one_checkpoint, read_tensors

FAMILY = "llamagen-vq"
NAMES = Names(
    encoder_block="encoder.conv_blocks.{level}.res.{block}",
    encoder_attention="encoder.conv_blocks.{level}.attn.{block}",
    downsample="encoder.conv_blocks.{level}.downsample.conv",
    decoder_block="decoder.conv_blocks.{level}.res.{block}",
    decoder_attention="decoder.conv_blocks.{level}.attn.{block}",
    upsample="decoder.conv_blocks.{level}.upsample.conv",
    low_first=True,
    middle=("mid.0", "mid.1", "mid.2"),
)
IGNORED = r"quantize\.codebook_used"  # a statistic of training


def read(sources: Sequence[Path]) -> Converted:
    """From a `vq_ds*.pt` file or the folder of one."""
    found = find_files(sources, ("vq_ds*.pt", "*.pt", "*.safetensors", "*.bin"))
    file = one_checkpoint(found, "one checkpoint is needed, such as vq_ds16_c2i.pt")
    weights = Weights(read_tensors([file]), file.name, IGNORED)
    refuse_other_families(weights, FAMILY, NAMES.encoder_block.format(level=0, block=0) + ".conv1.weight")
    origin = Origin(
        family=FAMILY,
        project="FoundationVision/LlamaGen",
        files=(weights.where,),
        code_licence="MIT",
        weights_licence="MIT",
    )
    bottleneck = VQConfig(codebook_size=weights.shape(NAMES.codebook)[0], normalize="both")
    return read_vqgan(weights, NAMES, bottleneck, origin)
