"""Fixtures of several tests: a bundle of tiny random parts, built of the real classes in a second."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from pipelines.bundle import assemble_bundle
from pipelines.text_to_image import TextToImagePipeline
from rerank.clip import ClipReranker, new_clip
from stage1_tokenizer import Autoencoder, AutoencoderConfig
from stage2_prior import GPTConfig, GPTPrior, Sampling
from tessera.logs import shown
from tessera.text import TextTokenizer

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Hypothesis draws the same examples every time; GPUs are hidden unless their own tests are asked for (-m gpu),
    because what must be equal bit by bit is so on a CPU."""
    settings.register_profile("suite", derandomize=True)  # a run fails for what was changed, not for what was drawn
    settings.load_profile("suite")
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


CAPTIONS = ["a red heart above a blue circle", "a small cat in the top left corner", "红心在蓝色圆圈上方", "a dog"]
TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "width": 32, "heads": 2, "layers": 1},
}


def tiny_autoencoder(seed: int = 0) -> Autoencoder:
    """16x16 pixels as 4x4 codes of 32."""
    torch.manual_seed(seed)
    trunk = {"channels": 16, "multipliers": [1, 2], "encoder_blocks": 1, "decoder_blocks": 1, "patch_size": 2}
    config = {
        "image_size": 16,
        "trunk": trunk | {"latent_dim": 8, "norm_groups": 8},
        "bottleneck": {"type": "vq-ema", "codebook_size": 32},
    }
    autoencoder = Autoencoder(AutoencoderConfig.model_validate(config)).eval()
    autoencoder.bottleneck.get_buffer("codebook").copy_(
        torch.randn(32, 8) * 2
    )  # an untrained one waits for its first pictures
    return autoencoder


def tiny_prior(autoencoder: Autoencoder, text_tokenizer: TextTokenizer, seed: int = 0) -> GPTPrior:
    torch.manual_seed(seed)
    config = GPTConfig(
        codebook_size=autoencoder.codebook_size,
        code_shape=autoencoder.code_shape,
        text_vocab_size=text_tokenizer.vocab_size,
        text_length=24,
        dim=32,
        depth=2,
        num_heads=2,
        image_tokenizer_fingerprint=autoencoder.fingerprint,
        text_tokenizer_fingerprint=text_tokenizer.fingerprint,
    )
    prior = GPTPrior(config, text_tokenizer).eval()
    with torch.no_grad():
        for weight in prior.parameters():  # fresh blocks are the identity, which would make the prompt not matter
            weight.add_(torch.randn_like(weight) * 0.1)
    return prior


@pytest.fixture(autouse=True)
def logs_on_stderr() -> Iterator[None]:
    """What our packages log is on standard error, as for users of the command line."""
    with shown():
        yield


@pytest.fixture(scope="session")
def tiny_text_tokenizer() -> TextTokenizer:
    return TextTokenizer.train(CAPTIONS, vocab_size=300)


@pytest.fixture(scope="session")
def tiny_clip(tiny_text_tokenizer: TextTokenizer) -> ClipReranker:
    torch.manual_seed(0)
    clip = new_clip(TINY_CLIP, tiny_text_tokenizer)
    return clip.with_model(clip.model)


@pytest.fixture(scope="session")
def tiny_parts(
    tmp_path_factory: pytest.TempPathFactory, tiny_text_tokenizer: TextTokenizer, tiny_clip: ClipReranker
) -> Path:
    """A folder with a folder for each part, as training leaves them; not to be written to."""
    folder = tmp_path_factory.mktemp("parts")
    autoencoder = tiny_autoencoder()
    autoencoder.save_pretrained(folder / "image_tokenizer")
    tiny_text_tokenizer.save_pretrained(folder / "text_tokenizer")
    tiny_prior(autoencoder, tiny_text_tokenizer).save_pretrained(folder / "prior")
    tiny_clip.save_pretrained(folder / "reranker")
    return folder


@pytest.fixture(scope="session")
def tiny_bundle(tiny_parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole bundle; not to be written to."""
    return assemble_bundle(
        tmp_path_factory.mktemp("bundles") / "tiny",
        image_tokenizer=tiny_parts / "image_tokenizer",
        text_tokenizer=tiny_parts / "text_tokenizer",
        prior=tiny_parts / "prior",
        reranker=tiny_parts / "reranker",
        sampling=Sampling(top_k=20, guidance_scale=2.0),
    )


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_bundle: Path) -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained(tiny_bundle, device="cpu")
