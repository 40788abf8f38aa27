"""Stage 1: images <-> codes."""

from stage1_tokenizer.autoencoder import Autoencoder, AutoencoderConfig

__all__ = ["Autoencoder", "AutoencoderConfig"]
