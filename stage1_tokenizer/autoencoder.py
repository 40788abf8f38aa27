"""The image tokenizer: encoder, bottleneck, decoder (VQ-VAE, van den Oord et al. 2017; VQGAN, Esser et al. 2021).

`tile` bounds the memory that large images take, at the price of time: see tiling.py.

With a continuous bottleneck (a plain or a variational autoencoder) there are latents but no codes: what asks for codes
is refused, `encode_latents` and `decode_latents` serve any kind.

Letters: B batch, H W pixels, h w code grid, Q codebooks, K codebook size, D latent channels.
"""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Discriminator, Field, Tag, model_validator
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks import BottleneckConfig, Bottlenecked, HierarchyConfig, VQEMAConfig, build_bottleneck
from stage1_tokenizer.convolutions import Decoder, Encoder, NoEncoder, TrunkConfig
from stage1_tokenizer.dvae import DVAEDecoder, DVAEEncoder, DVAETrunkConfig
from stage1_tokenizer.losses.pixels import PixelKind, channels, to_images
from stage1_tokenizer.movq import MoVQDecoder
from stage1_tokenizer.patches import PatchEncoder
from stage1_tokenizer.tiling import decode_tiles, encode_tiles
from tessera.config import Config, Origin, read_config
from tessera.errors import InputError
from tessera.native import accelerate
from tessera.weights.building import built_from
from tessera.weights.folder import Unfilled, find_folder, fingerprint, load_weights, save_pretrained


def _trunk_kind(trunk: Any) -> str:
    """The tag of a trunk; VQGAN's convolutions are meant where it is left out."""
    return trunk.get("type", "convolutional") if isinstance(trunk, dict) else getattr(trunk, "type", "convolutional")


AnyTrunkConfig = Annotated[
    Annotated[TrunkConfig, Tag("convolutional")] | Annotated[DVAETrunkConfig, Tag("dvae")], Discriminator(_trunk_kind)
]


class AutoencoderConfig(Config):
    type: str = Field("autoencoder", pattern="^autoencoder$")
    image_size: int = Field(256, gt=0)  # pixels a side it is trained at; other sizes divisible by the factor work
    trunk: AnyTrunkConfig = TrunkConfig()
    bottleneck: BottleneckConfig = VQEMAConfig()
    pixels: PixelKind = "values"  # what the decoder predicts of a pixel; a likelihood as loss needs its own kind
    origin: Origin | None = None  # of converted weights; null for those trained here

    @model_validator(mode="after")
    def _consistent(self) -> "AutoencoderConfig":
        if self.image_size % self.factor:
            raise ValueError(f"image_size must be divisible by the factor {self.factor}, got {self.image_size}")
        if self.bottleneck.type != "gumbel" and self.trunk.encoder_dim != self.trunk.decoder_dim:
            raise ValueError(f"bottleneck {self.bottleneck.type} needs a latent_dim in the trunk; give one")
        if self.trunk.image_channels != 3 and self.pixels != "values":
            raise ValueError(
                f"pixels {self.pixels} are of RGB pictures, got {self.trunk.image_channels} image_channels"
            )
        if isinstance(self.trunk, TrunkConfig) and self.trunk.decoder == "modulated" and self.pixels != "values":
            raise ValueError(f"a modulated decoder says values of pixels, got pixels {self.pixels}")
        return self

    @property
    def factor(self) -> int:
        """Pixels a side for one position of the code grid."""
        return self.trunk.factor * (2 if isinstance(self.bottleneck, HierarchyConfig) else 1)


class Autoencoded(NamedTuple):
    images: Tensor  # (B, 3, H, W), close to [-1, 1] but not clipped
    codes: Tensor | None  # (B, Q, h, w) int64; None when continuous
    bottleneck_loss: Tensor  # scalar
    output: Tensor  # (B, C, H, W), what the decoder predicts: the images, or the parameters of a likelihood of them


class Autoencoder(nn.Module):
    """Images to codes and back; `forward` is what training sees."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = build_encoder(config.trunk)
        self.bottleneck = build_bottleneck(config.bottleneck, config.trunk.encoder_dim, config.trunk.decoder_dim)
        labels = config.trunk.image_channels
        self.decoder = build_decoder(config.trunk, channels(config.pixels) if labels == 3 else labels)
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Autoencoder":
        """The tokenizer in a folder written by `save_pretrained`, or of that name on the hub, in eval mode."""
        folder = find_folder(folder)
        config = read_config(AutoencoderConfig, folder)
        with built_from(folder), Unfilled():
            model = cls(config)
        load_weights(model, folder)
        accelerate(model.decoder)  # not the encoder: other rounding could change a code
        return model

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, max_shard_size: str = "5GB"
    ) -> None:
        save_pretrained(self, self.config, folder, dtype=dtype, max_shard_size=max_shard_size)

    def forward(self, images: Tensor) -> Autoencoded:
        """(B, 3, H, W) in [-1, 1] -> reconstructions, codes, bottleneck loss."""
        z = self.encoder(images)  # (B, D, h, w)
        with torch.autocast(z.device.type, enabled=False):  # distances and running means want float32
            bottlenecked = self.bottleneck(z.float())
        output = self.decoder(bottlenecked.latents)
        return Autoencoded(to_images(output, self.config.pixels), bottlenecked.codes, bottlenecked.loss, output)

    @torch.no_grad()
    def encode(self, images: Tensor, tile: int | None = None) -> Tensor:
        """(B, 3, H, W) float in [-1, 1], sides divisible by `factor` -> codes (B, Q, h, w) int64."""
        self._need_codes()
        codes = self._bottlenecked(images, tile).codes
        assert codes is not None
        return codes

    @torch.no_grad()
    def decode(self, codes: Tensor, tile: int | None = None) -> Tensor:
        """Codes (B, Q, h, w) int64 -> images (B, 3, H, W) float in [-1, 1]."""
        self._need_codes()
        if codes.ndim != 4 or codes.shape[1] != self.bottleneck.num_codebooks:
            raise InputError(f"codes must be (B, {self.bottleneck.num_codebooks}, h, w), got {tuple(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise InputError(
                f"codes must be in [0, {self.codebook_size}), got {int(codes.min())} to {int(codes.max())}"
            )
        return self.decode_latents(self.bottleneck.lookup(codes), tile)

    @torch.no_grad()
    def encode_latents(self, images: Tensor, tile: int | None = None) -> Tensor:
        """(B, 3, H, W) float in [-1, 1], sides divisible by `factor` -> what the decoder reads, (B, D, H / f, W / f).

        With codes these are the vectors of the codes, with a variational autoencoder in eval mode the means.
        """
        return self._bottlenecked(images, tile).latents

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, tile: int | None = None) -> Tensor:
        """Latents (B, D, H / f, W / f) of a trunk with factor f -> images (B, 3, H, W) float in [-1, 1]."""
        dim = self.config.trunk.decoder_dim
        if latents.ndim != 4 or latents.shape[1] != dim:
            raise InputError(f"latents must be (B, {dim}, h, w), got {tuple(latents.shape)}")
        output = self.decoder(latents) if tile is None else decode_tiles(self.decoder, latents, tile)
        return to_images(output, self.config.pixels).clamp(-1, 1)

    def _bottlenecked(self, images: Tensor, tile: int | None) -> Bottlenecked:
        colours = self.config.trunk.image_channels
        if images.ndim != 4 or images.shape[1] != colours or any(side % self.factor for side in images.shape[2:]):
            raise InputError(
                f"images must be (B, {colours}, H, W) with H and W divisible by {self.factor}, "
                f"got {tuple(images.shape)}"
            )
        z = self.encoder(images) if tile is None else encode_tiles(self.encoder, images, tile)
        return self.bottleneck(z.float())

    def _need_codes(self) -> None:
        if self.continuous:
            raise InputError(
                f"the image tokenizer is continuous ({self.config.bottleneck.type}) and has no codes; use its "
                "encode_latents and decode_latents, or one with a codebook"
            )

    @property
    def continuous(self) -> bool:
        """Whether it has latents but no codes."""
        return self.bottleneck.codebook_size is None

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def factor(self) -> int:
        return self.config.factor

    @property
    def codebook_size(self) -> int:
        """K. Raises InputError when continuous, as `code_shape` does; `bottleneck.codebook_size` is None then."""
        self._need_codes()
        assert self.bottleneck.codebook_size is not None
        return self.bottleneck.codebook_size

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(Q, h, w) of an image of `image_size`."""
        self._need_codes()
        side = self.image_size // self.factor
        return self.bottleneck.num_codebooks, side, side

    @property
    def fingerprint(self) -> str:
        """Changes when codes come to mean something else: encoder and bottleneck (the decoder may learn on)."""
        parts = [*self.encoder.state_dict().items()]
        meaning = ("codebook", "weight", "bias")  # the rest is about the training: counts, steps
        parts += [(k, v) for k, v in self.bottleneck.state_dict().items() if k.split(".")[-1] in meaning]
        return fingerprint(*(part for name, tensor in sorted(parts) for part in (name, tensor)))


def build_encoder(config: TrunkConfig | DVAETrunkConfig) -> nn.Module:
    if isinstance(config, DVAETrunkConfig):
        return DVAEEncoder(config)
    match config.encoder:
        case "convolutional":
            return Encoder(config)
        case "patchwise":
            return PatchEncoder(config)
        case "none":
            return NoEncoder()


def build_decoder(config: TrunkConfig | DVAETrunkConfig, channels: int) -> Decoder | MoVQDecoder | DVAEDecoder:
    if isinstance(config, DVAETrunkConfig):
        return DVAEDecoder(config, channels)
    return MoVQDecoder(config) if config.decoder == "modulated" else Decoder(config, channels)
