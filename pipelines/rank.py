"""`tessera rerank` behind the command line: image files ordered by how well they fit a prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.bundle import INDEX, find_bundle, shipped_bundles
from pipelines.prefix import warn_of_cut
from pipelines.request import check_text
from rerank import ClipReranker
from tessera.errors import InputError
from tessera.images import open_image
from tessera.paths import expand, is_file


class Place(NamedTuple):
    rank: int  # from 1, the best
    score: float  # cosine similarity in [-1, 1]
    image: str  # path, as it was given


def rank(prompt: str, images: Sequence[str | Path], model: str = "emoji", weights: str | None = None) -> list[Place]:
    """The image files, best first, scored by `model`: see `find_reranker`.

    Warns (InputWarning) of a prompt that is too long and cut, saying what was left out. Raises InputError for an empty
    prompt, a broken image, or a model that is unknown or damaged.
    """
    check_text(prompt)
    opened = [open_image(path) for path in images]
    reranker = ClipReranker.from_pretrained(find_reranker(model), weights)
    warn_of_cut("the prompt", {"reranker": reranker.left_out(prompt)})
    scores = [float(score) for score in reranker.score(prompt, opened)]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return [Place(place, scores[i], str(images[i])) for place, i in enumerate(order, 1)]


def find_reranker(model: str) -> str | Path:
    """The reranker of a bundle (shipped, or a folder); any other name is one that `ClipReranker` knows."""
    if model not in shipped_bundles() and not is_file(expand(model) / INDEX):
        return model
    folder = find_bundle(model) / "reranker"
    if not folder.is_dir():
        raise InputError(f"the bundle {model} has no reranker; name another model with --model")
    return folder
