"""Law 10: nothing needs a network unless a hub name was given."""

import socket
from pathlib import Path

import pytest

from pipelines.output import generate
from pipelines.replay import replay
from rerank import ClipReranker
from stage1_tokenizer import Autoencoder
from stage2_prior import load_prior


def test_bundle_and_parts_work_without_a_network(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"a network connection was tried: {arguments}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    report = generate("a red cat", tmp_path / "out", model=tiny_bundle, num_candidates=2)
    assert replay(report.prompts[0].images[0].path, tmp_path / "again", model=tiny_bundle).identical
    Autoencoder.from_pretrained(tiny_bundle / "image_tokenizer")
    load_prior(tiny_bundle / "prior")
    ClipReranker.from_pretrained(tiny_bundle / "reranker")
