"""min-dalle's detokenizer (Kuprel 2022): the decoder of DALL·E mini's VQGAN and its codebook, file `detoker.pt`.

It has no encoder. Its group norms have PyTorch's default epsilon, where the original has 1e-6. What it draws is in
[0, 1]; ours is in [-1, 1], so its last convolution is doubled and lowered by one.
"""

from collections.abc import Sequence
from pathlib import Path

from stage1_tokenizer.bottlenecks import VQConfig
from stage1_tokenizer.convert.vqgan import TAMING, Converted, read_vqgan, refuse_other_families
from tessera.config import Origin
from tessera.weights.foreign import Weights, find_files, one_checkpoint, read_tensors

FAMILY = "min-dalle-detoker"
NAMES = TAMING._replace(codebook="embedding.weight")


def read(sources: Sequence[Path]) -> Converted:
    """From `detoker.pt` or its folder."""
    found = find_files(sources, ("detoker.pt", "detoker*.pt"))
    file = one_checkpoint(found, "one checkpoint is needed, detoker.pt of kuprel/min-dalle or its folder")
    weights = Weights(read_tensors([file]), file.name)
    refuse_other_families(weights, FAMILY, NAMES.codebook)
    origin = Origin(
        family=FAMILY,
        project="kuprel/min-dalle",
        files=(weights.where,),
        code_licence="MIT",
        weights_licence="see the model page, kuprel/min-dalle",
    )
    bottleneck = VQConfig(codebook_size=weights.shape(NAMES.codebook)[0])
    config, state = read_vqgan(weights, NAMES, bottleneck, origin, norm_eps=1e-5)
    state["decoder.conv_out.weight"] *= 2
    state["decoder.conv_out.bias"] = 2 * state["decoder.conv_out.bias"] - 1
    return Converted(config, state)
