"""Prompt -> ranked pictures: the prior draws candidates, the image tokenizer decodes them, the reranker orders them.

Letters: N candidates, Q codebooks, h w code grid, T = Q·h·w codes an image, H W pixels, P prefix.
"""

import math
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor

from common.config import validate
from common.errors import InputError
from common.images import to_pil
from pipelines.bundle import load_bundle, save_bundle
from pipelines.conditions import prompt_prefix
from rerank import ClipReranker
from stage1_tokenizer import Autoencoder
from stage2_prior import Sampling, sample, unflatten_codes
from stage2_prior.base import Prior

MOST_CHARACTERS = 32_000  # of a prompt
MOST_ROWS = 64  # candidates drawn at once unless told otherwise; more do not get faster on a CPU
LARGEST_SEED = 2**53 - 1  # JSON and JavaScript read numbers up to here exactly

Progress = Callable[[int, int], None]  # codes drawn so far, codes to draw in all


class Reranker(Protocol):
    def score(self, prompt: str, images: Tensor, codes: Tensor) -> Tensor:
        """A prompt, (N, 3, H, W) in [-1, 1] and (N, Q, h, w) -> (N,), higher fits better."""


class Candidate(NamedTuple):
    image: Image.Image
    score: float | None  # None when nothing was reranked
    seed: int
    codes: Tensor  # (Q, h, w) int64


class Generated(NamedTuple):
    """Prompt after prompt, best first; without a reranker in the order of the seeds."""

    images: list[Image.Image]
    scores: list[float] | None  # None when nothing was reranked
    seeds: list[int]  # pipeline(prompt, seed=s, num_candidates=1) draws that image again
    codes: Tensor  # (number of images, Q, h, w) int64


class TextToImagePipeline:
    """What `from_pretrained` loads and a call draws with."""

    def __init__(
        self,
        image_tokenizer: Autoencoder,
        prior: Prior,
        reranker: Reranker | None = None,
        sampling: Sampling | None = None,
        fingerprint: str | None = None,
        segmentation_tokenizer: Autoencoder | None = None,
    ) -> None:
        """`sampling` is what a call draws with unless told otherwise; `fingerprint` is the bundle's, None without.

        A prior that draws from segmentation maps needs the tokenizer of these.
        """
        self.image_tokenizer, self.prior, self.reranker = image_tokenizer, prior, reranker
        self.sampling, self.fingerprint = sampling or Sampling(), fingerprint
        self.segmentation_tokenizer = segmentation_tokenizer

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "emoji",
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        rerank: bool = True,
    ) -> "TextToImagePipeline":
        """A bundle shipped with the package, a local folder or a hub name, on a GPU if there is one.

        `rerank` False leaves the reranker out, which saves seconds. Raises InputError for an unknown or damaged bundle.
        """
        return cls(*load_bundle(name, device=find_device(device), dtype=dtype, rerank=rerank))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the pipeline as a bundle."""
        if not isinstance(self.reranker, ClipReranker | None):
            raise InputError(f"a {type(self.reranker).__name__} cannot be saved in a bundle, only a ClipReranker can")
        save_bundle(folder, self.image_tokenizer, self.prior, self.reranker, self.sampling, self.segmentation_tokenizer)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        num_images_per_prompt: int | None = None,
        num_candidates: int = 16,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        rerank: bool = True,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Generated:
        """Draws `num_candidates` for each prompt and returns the `num_images_per_prompt` (4) that fit best, best first.

        A prompt is text, or, where the prior draws from these, a `ClassLabel` or `SegmentationMap` of conditions.py.
        Candidate i has seed `seed + i`, or `seeds[i]`; a picture depends on prompt, seed and sampling alone. Sampling
        arguments that are None are the bundle's; top_k 0 takes all codes, as does top_p 1. `batch_size` candidates are
        drawn at once, by default as many as fit in memory up to 64. Everything is checked before the first is drawn.

        Raises InputError: a prompt that is empty, binary, without words or too long; counts, seeds or sampling out of
        range; more than fits in memory.
        """
        prompts = check_prompts(prompt)
        seeds = check_seeds(num_candidates, seed, seeds)
        keep = check_keep(num_images_per_prompt, len(seeds))
        sampling = self.settings(temperature=temperature, top_k=top_k, top_p=top_p, guidance_scale=guidance_scale)
        rows = self._rows(len(prompts), len(seeds), keep, sampling, batch_size)
        prefixes = self.prefixes(prompts)
        reranker = self.reranker if rerank else None

        best: list[Candidate] = []
        for candidates in self._draw(prompts, prefixes, seeds, sampling, reranker, rows, progress):
            best += sorted(candidates, key=_best_first)[:keep]
        scores = [candidate.score for candidate in best if candidate.score is not None]
        return Generated(
            [candidate.image for candidate in best],
            scores if reranker is not None else None,
            [candidate.seed for candidate in best],
            torch.stack([candidate.codes for candidate in best]),
        )

    def settings(self, **changes: Any) -> Sampling:
        """The bundle's sampling settings with those `changes` that are not None. Raises InputError out of range."""
        given = {name: value for name, value in changes.items() if value is not None}
        for name, value in given.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, got {value}")
        if given.get("top_k") == 0:
            given["top_k"] = None
        return validate(Sampling, {**self.sampling.model_dump(), **given}, where="sampling")

    def prefixes(self, prompts: Sequence[str]) -> Tensor:
        """What the prior reads, (prompts, P). Raises InputError for the first prompt that is too long for it."""
        return torch.cat([_named(prompts, i, self._prefix) for i in range(len(prompts))])

    def _prefix(self, prompt: str) -> Tensor:
        return prompt_prefix(self.prior, prompt, self.segmentation_tokenizer)

    # Inside ----------------------------------------------------------------------------------------------------------

    def _draw(
        self,
        prompts: list[str],
        prefixes: Tensor,
        seeds: Sequence[int],
        sampling: Sampling,
        reranker: Reranker | None,
        rows: int,
        progress: Progress | None,
    ) -> Iterator[list[Candidate]]:
        """All candidates of each prompt in the order of the seeds, prompt after prompt."""
        total, done = len(prompts) * len(seeds) * self.prior.length, 0
        drawn: list[Candidate] = []  # of the prompt under way
        for first, last, batch in batches(len(prompts), seeds, rows):
            count = (last - first) * len(batch)  # N

            def report(position: int, before: int = done, count: int = count) -> None:
                if progress is not None:
                    progress(before + (position + 1) * count, total)

            sequences = sample(
                self.prior, prefixes[first:last], list(batch) * (last - first), sampling, report
            )  # (N, T)
            codes = unflatten_codes(sequences, self.image_tokenizer.code_shape)  # (N, Q, h, w)
            for text, own in zip(prompts[first:last], codes.split(len(batch)), strict=True):
                drawn += self._candidates(text, batch, own, reranker)
                if len(drawn) == len(seeds):
                    yield drawn
                    drawn = []
            done += count * self.prior.length

    def _candidates(
        self, prompt: str, seeds: Sequence[int], codes: Tensor, reranker: Reranker | None
    ) -> list[Candidate]:
        """Decodes and scores the codes (N, Q, h, w) of one prompt."""
        # Convolutions of a larger batch add up in another order, which can move a pixel by 1/255: on a CPU, where that
        # costs little, pictures are decoded one by one, so that each is the same in any company.
        together = 1 if codes.device.type == "cpu" else 16
        images = torch.cat([self.image_tokenizer.decode(some) for some in codes.split(together)])  # (N, 3, H, W)
        scores = [None] * len(seeds) if reranker is None else reranker.score(prompt, images, codes).tolist()
        return [Candidate(*parts) for parts in zip(to_pil(images), scores, seeds, codes.cpu(), strict=True)]

    def _rows(self, prompts: int, candidates: int, keep: int, sampling: Sampling, batch_size: int | None) -> int:
        """How many candidates to draw at once. Raises InputError when the call as a whole does not fit in memory."""
        device = next(self.prior.parameters()).device
        row, picture = self._row_bytes(sampling), self._picture_bytes()
        wanted = min(MOST_ROWS if batch_size is None else _count("batch_size", batch_size), prompts * candidates)
        results = (prompts * keep + candidates) * picture  # of all prompts so far, and the prompt under way
        least = row * (1 if batch_size is None else wanted)
        for need, place in ((results, torch.device("cpu")), (least + (device.type == "cpu") * results, device)):
            there = free_memory(place)
            if need > there:
                raise InputError(
                    f"{candidates:,} candidates for {prompts:,} prompts need about {need / 1e9:,.1f} GB of memory, and "
                    f"{there / 1e9:,.1f} GB are free; ask for fewer"
                )
        return wanted if batch_size is not None else max(1, min(wanted, int(free_memory(device) / 2 // row)))

    def _row_bytes(self, sampling: Sampling) -> int:
        """Roughly what drawing and decoding one more candidate takes: keys and values, logits, pixels."""
        numbers = self.prior.cache_numbers() + 8 * self.prior.codebook_size
        guided = 2 if sampling.guidance_scale != 1 else 1
        return 4 * (guided * numbers + 3 * self.image_tokenizer.image_size**2 * 8)

    def _picture_bytes(self) -> int:
        """A candidate as it is kept: 8-bit pixels, int64 codes, and what Python adds."""
        return 3 * self.image_tokenizer.image_size**2 + 8 * self.prior.length + 1000


# Checks ---------------------------------------------------------------------------------------------------------------


def check_prompts(prompt: str | Sequence[str]) -> list[str]:
    """The prompt or prompts as a list. Raises InputError for the first that says nothing."""
    if not isinstance(prompt, Sequence):
        raise InputError(f"a prompt must be text, got {type(prompt).__name__}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise InputError("there are no prompts; give at least one")
    for i in range(len(prompts)):
        _named(prompts, i, check_prompt)
    return prompts


def check_prompt(prompt: str) -> None:
    """Raises InputError unless the prompt is text with words in it, of a reasonable length."""
    if not isinstance(prompt, str):
        raise InputError(f"a prompt must be text, got {type(prompt).__name__}")
    if not prompt.strip():
        raise InputError("the prompt is empty; say what the picture should show")
    if len(prompt) > MOST_CHARACTERS:
        raise InputError(f"the prompt has {len(prompt):,} characters, at most {MOST_CHARACTERS:,} are read; shorten it")
    for character in prompt:
        # Control characters, and the surrogates that stand for bytes which are not UTF-8.
        if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n\r":
            raise InputError(
                f"the prompt looks like binary data, it has the character U+{ord(character):04X}; give text"
            )
    if not any(character.isalnum() for character in prompt):
        raise InputError(f"the prompt '{prompt[:20]}' has no letter or digit; describe the picture in words")


def check_seeds(num_candidates: int, seed: int, seeds: Sequence[int] | None) -> Sequence[int]:
    """The seed of each candidate. Raises InputError for counts below 1 and seeds outside of 0 .. 2^53 - 1."""
    if seeds is None:
        count = _count("num_candidates", num_candidates)
        last = _count("seed", seed, least=0) + count - 1
        if last > LARGEST_SEED:
            raise InputError(
                f"the seeds of {count:,} candidates from {seed:,} on go beyond {LARGEST_SEED:,}; ask for less"
            )
        return range(seed, seed + count)
    chosen = [_count("each of seeds", one, least=0) for one in seeds]
    if not chosen or max(chosen) > LARGEST_SEED:
        raise InputError(f"seeds must be at least one number of at most {LARGEST_SEED:,}")
    return chosen


def check_keep(num_images: int | None, num_candidates: int) -> int:
    """How many pictures of a prompt are returned. Raises InputError unless 1 <= num_images <= num_candidates."""
    keep = _count("num_images_per_prompt", min(4, num_candidates) if num_images is None else num_images)
    if keep > num_candidates:
        raise InputError(f"num_images_per_prompt must be at most num_candidates {num_candidates:,}, got {keep:,}")
    return keep


def _count(name: str, value: int, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r:.40}")
    return value


def _named(prompts: Sequence[str], i: int, check: Callable[[str], Any]) -> Any:
    """`check(prompts[i])`; where there are several prompts, its error says which it is about."""
    try:
        return check(prompts[i])
    except InputError as error:
        raise InputError(f"prompt {i + 1} of {len(prompts)}: {error}" if len(prompts) > 1 else str(error)) from None


# Batches and machines -------------------------------------------------------------------------------------------------


def batches(prompts: int, seeds: Sequence[int], rows: int) -> Iterator[tuple[int, int, Sequence[int]]]:
    """(first prompt, last prompt + 1, seeds) of each batch of at most `rows` candidates, prompt after prompt.

    Several prompts with all of their seeds where that fits, else one prompt with some of them.
    """
    if len(seeds) <= rows:
        several = rows // len(seeds)
        for first in range(0, prompts, several):
            yield first, min(first + several, prompts), seeds
    else:
        for prompt in range(prompts):
            for start in range(0, len(seeds), rows):
                yield prompt, prompt + 1, seeds[start : start + rows]


def find_device(device: str | torch.device | None) -> torch.device:
    """`device`, or a GPU if there is one. Raises InputError when it is not there."""
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"the device '{device}' is not there; use 'cpu' or leave it out") from None
    return chosen


def free_memory(device: torch.device) -> int:
    """Bytes that can still be used on a GPU, or on this machine within the limits of its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    return min(free, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else free


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:  # not Linux, or no control groups
        return ""


def _best_first(candidate: Candidate) -> float:
    return 0 if candidate.score is None else -candidate.score
