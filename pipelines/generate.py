"""`tessera generate` behind the command line: prompts in, PNG files and a contact sheet out, and drawing one again.

A file is named after its prompt, its rank and its seed: `a-red-heart-above-a-blue-circle-1-seed7.png`; the sheet of all
candidates ends in `-candidates.png`. Nothing of others is overwritten: a file that is there already is replaced only
when it carries the same origin (prompt, seed, sampling, bundle), that is when it is the same picture drawn before;
otherwise the new one gets a number, `...-seed7 (2).png`.
"""

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
from PIL import ImageChops
from torch import Tensor
from tqdm import tqdm

from pipelines.arguments import check_keep, check_prompts
from pipelines.bundle import bundle_fingerprint, draws_pictures_of, shipped_bundles, tessera_version
from pipelines.conditions import SegmentationMap
from pipelines.text_to_image import Generated, TextToImagePipeline
from stage2_prior import Sampling
from stage2_prior.sampling.settings import Precision
from tessera.config import Config, validate
from tessera.errors import InputError
from tessera.files import read_json_lines
from tessera.images import contact_sheet, open_image, open_mask, read_origin, save_png
from tessera.paths import expand, is_folder

MOST_NAME_BYTES = 120  # of the part of a file name that comes from the prompt
SHEET_COLUMNS = 8
LIKE_THIS = 'each line must look like {"prompt": "a red heart"}'


class OriginLora(Config):
    name: str  # of its folder
    fingerprint: str
    weight: float


class Origin(Config):
    """What a PNG remembers: enough to draw it again."""

    prompt: str
    seed: int
    sampling: Sampling
    bundle: str  # fingerprint
    model: str  # name of the bundle: shipped, on the hub, or of the folder it was in
    version: str
    loras: tuple[OriginLora, ...] | None = None
    negative_prompt: str | None = None
    first_codes: tuple[int, ...] | None = None  # that were given, not drawn
    known_codes: tuple[int, ...] | None = None  # of the picture whose gaps were filled, -1 in these
    precision: Precision | None = None  # that the prior's weights were kept in, None: as they are in the bundle
    score: float | None = None  # of this picture, None where nothing was reranked
    log_prob: float | None = None  # of this picture's codes given the prompt, None where it was not asked for
    seeds: tuple[int, ...] | None = None  # of a contact sheet: all its candidates, in its order


@dataclass(frozen=True)
class Picture:
    path: str
    seed: int
    score: float | None
    log_prob: float | None  # sum over the codes, see `pipelines.text_to_image.Generated`; None unless asked for
    drawn_log_prob: float | None


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
    finished: int  # of the candidates; fewer with a candidate_budget
    seconds: float  # in all, with loading and writing
    images_per_second: float  # finished ones drawn, decoded, scored and written, without loading


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
    top_of: str | Path | None = None,
    top_rows: int | None = None,
    image: str | Path | None = None,
    mask: str | Path | None = None,
    log_probs: bool = False,
    precision: Precision | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    **drawing: Any,
) -> Report:
    """Draws `num_candidates` for each prompt and writes the best `num_images` (4) into the folder `output`.

    `drawing` are what a call of the pipeline takes: temperature, top_k, top_p, min_p, guidance_scale,
    guidance_schedule, plausibility and likelihood_weight, by default the bundle's; negative_prompt, candidate_budget
    and prune_by. `top_of` is a picture of which the upper `top_rows` of codes (half) stay; of the picture `image` all
    stays but what is white in `mask`. `precision` is what the prior's weights are kept in (`make_engine`). `loras`
    are folders with their weights.
    All prompts use the same seeds. `sheet` adds a contact sheet of all finished candidates with their scores.
    Everything is checked before the first picture is drawn, and a file is written whole or not at all. Raises
    InputError.
    """
    start = time.perf_counter()
    prompts = check_prompts(prompts)
    if (image is None) != (mask is None):
        raise InputError("a picture is drawn anew where its mask is white; give --image and --mask together")
    if image is not None and top_of is not None:
        raise InputError("--image keeps what its mask leaves, and --top-of upper rows; give one of them")
    opened = None if top_of is None else open_image(top_of)
    masked = None if image is None or mask is None else (open_image(image), open_mask(mask))
    pipeline = TextToImagePipeline.from_pretrained(model, device=device, rerank=rerank)
    for lora, weight in loras:
        pipeline.load_lora_weights(lora, weight)
    pipeline.precision = precision
    first_codes = None if opened is None else pipeline.codes_of_top(opened, top_rows)
    known_codes = None if masked is None else pipeline.codes_outside(*masked)
    origin = Origin(
        prompt="",
        seed=seed,
        sampling=pipeline.settings(**{name: drawing.get(name) for name in Sampling.model_fields}),
        bundle=pipeline.fingerprint or "",
        model=public_name(model),
        version=tessera_version(),
        loras=_origins(pipeline),
        negative_prompt=drawing.get("negative_prompt") or None,
        first_codes=None if first_codes is None else tuple(first_codes.tolist()),
        known_codes=None if known_codes is None else tuple(known_codes.tolist()),
        precision=precision,
    )
    with _bar(len(prompts) * num_candidates) as bar:
        generated = pipeline.stream(
            prompts,
            num_candidates=num_candidates,
            seed=seed,
            first_codes=first_codes,
            known_codes=known_codes,
            log_probs=log_probs,
            progress=lambda done, total: bar.update(done * bar.total // total - bar.n),
            **drawing,
        )
        finished = pipeline.count_finished(num_candidates, drawing.get("candidate_budget"))
        keep = check_keep(num_images, num_candidates, finished)
        with _output_folder(expand(output)) as folder:
            begun = time.perf_counter()
            drawn = [
                _write(folder, origin.model_copy(update={"prompt": prompt}), candidates, keep, sheet)
                for prompt, candidates in zip(prompts, generated, strict=True)
            ]
    end = time.perf_counter()
    count = len(prompts) * finished
    return Report(drawn, len(prompts) * num_candidates, count, end - start, count / (end - begun))


def replay(
    picture: str | Path,
    output: str | Path,
    *,
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    segmentation: str | Path | None = None,
) -> Replayed:
    """Draws a PNG of `generate` again from what it remembers, and writes it into the folder `output`.

    `model` is the bundle, by default the one that the picture names; `loras` are the folders of those that it was drawn
    with, with the weights that they had; `segmentation` is the file of the map that it was drawn from. Raises
    InputError when the picture remembers nothing or is a contact sheet, or when the bundle or the LoRAs are not those
    that it was drawn with.
    """
    start = time.perf_counter()
    origin = _read(expand(picture))
    if origin.seeds is not None:
        raise InputError(f"{picture} is a contact sheet; replay one of the pictures instead")
    name = origin.model if model is None else model
    try:
        found = bundle_fingerprint(name)
    except InputError as error:
        raise InputError(
            f"{picture} was drawn with the bundle {origin.bundle}: {error}; name it with --model"
        ) from None
    if not draws_pictures_of(name, origin.bundle):
        raise InputError(
            f"{picture} was drawn with the bundle {origin.bundle}, but {name} is {found} and draws other pictures; "
            "name the right bundle with --model"
        )
    before = open_image(picture)
    pipeline = TextToImagePipeline.from_pretrained(name, device=device, rerank=False)
    for lora, weight in loras:
        pipeline.load_lora_weights(lora, weight)
    if (_origins(pipeline) or ()) != (origin.loras or ()):
        wanted = " ".join(f"--lora FOLDER:{one.weight:g} ({one.name}, {one.fingerprint})" for one in origin.loras or ())
        raise InputError(f"{picture} was drawn with {wanted or 'no LoRA'}; give exactly that")
    pipeline.precision = origin.precision
    with _output_folder(expand(output)) as folder:
        image = pipeline(
            origin.prompt if segmentation is None else SegmentationMap(segmentation),
            num_candidates=1,
            seed=origin.seed,
            sampling=origin.sampling,  # not the bundle's own, which may have changed since
            negative_prompt=origin.negative_prompt,
            first_codes=origin.first_codes,
            known_codes=origin.known_codes,
        ).images[0]
        path = _free_path(folder, f"{slug(origin.prompt)}-seed{origin.seed}", origin)
        save_png(image, path, _content(origin))
    same = before.size == image.size and ImageChops.difference(before, image).getbbox() is None
    return Replayed(str(path), same, time.perf_counter() - start)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a JSONL file: each line a string, or an object with `prompt`, whose other keys are not looked at.

    Raises InputError: no such file, a line that is neither, no prompts.
    """
    path, prompts = expand(path), []
    for where, content in read_json_lines(path, LIKE_THIS):
        prompt = content.get("prompt") if isinstance(content, dict) else content
        if not isinstance(prompt, str):
            raise InputError(f"{where} has no prompt; {LIKE_THIS}")
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
    return os.fsdecode(name.encode()) or "picture"  # UTF-8 on the disk where the locale is another one too


def _is_word(character: str) -> bool:
    """Letters, digits and the vowel signs of scripts that write them apart, but not an emoji's variation selectors."""
    return character.isalnum() or (
        unicodedata.category(character) in ("Mn", "Mc") and not "\ufe00" <= character <= "\ufe0f"
    )


def public_name(model: str | Path) -> str:
    """What a picture may tell about its bundle: a shipped or hub name, of a folder only the last part."""
    if str(model) in shipped_bundles() or not is_folder(expand(model)):
        return str(model)
    return expand(model).resolve().name


def _write(folder: Path, origin: Origin, candidates: Generated, keep: int, sheet: bool) -> Drawn:
    """Writes the best `keep` of a prompt's ranked candidates, and the contact sheet of all."""
    count = len(candidates.seeds)
    scores, log_probs, drawn_log_probs = (
        [None] * count if values is None else [round(float(value), 6) for value in values]
        for values in (candidates.scores, _sums(candidates.log_probs), _sums(candidates.drawn_log_probs))
    )
    pictures = []
    for rank in range(keep):
        changes = {"seed": candidates.seeds[rank], "score": scores[rank], "log_prob": log_probs[rank]}
        own = origin.model_copy(update=changes)
        path = _free_path(folder, f"{slug(origin.prompt)}-{rank + 1:0{len(str(keep))}d}-seed{own.seed}", own)
        save_png(candidates.images[rank], path, _content(own))
        pictures.append(Picture(str(path), own.seed, own.score, own.log_prob, drawn_log_probs[rank]))
    if not sheet:
        return Drawn(origin.prompt, pictures, None)

    own = origin.model_copy(update={"seeds": tuple(candidates.seeds)})
    labels = [
        f"{seed}" if score is None else f"{score:.3f} #{seed}"
        for seed, score in zip(candidates.seeds, scores, strict=True)
    ]
    scale = max(1, 128 // candidates.images[0].width)  # so that the labels fit below
    path = _free_path(folder, f"{slug(origin.prompt)}-candidates", own)
    save_png(contact_sheet(candidates.images, labels, min(SHEET_COLUMNS, count), scale), path, _content(own))
    return Drawn(origin.prompt, pictures, str(path))


def _sums(log_probs: Tensor | None) -> list[float] | None:
    """(n, T) -> the sum of each row."""
    return None if log_probs is None else log_probs.double().sum(-1).tolist()


def _free_path(folder: Path, stem: str, origin: Origin) -> Path:
    """`stem.png`, or `stem (2).png` and so on: the first that is not there yet or that is this very picture."""
    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem} ({number}).png")
        if not os.path.lexists(path) or _is_the_same(path, origin):
            return path
        number += 1


def _origins(pipeline: TextToImagePipeline) -> tuple[OriginLora, ...] | None:
    applied = [(lora.name, lora.fingerprint, weight) for lora, weight in pipeline.loras.applied]
    origins = tuple(OriginLora(name=name, fingerprint=own, weight=weight) for name, own, weight in applied)
    return origins or None


def _is_the_same(path: Path, origin: Origin) -> bool:
    try:
        other = _read(path)
    except InputError:
        return False
    # The same drawing may be scored by another reranker, and be told from by another version.
    unlike = {"score": None, "log_prob": None, "version": "", "model": ""}
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
