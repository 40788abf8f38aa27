"""3x3 convolutions with a quarter of the products, on CPUs: Winograd's F(4x4, 3x3) (Lavin & Gray 2016, section 4.1).

Each 4 x 4 block of outputs is made of a 6 x 6 block of inputs: both sides are brought to 36 numbers in which the
convolution is 36 products instead of 144, channel by channel a matrix product that BLAS does at full speed. The rest is
sums, done for some rows of blocks at a time so that they stay in the processor's cache.

Rounding is several times that of the plain convolution (5e-5 instead of 1e-5 for outputs of size 1), which pictures do
not show and codes might: decoders use it, encoders never. Only float32 inference at many pixels gains; everything else,
training and bfloat16 among it, is the plain convolution.

Letters: B batch, C channels in, D channels out, H W pixels, n blocks a column, m blocks a row.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_PIXELS = 64 * 64  # below, bringing the weights there costs more than it saves
ROWS = 8  # of blocks at a time
WEIGHTS = (  # the paper's G: three weights to six numbers
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


class WinogradConv2d(nn.Conv2d):
    """A convolution of 3 x 3 with padding 1; the same parameters and, up to rounding, the same result."""

    def __init__(self, width_in: int, width: int, kernel_size: int = 3, padding: int = 1) -> None:
        assert (kernel_size, padding) == (3, 1)
        super().__init__(width_in, width, kernel_size, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        gains = (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and height * width >= FEWEST_PIXELS
            and height % 4 == width % 4 == 0
        )
        if not gains:
            return super().forward(x)
        assert self.bias is not None
        return convolve(x, self.weight, self.bias)


def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, C, H, W), (D, C, 3, 3), (D,) -> (B, D, H, W), H and W divisible by 4; channels last. Picture by picture, so
    that each comes out the same in any company.
    """
    rule = weight.new_tensor(WEIGHTS)
    kernels = torch.einsum("ij,dcjk,lk->ilcd", rule, weight, rule).flatten(0, 1).contiguous()  # (36, C, D)
    padded = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (B, H + 2, W + 2, C)
    batch, _, height, width = x.shape
    out = x.new_empty(batch, height // 4, 4, width // 4, 4, len(bias))  # (B, n, 4, m, 4, D)
    for picture, blocks in zip(padded, out, strict=True):
        _picture(picture, kernels, bias, blocks)
    return out.view(batch, height, width, len(bias)).permute(0, 3, 1, 2)


def _picture(padded: Tensor, kernels: Tensor, bias: Tensor, out: Tensor) -> None:
    """Fills `out` (n, 4, m, 4, D) with the convolution of one picture (H + 2, W + 2, C)."""
    blocks, _, across, _, wide = out.shape
    width, channels = padded.shape[1:]
    rows = min(ROWS, blocks)
    # All that is between is written to the same memory again and again: fresh memory costs more than the sums.
    half = padded.new_empty(6, rows, width, channels)
    numbers = padded.new_empty(6, 6, rows, across, channels)
    products = padded.new_empty(36, rows * across, wide)
    columns = padded.new_empty(4, 6, rows, across, wide)
    for first in range(0, blocks, rows):
        k = min(rows, blocks - first)
        strip = padded[4 * first : 4 * (first + k) + 2]
        _forth([strip[i : i + 4 * k - 3 : 4] for i in range(6)], half[:, :k])
        part = half[:, :k]
        _forth([part[:, :, i : i + 4 * across - 3 : 4] for i in range(6)], numbers[:, :, :k].transpose(0, 1))
        multiplied = products[:, : k * across]
        torch.bmm(numbers[:, :, :k].reshape(36, k * across, channels), kernels, out=multiplied)
        _back(multiplied.view(6, 6, k, across, wide), columns[:, :, :k])
        target = out[first : first + k]
        _back(columns[:, :, :k].transpose(0, 1), target.permute(3, 1, 0, 2, 4))
        target.add_(bias)


def _forth(d: Sequence[Tensor], out: Tensor) -> None:
    """The paper's B' along one side: six neighbours -> six numbers, into `out` (6, ...)."""
    even, odd = d[4] - d[2], d[3] - d[1]
    torch.sub(d[0], d[2], out=out[0]).mul_(4).add_(even)  # 4 d0 - 5 d2 + d4
    torch.sub(d[5], d[3], out=out[5]).sub_(odd, alpha=4)  # 4 d1 - 5 d3 + d5
    torch.add(even, odd, alpha=2, out=out[3])
    torch.sub(even, odd, alpha=2, out=out[4])
    torch.sub(d[4], d[2], alpha=4, out=even)
    torch.sub(d[3], d[1], alpha=4, out=odd)
    torch.add(even, odd, out=out[1])
    torch.sub(even, odd, out=out[2])


def _back(m: Tensor, out: Tensor) -> None:
    """The paper's A' along one side: six numbers (6, ...) -> four outputs, into `out` (4, ...)."""
    near, far = m[1] + m[2], m[3] + m[4]
    torch.add(near, far, out=out[0]).add_(m[0])
    torch.add(near, far, alpha=4, out=out[2])
    torch.sub(m[1], m[2], out=near)
    torch.sub(m[3], m[4], out=far)
    torch.add(near, far, alpha=2, out=out[1])
    torch.add(near, far, alpha=8, out=out[3]).add_(m[5])
