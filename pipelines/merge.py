"""`tessera merge`: LoRAs become part of a prior, alone or in its bundle."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from common.errors import InputError
from common.weights import find_folder
from pipelines.bundle import INDEX, assemble_bundle, check_files, find_bundle, read_index
from stage2_prior import load_prior
from stage2_prior.lora import Loras


def merge(model: str | Path, loras: Sequence[tuple[str | Path, float]], out: str | Path) -> Path:
    """Adds weighted LoRAs to the weights of a bundle's or a folder's prior and writes a model of the same kind.

    Weights are written as float32, so that the pictures are those of the LoRAs kept apart. Raises InputError when a
    LoRA is one of another base, or `out` has something else in it.
    """
    out = Path(out)
    if (Path(model) / "config.json").is_file():
        _refuse_other(out, "config.json")
        _merged(Path(model), loras, out)
        return out
    folder = find_bundle(model)
    _refuse_other(out, INDEX)
    index = read_index(folder)
    check_files(folder, index)
    with tempfile.TemporaryDirectory() as temporary:
        prior = Path(temporary) / "prior"
        _merged(folder / "prior", loras, prior)
        reranker = folder / "reranker" if index.fingerprints.reranker is not None else None
        return assemble_bundle(
            out,
            image_tokenizer=folder / "image_tokenizer",
            text_tokenizer=folder / "text_tokenizer",
            prior=prior,
            reranker=reranker,
            sampling=index.sampling,
            likelihood_weight=index.likelihood_weight,
        )


def _merged(source: Path, loras: Sequence[tuple[str | Path, float]], out: Path) -> None:
    prior = load_prior(find_folder(source))
    added = Loras(prior)
    for folder, weight in loras:
        added.add(folder, weight)
    added.fuse()
    prior.save_pretrained(out)


def _refuse_other(out: Path, file: str) -> None:
    """Raises InputError when `out` is there and is not a model of this kind, which would be replaced."""
    if out.exists() and not (out / file).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is something else; give a new folder")
