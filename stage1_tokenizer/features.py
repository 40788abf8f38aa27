"""The Inception network that FID is defined by (Heusel et al. 2017), from a local file of its published weights."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from tessera.errors import InputError

SHA256 = "6726825d"  # how the hash of the published file begins; its name says so too


class Inception(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> (B, 2048): torch-fidelity's port of the TensorFlow network, with its resizing."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.extractor(((images.clamp(-1, 1) + 1) * 127.5).round().byte())[0]
        return features


def inception(weights: Path) -> Inception:
    """The network with the weights of a local file; needs torch-fidelity. Raises InputError for another file."""
    try:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"cannot read the weights of Inception {weights}: {error.strerror}; give the file") from None
    if not digest.startswith(SHA256):
        raise InputError(
            f"{weights} is not weights-inception-2015-12-05-{SHA256}.pth (its SHA-256 begins with {digest[:8]}); "
            "figures with other weights would not compare, so get that file from torch-fidelity's releases"
        )
    torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity itself would unpickle anything
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    extractor = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    )
    return Inception(extractor.eval().requires_grad_(False))
