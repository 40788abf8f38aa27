"""The shipped tokenizer reads and writes what it did before: codes and 8-bit images, recorded with release 0.1.0.

On the machine that recorded them all are equal; another processor's rounding may change a few.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import pipelines
from stage1_tokenizer import Autoencoder

BUNDLE = Path(pipelines.__file__).parent / "bundles" / "emoji"
GOLDEN = Path(__file__).parent / "golden" / "shipped_tokenizer.safetensors"
MOVED = 0.005  # of the codes


def waves(side: int) -> Tensor:
    """(1, 3, side, side) in [-1, 1]: smooth, fine and sharp."""
    y, x = torch.arange(side)[:, None] / 64, torch.arange(side) / 64
    colours = [torch.sin(5 * x + 9 * y), torch.sin(40 * x * y), torch.sign(torch.sin(17 * x) * torch.sin(13 * y))]
    return torch.stack(colours).unsqueeze(0)


@pytest.mark.parametrize(("name", "side", "step"), [("small", 64, 1), ("large", 256, 4)])
def test_codes_and_images_are_those_of_before(name: str, side: int, step: int) -> None:
    golden = load_file(GOLDEN)
    model = Autoencoder.from_pretrained(BUNDLE / "image_tokenizer")
    codes = golden[f"{name}_codes"].long()
    assert float((model.encode(waves(side)) != codes).float().mean()) <= MOVED
    pixels = ((model.decode(codes) + 1) * 127.5).round()[..., ::step, ::step]
    assert float((pixels - golden[f"{name}_pixels"]).abs().max()) <= 1
