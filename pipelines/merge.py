"""`tessera merge`: LoRAs become part of a prior, alone or in its bundle."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.bundle import PARTS, assemble_bundle, check_files, find_bundle, new_bundle, read_index
from stage2_prior import load_prior
from stage2_prior.lora import Loras
from tessera.paths import expand
from tessera.weights.folder import find_folder
from tessera.weights.writing import refuse_foreign


def merge(model: str | Path, loras: Sequence[tuple[str | Path, float]], out: str | Path) -> Path:
    """Adds weighted LoRAs to the weights of a bundle's or a folder's prior and writes a model of the same kind.

    Weights are written as float32, so that the images are those of the LoRAs kept apart. Raises InputError when a
    LoRA is one of another base, when the sum is not finite, or when `out` has something else in it.
    """
    out, alone = expand(out), expand(model)
    if (alone / "config.json").is_file():
        refuse_foreign(out)
        _merged(alone, loras, out)
        return out
    folder = find_bundle(model)
    new_bundle(out)
    index = read_index(folder)
    check_files(folder, index)
    with tempfile.TemporaryDirectory() as temporary:
        prior = Path(temporary) / "prior"
        _merged(folder / "prior", loras, prior)
        present = {part: folder / part for part, found in index.fingerprints.model_dump().items() if found is not None}
        parts: dict[str, Any] = dict.fromkeys(PARTS) | present | {"prior": prior}
        return assemble_bundle(out, **parts, sampling=index.sampling, likelihood_weight=index.likelihood_weight)


def _merged(source: Path, loras: Sequence[tuple[str | Path, float]], out: Path) -> None:
    prior = load_prior(find_folder(source))
    added = Loras(prior)
    for folder, weight in loras:
        added.add(folder, weight)
    added.fuse()
    prior.save_pretrained(out)
