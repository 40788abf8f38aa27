"""What the decoder says of the numbers of an image, and how well that fits the image.

`values` are the numbers themselves (mean absolute and mean squared differences), `bernoulli` the logits of each number
(Kingma & Welling 2014, appendix C.1), `logit-laplace` the mean and the log scale of its logit (Ramesh et al. 2021,
appendix A.3). Each loss is a mean over numbers, in nats for the likelihoods.

Letters: B batch, H W pixels, C numbers the decoder says of a pixel.
"""

import math
from typing import Literal, assert_never

import torch
import torch.nn.functional as F
from torch import Tensor

PixelKind = Literal["values", "bernoulli", "logit-laplace"]
EPSILON = 0.1  # of Ramesh et al., appendix A.3: keeps logits of images within [-2.2, 2.2]


def channels(kind: PixelKind) -> int:
    """C: how many numbers the decoder says of a pixel."""
    return 6 if kind == "logit-laplace" else 3


def to_images(output: Tensor, kind: PixelKind) -> Tensor:
    """What the decoder said, (B, C, H, W), -> the image it means, (B, 3, H, W), close to [-1, 1] but not clipped."""
    match kind:
        case "values":
            return output
        case "bernoulli":
            return 2 * torch.sigmoid(output.float()) - 1
        case "logit-laplace":
            mean = output[:, :3].float()
            return 2 * (torch.sigmoid(mean) - EPSILON) / (1 - 2 * EPSILON) - 1
        case _:
            assert_never(kind)


def bernoulli_loss(output: Tensor, images: Tensor) -> Tensor:
    """-log p of images (B, 3, H, W) in [-1, 1], as shares of white, under logits (B, 3, H, W)."""
    return F.binary_cross_entropy_with_logits(output.float(), (images.float() + 1) / 2)


def logit_laplace_loss(output: Tensor, images: Tensor) -> Tensor:
    """-log p of images (B, 3, H, W) in [-1, 1] under means and log scales (B, 6, H, W): appendix A.3.

    The density is that of the image brought into [EPSILON, 1 - EPSILON].
    """
    mean, log_scale = output.float().chunk(2, dim=1)
    x = (1 - 2 * EPSILON) * (images.float() + 1) / 2 + EPSILON
    distance = (torch.logit(x) - mean).abs() * torch.exp(-log_scale)
    return (math.log(2) + log_scale + torch.log(x * (1 - x)) + distance).mean()
