"""Bundles: a folder with all that turns a prompt into ranked images.

    model_index.json        what belongs together: a fingerprint for each part and each file, and defaults of a call
    image_tokenizer/        config.json, model.safetensors
    text_tokenizer/         tokenizer.json; may be absent
    prior/                  config.json, model.safetensors
    reranker/               open_clip's `local-dir` layout; may be absent
    segmentation_tokenizer/ as image_tokenizer/, of a prior that draws from segmentation maps

Each part loads alone. Loading the whole compares every file with the index first, so that a missing, truncated or
swapped one is a sentence with its name, and then what the prior says it was trained on with what is there.
"""

import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from pipelines.request import check_likelihood_weight
from rerank import ClipReranker, Reranker
from stage1_tokenizer import Autoencoder
from stage2_prior import Sampling, load_prior
from stage2_prior.base import CONDITIONS, Prior
from tessera.clip.folder import WEIGHT_FILE
from tessera.config import Config, validate
from tessera.errors import InputError, nearest
from tessera.files import read_json
from tessera.paths import expand, is_file
from tessera.text import TextTokenizer
from tessera.weights.folder import find_folder, fingerprint
from tessera.weights.writing import file_hash, refuse_foreign, replacing, write_json

INDEX = "model_index.json"
SHIPPED = Path(__file__).parent / "bundles"
PARTS = ("image_tokenizer", "text_tokenizer", "prior", "reranker", "segmentation_tokenizer")
SUFFIXES = (".json", ".safetensors", ".txt", ".model")  # of the files of a part; the last two are of foreign tokenizers


class Fingerprints(Config):
    """Of what the parts agree on, as each part computes it."""

    image_tokenizer: str  # encoder and codebook; the prior's config names it too
    text_tokenizer: str | None  # merges; the prior's config names it too
    reranker: str | None  # weights, tokenizer and preprocessing
    segmentation_tokenizer: str | None = None  # as image_tokenizer


class BundleIndex(Config):
    """The content of `model_index.json`."""

    model_config = ConfigDict(populate_by_name=True)

    class_name: Literal["TextToImagePipeline"] = Field("TextToImagePipeline", alias="_class_name")
    tessera_version: str = Field(alias="_tessera_version")
    fingerprints: Fingerprints
    files: dict[str, str]  # path inside the bundle -> first 16 hex digits of the file's SHA-256
    sampling: Sampling = Sampling()  # what a pipeline draws with unless told otherwise
    likelihood_weight: float = Field(0.0, ge=0, allow_inf_nan=False)  # in the order of images, likewise
    # Fingerprints of earlier editions. What they drew this one draws too, for prompts of which all could be seen.
    earlier_fingerprints: tuple[str, ...] = ()


@dataclass
class Bundle:
    """The parts of a model as one object, in eval mode, and what a call does unless told otherwise."""

    image_tokenizer: Autoencoder
    prior: Prior  # with its text tokenizer
    reranker: Reranker | None = None
    segmentation_tokenizer: Autoencoder | None = None  # of a prior that is conditioned on segmentation maps
    sampling: Sampling = Sampling()
    likelihood_weight: float = 0.0  # of log p(codes | prompt) beside the reranker's score
    fingerprint: str | None = None  # of what generates; None where the parts are not those of a bundle on disk

    @property
    def device(self) -> torch.device:
        return next(self.prior.parameters()).device

    def decode(self, codes: Tensor) -> Tensor:
        """(n, Q, h, w) -> (n, 3, H, W) in [-1, 1]."""
        # Convolutions of a larger batch add up in another order, which can move a pixel by 1/255: on a CPU, where that
        # costs little, images are decoded one by one, so that each is the same in any company.
        together = 1 if codes.device.type == "cpu" else 16
        return torch.cat([self.image_tokenizer.decode(some) for some in codes.split(together)])


def load_bundle(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    rerank: bool = True,
) -> Bundle:
    """All parts of the bundle `name` (see `find_bundle`), in eval mode; without the reranker if `rerank` is False.

    Raises InputError when a file is missing, truncated or swapped, or when parts do not fit together.
    """
    folder = find_bundle(name)
    index = read_index(folder)
    check_files(folder, index)
    image_tokenizer = Autoencoder.from_pretrained(folder / "image_tokenizer")
    text_tokenizer = None
    if index.fingerprints.text_tokenizer is not None:
        text_tokenizer = TextTokenizer.from_pretrained(folder / "text_tokenizer")
    prior = load_prior(folder / "prior", text_tokenizer)
    _check_pair(image_tokenizer, prior, folder / "image_tokenizer", folder / "prior")
    reranker = None
    if rerank and index.fingerprints.reranker is not None:
        reranker = ClipReranker.from_pretrained(folder / "reranker", device=device, dtype=dtype)
    segmentation_tokenizer = None
    if index.fingerprints.segmentation_tokenizer is not None:
        segmentation_tokenizer = Autoencoder.from_pretrained(folder / "segmentation_tokenizer")
        segmentation_tokenizer.to(device=device)  # codes are better read in full precision, and it is done once
    return Bundle(
        image_tokenizer.to(device=device, dtype=dtype),
        prior.to(device=device, dtype=dtype),
        reranker,
        segmentation_tokenizer,
        index.sampling,
        index.likelihood_weight,
        _fingerprint(index),
    )


def find_bundle(name: str | Path) -> Path:
    """The folder of a bundle: a folder that is one, a bundle shipped with the package, or a download from the hub.

    A folder of that name that is not a bundle does not hide a shipped one. Raises InputError when there is none.
    """
    folder = expand(name)
    if is_file(folder / INDEX):
        return folder
    shipped = shipped_bundles()
    if str(name) in shipped:
        return SHIPPED / str(name)
    if os.path.isdir(folder):
        raise InputError(f"{folder} is not a bundle, it has no {INDEX}; shipped bundles are {_list(shipped)}")
    if "/" not in str(name):
        hint = nearest(str(name), shipped) if shipped else "; the package ships none"
        raise InputError(
            f"there is no bundle '{name}', neither shipped nor as a folder{hint.replace('known', 'shipped')}"
        )
    folder = find_folder(name)
    if not (folder / INDEX).is_file():
        raise InputError(f"the hub's '{name}' is not a bundle, it has no {INDEX}; shipped bundles are {_list(shipped)}")
    return folder


def shipped_bundles() -> list[str]:
    """Names of the bundles inside the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{INDEX}"))


def bundle_fingerprint(name: str | Path) -> str:
    """Changes when the images of a seed do: all files but the reranker's, which only orders them."""
    return _fingerprint(read_index(find_bundle(name)))


def draws_pictures_of(name: str | Path, origin: str) -> bool:
    """Whether the bundle draws again what the bundle with the fingerprint `origin` drew."""
    index = read_index(find_bundle(name))
    return origin in (_fingerprint(index), *index.earlier_fingerprints)


# Writing --------------------------------------------------------------------------------------------------------------


def assemble_bundle(
    out: str | Path, *, sampling: Sampling | None = None, likelihood_weight: float = 0.0, **parts: str | Path | None
) -> Path:
    """Copies the folders of the `parts` (PARTS) into the bundle `out`, whole or not at all, and records what belongs
    together.

    A part that is None or not given is absent, as the `text_tokenizer` of a prior that reads no text of its own. The
    files of an older bundle at `out` are replaced, all else there stays. Raises InputError when a part is broken, when
    parts do not fit together, or when `out` is a folder with something else.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise InputError(f"'{unknown[0]}' is no part of a bundle{nearest(unknown[0], [*PARTS])}")
    out = expand(out)
    known = new_bundle(out)
    found = {part: find_folder(source) for part in PARTS if (source := parts.get(part)) is not None}
    fingerprints = _check_parts(found)
    with replacing(out, known) as new:
        for part, source in found.items():
            _copy_part(part, source, new / part)
        index = BundleIndex(
            tessera_version=tessera_version(),
            fingerprints=fingerprints,
            files={path.relative_to(new).as_posix(): file_hash(path) for path in sorted(new.glob("*/*"))},
            sampling=sampling or Sampling(),
            likelihood_weight=check_likelihood_weight(likelihood_weight),
        )
        write_json(new / INDEX, index.model_dump(by_alias=True))
    return out


def new_bundle(out: str | Path) -> dict[str, str]:
    """The files, with their hashes, of an older bundle in the folder `out` where a bundle is to be written.

    Raises InputError when something else is there: a folder that is not empty and no bundle of ours, or a file in it
    that is not ours and has the name of one that would be written.
    """
    out = expand(out)
    refuse_foreign(out)
    if not out.is_dir():
        return {}
    if (out / INDEX).is_file():
        known = read_index(out).files
    elif any(out.iterdir()):
        raise InputError(f"{out} exists and is not a bundle; give a new folder")
    else:
        known = {}
    for part in PARTS:
        refuse_foreign(
            out / part, {Path(name).name: value for name, value in known.items() if name.startswith(f"{part}/")}
        )
    return known


def save_bundle(out: str | Path, bundle: Bundle) -> Path:
    """Writes parts in memory as the bundle `out`; the prior brings its text tokenizer. See `assemble_bundle`."""
    prior = bundle.prior
    if prior.text_tokenizer is None and prior.config.text_tokenizer_fingerprint:
        raise InputError("the prior has no text tokenizer; load it with load_prior(folder, text_tokenizer)")
    parts: dict[str, Any] = {
        "image_tokenizer": bundle.image_tokenizer,
        "text_tokenizer": prior.text_tokenizer,
        "prior": prior,
        "reranker": bundle.reranker,
        "segmentation_tokenizer": bundle.segmentation_tokenizer,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary) / name for name, part in parts.items() if part is not None}
        for name, folder in folders.items():
            parts[name].save_pretrained(folder)
        given: dict[str, Any] = {**folders, "sampling": bundle.sampling}
        return assemble_bundle(out, likelihood_weight=bundle.likelihood_weight, **given)


def _check_parts(folders: dict[str, Path]) -> Fingerprints:
    """Loads every part, so that a bundle is never made of broken ones. Raises InputError."""
    text = TextTokenizer.from_pretrained(folders["text_tokenizer"]) if "text_tokenizer" in folders else None
    images = Autoencoder.from_pretrained(folders["image_tokenizer"])
    prior = load_prior(folders["prior"], text)
    _check_pair(images, prior, folders["image_tokenizer"], folders["prior"])
    maps = _check_segmentation(prior, folders)
    reranker = None
    if "reranker" in folders:
        if prior.condition != "text":
            raise InputError(
                f"a reranker compares pictures with text, and the prior in {folders['prior']} draws from "
                f"{CONDITIONS[prior.condition]}; leave the reranker out"
            )
        reranker = ClipReranker.from_pretrained(folders["reranker"]).fingerprint
        if not (folders["reranker"] / WEIGHT_FILE).is_file():
            raise InputError(f"{folders['reranker']} has no {WEIGHT_FILE}; write it with ClipReranker.save_pretrained")
    return Fingerprints(
        image_tokenizer=images.fingerprint,
        text_tokenizer=text.fingerprint if text is not None else None,
        reranker=reranker,
        segmentation_tokenizer=maps,
    )


def _check_segmentation(prior: Prior, folders: dict[str, Path]) -> str | None:
    """The fingerprint of the tokenizer of segmentation maps. Raises InputError unless the prior reads its codes."""
    expected, found = prior.config.segmentation_tokenizer_fingerprint or None, None
    if "segmentation_tokenizer" in folders:
        found = Autoencoder.from_pretrained(folders["segmentation_tokenizer"]).fingerprint
    if found != expected:
        raise InputError(
            f"the prior in {folders['prior']} reads codes of segmentation tokenizer {expected or 'none'}, got "
            f"{found or 'none'}; put those together that belong together"
        )
    return found


def _copy_part(part: str, source: Path, target: Path) -> None:
    """Copies the files that a part loads from. The prior's own copy of the text tokenizer stays behind."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        duplicate = part == "prior" and path.name == "tokenizer.json"
        if path.is_file() and path.suffix in SUFFIXES and not path.name.startswith(".") and not duplicate:
            shutil.copyfile(path, target / path.name)


# Checks ---------------------------------------------------------------------------------------------------------------


def read_index(folder: Path) -> BundleIndex:
    """`folder/model_index.json`. Raises InputError when it is missing, broken or names files outside the bundle."""
    path = folder / INDEX
    content = read_json(path, "restore the file, or assemble the bundle again")
    index = validate(BundleIndex, content, where=str(path))
    for name in index.files:
        parts = PurePosixPath(name).parts
        if len(parts) != 2 or parts[0] not in PARTS or parts[1] == "..":
            raise InputError(f"{path}: '{name}' is not a file of a part; restore the index")
    return index


def check_files(folder: Path, index: BundleIndex) -> None:
    """Raises InputError for the first file that is missing or is not the one the bundle was assembled with."""
    way_out = "restore the file, or assemble the bundle again"
    for name, expected in index.files.items():
        part, path = name.split("/")[0].replace("_", " "), folder / name
        if not path.is_file():
            raise InputError(f"the {part} of the bundle is incomplete, {path} is missing; {way_out}")
        if file_hash(path) != expected:
            raise InputError(
                f"the {part} of the bundle is damaged or swapped, {path} is not what it was assembled with; {way_out}"
            )


def _check_pair(image_tokenizer: Autoencoder, prior: Prior, tokenizer_folder: Path, prior_folder: Path) -> None:
    """Raises InputError unless the prior draws codes that the image tokenizer decodes (load_prior checks the text)."""
    expected = prior.config.image_tokenizer_fingerprint
    if expected not in ("", image_tokenizer.fingerprint):
        raise InputError(
            f"the prior in {prior_folder} was trained on codes of image tokenizer {expected}, but {tokenizer_folder} "
            f"is {image_tokenizer.fingerprint}; put those together that belong together, or train the prior again"
        )
    draws = (*prior.config.code_shape, prior.codebook_size)
    decodes = (*image_tokenizer.code_shape, image_tokenizer.codebook_size)
    if draws != decodes:
        raise InputError(
            f"the prior in {prior_folder} draws {prod(draws[:3])} codes of {draws[3]}, but {tokenizer_folder} decodes "
            f"{prod(decodes[:3])} codes of {decodes[3]}; put those together that belong together"
        )


def tessera_version() -> str:
    try:
        return version("tessera")
    except PackageNotFoundError:  # run from the sources
        return "unknown"


def _fingerprint(index: BundleIndex) -> str:
    drawing = [(name, value) for name, value in sorted(index.files.items()) if not name.startswith("reranker/")]
    return fingerprint(*(part for pair in drawing for part in pair))


def _list(names: list[str]) -> str:
    return ", ".join(names) or "(none)"
