"""`tessera generate` behind the command line: prompts in, PNG files and a contact sheet out, and drawing one again.

A file is named after its prompt, its rank and its seed: `a-red-heart-above-a-blue-circle-1-seed7.png`; the sheet of all
candidates ends in `-candidates.png`. Nothing of others is overwritten: a file that is there already is replaced only
when it carries the same origin (prompt, seed, sampling, bundle), that is when it is the same picture drawn before;
otherwise the new one gets a number, `...-seed7 (2).png`.
"""

import json
import os
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageChops
from tqdm import tqdm

from common.config import Config, validate
from common.errors import InputError
from common.images import contact_sheet, open_image, read_origin, save_png
from pipelines.bundle import bundle_fingerprint, shipped_bundles, tessera_version
from pipelines.conditions import SegmentationMap
from pipelines.text_to_image import TextToImagePipeline, check_keep, check_prompts, check_seeds
from stage2_prior import Sampling

MOST_NAME_BYTES = 120  # of the part of a file name that comes from the prompt
SHEET_COLUMNS = 8
TOGETHER = 64  # candidates drawn before their pictures are written


class Origin(Config):
    """What a PNG remembers: enough to draw it again."""

    prompt: str
    seed: int
    sampling: Sampling
    bundle: str  # fingerprint
    model: str  # name of the bundle: shipped, on the hub, or of the folder it was in
    version: str
    score: float | None = None  # of this picture, None where nothing was reranked
    seeds: tuple[int, ...] | None = None  # of a contact sheet: all its candidates, in its order


@dataclass(frozen=True)
class Picture:
    path: str
    seed: int
    score: float | None


@dataclass(frozen=True)
class Drawn:
    """What one prompt gave, best first."""

    prompt: str
    images: list[Picture]
    sheet: str | None  # path of the contact sheet


@dataclass(frozen=True)
class Report:
    prompts: list[Drawn]
    candidates: int
    seconds: float  # in all, with loading and writing
    images_per_second: float  # candidates drawn, decoded, scored and written, without loading


@dataclass(frozen=True)
class Replayed:
    path: str
    identical: bool  # pixel by pixel
    seconds: float


def generate(
    prompts: str | Sequence[str],
    output: str | Path,
    *,
    model: str | Path = "emoji",
    num_images: int | None = None,
    num_candidates: int = 16,
    seed: int = 0,
    rerank: bool = True,
    sheet: bool = True,
    device: str | torch.device | None = None,
    **sampling: Any,
) -> Report:
    """Draws `num_candidates` for each prompt and writes the best `num_images` (4) into the folder `output`.

    `sampling` are temperature, top_k, top_p and guidance_scale, by default the bundle's; all prompts use the same
    seeds. `sheet` adds a contact sheet of all candidates with their scores. Everything is checked before the first
    picture is drawn, and a file is written whole or not at all. Raises InputError.
    """
    start = time.perf_counter()
    prompts = check_prompts(prompts)
    seeds = check_seeds(num_candidates, seed, None)
    keep = check_keep(num_images, len(seeds))
    pipeline = TextToImagePipeline.from_pretrained(model, device=device, rerank=rerank)
    settings = pipeline.settings(**sampling)
    pipeline.prefixes(prompts)  # the length of all prompts, before the first of them is drawn

    drawn: list[Drawn] = []
    with _output_folder(Path(output)) as folder, _bar(len(prompts) * len(seeds)) as bar:
        drawing = time.perf_counter()
        several = max(1, TOGETHER // len(seeds))
        for first in range(0, len(prompts), several):
            group, before = prompts[first : first + several], first * len(seeds)

            def report(done: int, _: int, before: int = before) -> None:
                bar.update(before + done // pipeline.prior.length - bar.n)

            generated = pipeline(
                group,
                num_images_per_prompt=len(seeds),
                num_candidates=len(seeds),
                seed=seed,
                progress=report,
                **sampling,
            )
            for i, prompt in enumerate(group):
                ranked = slice(i * len(seeds), (i + 1) * len(seeds))
                scores = generated.scores[ranked] if generated.scores is not None else None
                origin = Origin(
                    prompt=prompt,
                    seed=seed,
                    sampling=settings,
                    bundle=pipeline.fingerprint or "",
                    model=public_name(model),
                    version=tessera_version(),
                )
                drawn.append(
                    _write(folder, origin, generated.images[ranked], generated.seeds[ranked], scores, keep, sheet)
                )
    end = time.perf_counter()
    count = len(prompts) * len(seeds)
    return Report(drawn, count, end - start, count / (end - drawing))


def replay(
    picture: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    segmentation: str | Path | None = None,
) -> Replayed:
    """Draws a PNG of `generate` again from what it remembers, and writes it into the folder `output`.

    One that was drawn from a segmentation map needs the file of it. `model` is the bundle, by default the one that the
    picture names. Raises InputError when the picture remembers nothing or is a contact sheet, or when the bundle is not
    the one that it was drawn with.
    """
    start = time.perf_counter()
    origin = _read(Path(picture))
    if origin.seeds is not None:
        raise InputError(f"{picture} is a contact sheet; replay one of the pictures instead")
    name = origin.model if model is None else model
    try:
        found = bundle_fingerprint(name)
    except InputError as error:
        raise InputError(
            f"{picture} was drawn with the bundle {origin.bundle}: {error}; name it with --model"
        ) from None
    if found != origin.bundle:
        raise InputError(
            f"{picture} was drawn with the bundle {origin.bundle}, but {name} is {found} and draws other pictures; "
            "name the right bundle with --model"
        )
    before = open_image(picture)
    pipeline = TextToImagePipeline.from_pretrained(name, device=device, rerank=False)
    sampling = origin.sampling.model_dump()
    # None would mean the bundle's own setting, which may have changed since.
    sampling |= {"top_k": sampling["top_k"] or 0, "top_p": sampling["top_p"] or 1.0}
    with _output_folder(Path(output)) as folder:
        prompt = origin.prompt if segmentation is None else SegmentationMap(segmentation)
        image = pipeline(prompt, num_candidates=1, seed=origin.seed, **sampling).images[0]
        path = _free_path(folder, f"{slug(origin.prompt)}-seed{origin.seed}", origin)
        save_png(image, path, _content(origin))
    same = before.size == image.size and ImageChops.difference(before, image).getbbox() is None
    return Replayed(str(path), same, time.perf_counter() - start)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a JSONL file: each line a string, or an object with `prompt`, whose other keys are not looked at.

    Raises InputError: no such file, a line that is neither, no prompts.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"cannot read the prompts in {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; give a JSONL file of prompts") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError:
            raise InputError(
                f'{path}:{number} is not JSON; each line must look like {{"prompt": "a red heart"}}'
            ) from None
        prompt = content.get("prompt") if isinstance(content, dict) else content
        if not isinstance(prompt, str):
            raise InputError(f'{path}:{number} has no prompt; each line must look like {{"prompt": "a red heart"}}')
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"{path} has no prompts; give a JSONL file with one a line")
    return prompts


# Files ----------------------------------------------------------------------------------------------------------------


def slug(prompt: str) -> str:
    """The prompt as part of a file name: letters and digits of any script, hyphens between words, not too long."""
    text = unicodedata.normalize("NFC", prompt.lower())
    words = "".join(character if _is_word(character) else " " for character in text).split()
    name = "-".join(words).encode()[:MOST_NAME_BYTES].decode(errors="ignore").rstrip("-")
    return name or "picture"


def _is_word(character: str) -> bool:
    """Letters, digits and the vowel signs of scripts that write them apart, but not an emoji's variation selectors."""
    return character.isalnum() or (
        unicodedata.category(character) in ("Mn", "Mc") and not "\ufe00" <= character <= "\ufe0f"
    )


def public_name(model: str | Path) -> str:
    """What a picture may tell about its bundle: a shipped or hub name, of a folder only the last part."""
    if str(model) in shipped_bundles() or not Path(model).is_dir():
        return str(model)
    return Path(model).resolve().name


def _write(
    folder: Path,
    origin: Origin,
    images: list[Image.Image],
    seeds: list[int],
    scores: list[float] | None,
    keep: int,
    sheet: bool,
) -> Drawn:
    """Writes the best `keep` of a prompt's ranked candidates, and the contact sheet of all."""
    every: list[float | None] = [None] * len(seeds) if scores is None else [round(score, 6) for score in scores]
    pictures = []
    for rank in range(keep):
        own = origin.model_copy(update={"seed": seeds[rank], "score": every[rank]})
        path = _free_path(folder, f"{slug(origin.prompt)}-{rank + 1:0{len(str(keep))}d}-seed{own.seed}", own)
        save_png(images[rank], path, _content(own))
        pictures.append(Picture(str(path), seeds[rank], every[rank]))
    if not sheet:
        return Drawn(origin.prompt, pictures, None)

    own = origin.model_copy(update={"seeds": tuple(seeds)})
    labels = [f"{seed}" if score is None else f"{score:.3f} #{seed}" for seed, score in zip(seeds, every, strict=True)]
    scale = max(1, 128 // images[0].width)  # so that the labels fit below
    path = _free_path(folder, f"{slug(origin.prompt)}-candidates", own)
    save_png(contact_sheet(images, labels, min(SHEET_COLUMNS, len(images)), scale), path, _content(own))
    return Drawn(origin.prompt, pictures, str(path))


def _free_path(folder: Path, stem: str, origin: Origin) -> Path:
    """`stem.png`, or `stem (2).png` and so on: the first that is not there yet or that is this very picture."""
    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem} ({number}).png")
        if not path.exists() or _is_the_same(path, origin):
            return path
        number += 1


def _is_the_same(path: Path, origin: Origin) -> bool:
    try:
        other = _read(path)
    except InputError:
        return False
    # The same drawing may be scored by another reranker, and be told from by another version.
    unlike = {"score": None, "version": "", "model": ""}
    return other.model_copy(update=unlike) == origin.model_copy(update=unlike)


def _content(origin: Origin) -> dict[str, Any]:
    return origin.model_dump(mode="json", exclude_none=True) | {"sampling": origin.sampling.model_dump()}


def _read(path: Path) -> Origin:
    return validate(Origin, read_origin(path), where=f"the origin in {path}")


@contextmanager
def _output_folder(folder: Path) -> Iterator[Path]:
    """Makes the folder where it is missing, and sees that it can be written; one left empty by an error is removed."""
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _remove_empty(made)
        raise InputError(f"cannot write the output folder {folder}: {error.strerror}; choose another one") from None
    try:
        yield folder
    except BaseException:
        _remove_empty(made)
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Removes those of `folders`, deepest first, that are there and have nothing in them."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _bar(total: int) -> Any:
    return tqdm(total=total, unit="image", dynamic_ncols=True, disable=not sys.stderr.isatty())
