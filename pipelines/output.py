"""`tessera generate` behind the command line: prompts in, PNG files and a contact sheet out.

A file is named after its prompt, its rank and its seed: `a-red-heart-above-a-blue-circle-1-seed7.png`; the sheet of all
candidates ends in `-candidates.png`. Nothing of others is overwritten: a file that is there already is replaced only
when it remembers the same request and bundle, that is when it is the same image generated before; otherwise the new one
gets a number, `...-seed7 (2).png`.
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
from torch import Tensor
from tqdm import tqdm

from pipelines.bundle import shipped_bundles, tessera_version
from pipelines.generate import Generated
from pipelines.pruning import count_finished
from pipelines.record import ImageRecord, RecordedLora, read_record
from pipelines.request import Prompt, Request
from pipelines.text_to_image import TextToImagePipeline
from stage2_prior.sampling.settings import Precision
from tessera.errors import InputError
from tessera.files import read_json_lines
from tessera.images import contact_sheet, open_image, open_mask, save_png
from tessera.paths import expand, is_folder

MOST_NAME_BYTES = 120  # of the part of a file name that comes from the prompt
SHEET_COLUMNS = 8
LIKE_THIS = 'each line must look like {"prompt": "a red heart"}'


@dataclass(frozen=True)
class ImageFile:
    path: str
    seed: int
    score: float | None
    log_prob: float | None  # sum over the codes, see `pipelines.generate.Generated`; None unless asked for
    drawn_log_prob: float | None


@dataclass(frozen=True)
class PromptFiles:
    """What one prompt gave, best first."""

    prompt: str
    images: list[ImageFile]
    sheet: str | None  # path of the contact sheet


@dataclass(frozen=True)
class Report:
    prompts: list[PromptFiles]
    candidates: int
    finished: int  # of the candidates; fewer with a candidate_budget
    seconds: float  # in all, with loading and writing
    images_per_second: float  # finished ones sampled, decoded, scored and written, without loading


def generate(
    prompts: Any,
    output: str | Path,
    *,
    model: str | Path = "emoji",
    sheet: bool = True,
    device: str | torch.device | None = None,
    precision: Precision | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    top_of: str | Path | None = None,
    top_rows: int | None = None,
    image: str | Path | None = None,
    mask: str | Path | None = None,
    **settings: Any,
) -> Report:
    """Samples the candidates of each prompt and writes the best images into the folder `output`.

    `settings` are those of a call of the pipeline. `top_of` is an image of which the upper `top_rows` of codes (half)
    stay; of `image` all stays but what is white in `mask`. `precision` is what the prior's weights are kept in
    (`make_engine`). `loras` are folders with their weights. All prompts use the same seeds. `sheet` adds a contact
    sheet of all finished candidates with their scores. Everything is checked before the first image is sampled, and a
    file is written whole or not at all. Raises InputError.
    """
    start = time.perf_counter()
    request = Request.make(prompts, **settings)
    if (image is None) != (mask is None):
        raise InputError("an image is sampled anew where its mask is white; give --image and --mask together")
    if image is not None and top_of is not None:
        raise InputError("--image keeps what its mask leaves, and --top-of upper rows; give one of them")
    opened = None if top_of is None else open_image(top_of)
    masked = None if image is None or mask is None else (open_image(image), open_mask(mask))
    pipeline = TextToImagePipeline.from_pretrained(model, device=device, rerank=request.rerank)
    for lora, weight in loras:
        pipeline.load_lora_weights(lora, weight)
    pipeline.precision = precision
    if opened is not None:
        request = Request.make(prompts, **settings, first_codes=pipeline.codes_of_top(opened, top_rows))
    if masked is not None:
        request = Request.make(prompts, **settings, known_codes=pipeline.codes_outside(*masked))
    resolved = request.resolved(pipeline.sampling, pipeline.bundle.likelihood_weight)
    count = len(request.prompts) * len(request.candidate_seeds)
    with _bar(count) as bar:

        def show(done: int, total: int) -> None:
            bar.update(done * bar.total // total - bar.n)

        generated = pipeline.stream(request, progress=show)
        finished = count_finished(request, pipeline.bundle)
        keep = request.kept(finished)
        with output_folder(expand(output)) as folder:
            begun = time.perf_counter()
            written = [
                _write(folder, prompt, resolved, candidates, record_of(pipeline, model), keep, sheet)
                for prompt, candidates in zip(request.prompts, generated, strict=True)
            ]
    end = time.perf_counter()
    finished *= len(request.prompts)
    return Report(written, count, finished, end - start, finished / (end - begun))


def record_of(pipeline: TextToImagePipeline, model: str | Path) -> dict[str, Any]:
    """What all images of a pipeline remember of it."""
    applied = [(lora.name, lora.fingerprint, weight) for lora, weight in pipeline.loras.applied]
    loras = tuple(RecordedLora(name=name, fingerprint=digest, weight=weight) for name, digest, weight in applied)
    return {
        "bundle": pipeline.fingerprint or "",
        "model": public_name(model),
        "version": tessera_version(),
        "loras": loras or None,
        "precision": pipeline.precision,
    }


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
    """What an image may tell about its bundle: a shipped or hub name, of a folder only the last part."""
    if str(model) in shipped_bundles() or not is_folder(expand(model)):
        return str(model)
    return expand(model).resolve().name


def _write(
    folder: Path,
    prompt: Prompt,
    request: Request,
    candidates: Generated,
    shared: dict[str, Any],
    keep: int,
    sheet: bool,
) -> PromptFiles:
    """Writes the best `keep` of a prompt's ranked candidates, and the contact sheet of all."""
    count, name = len(candidates.seeds), slug(str(prompt))
    scores, log_probs, drawn_log_probs = (
        [None] * count if values is None else [round(float(value), 6) for value in values]
        for values in (candidates.scores, _sums(candidates.log_probs), _sums(candidates.drawn_log_probs))
    )
    files = []
    for rank in range(keep):
        seed = candidates.seeds[rank]
        again = request.of_image(prompt, seed)
        record = ImageRecord(request=again, score=scores[rank], log_prob=log_probs[rank], **shared)
        path = free_path(folder, f"{name}-{rank + 1:0{len(str(keep))}d}-seed{seed}", record)
        save_png(candidates.images[rank], path, record.dumped())
        files.append(ImageFile(str(path), seed, scores[rank], log_probs[rank], drawn_log_probs[rank]))
    if not sheet:
        return PromptFiles(str(prompt), files, None)

    again = request.of_image(prompt, request.candidate_seeds[0])
    record = ImageRecord(request=again, seeds=tuple(candidates.seeds), **shared)
    labels = [
        f"{seed}" if score is None else f"{score:.3f} #{seed}"
        for seed, score in zip(candidates.seeds, scores, strict=True)
    ]
    scale = max(1, 128 // candidates.images[0].width)  # so that the labels fit below
    path = free_path(folder, f"{name}-candidates", record)
    save_png(contact_sheet(candidates.images, labels, min(SHEET_COLUMNS, count), scale), path, record.dumped())
    return PromptFiles(str(prompt), files, str(path))


def _sums(log_probs: Tensor | None) -> list[float] | None:
    """(n, T) -> the sum of each row."""
    return None if log_probs is None else log_probs.double().sum(-1).tolist()


def free_path(folder: Path, stem: str, record: ImageRecord) -> Path:
    """`stem.png`, or `stem (2).png` and so on: the first that is not there yet or that is this very image."""
    number = 1
    while True:
        path = folder / (f"{stem}.png" if number == 1 else f"{stem} ({number}).png")
        if not os.path.lexists(path) or _is_the_same(path, record):
            return path
        number += 1


def _is_the_same(path: Path, record: ImageRecord) -> bool:
    try:
        return read_record(path).comparable() == record.comparable()
    except InputError:
        return False


@contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """Makes the folder where it is missing, and sees that it can be written; one left empty by an error is removed."""
    created = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        _remove_empty(created)
        raise InputError(f"cannot write the output folder {folder}: {error.strerror}; choose another one") from None
    try:
        yield folder
    except BaseException:
        _remove_empty(created)
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Removes those of `folders`, deepest first, that are there and have nothing in them."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _bar(total: int) -> Any:
    return tqdm(total=total, unit="image", dynamic_ncols=True, disable=not sys.stderr.isatty())
