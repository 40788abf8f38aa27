"""No bottleneck but the width of the latents: the plain autoencoder (Hinton & Salakhutdinov 2006)."""

from torch import Tensor

from stage1_tokenizer.bottlenecks.base import Bottlenecked, ContinuousBottleneck


class Identity(ContinuousBottleneck):
    """The decoder sees what the encoder says."""

    def forward(self, z: Tensor) -> Bottlenecked:
        return Bottlenecked(z, None, z.new_zeros(()))
