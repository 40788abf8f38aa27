"""What is asked of a pipeline: validated once, here, whoever asks.

A `Request` is made by the keywords of a call, the command line, evaluation recipes and `--replay`; its dump is what a
PNG remembers. What depends on the model (how many codes an image has, whether guidance is supported) is checked against
it in `generate.py`, before anything is sampled.
"""

import math
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from torch import Tensor

from stage2_prior import Sampling
from tessera.config import Config, validate
from tessera.errors import InputError, nearest
from tessera.paths import expand, is_file
from tessera.text.normalization import visible

MOST_CHARACTERS = 32_000  # of a prompt
LARGEST_SEED = 2**53 - 1  # JSON and JavaScript read numbers up to here exactly
MISSING = -1  # among known codes: one that is to be sampled
OFF_AT_ZERO = ("top_k", "min_p", "plausibility")  # of the sampling settings


class TextPrompt(Config):
    """A text. `class 207` is a label where the prior is conditioned on class labels."""

    type: Literal["text"] = "text"
    text: str

    def __init__(self, text: str, **rest: Any) -> None:
        super().__init__(**{"text": text, **rest})

    def __str__(self) -> str:
        return self.text


class ClassLabel(Config):
    """The number of a class, or its name where the prior has names."""

    type: Literal["class"] = "class"
    label: int | str

    def __init__(self, label: int | str, **rest: Any) -> None:
        super().__init__(**{"label": label, **rest})

    def __str__(self) -> str:
        return f"class {self.label}"


class SegmentationMap(Config):
    """The file of a segmentation map. Raises InputError when there is no such file."""

    type: Literal["segmentation"] = "segmentation"
    path: Path

    def __init__(self, path: str | Path, **rest: Any) -> None:
        path = expand(path)
        if not is_file(path):
            raise InputError(f"{path} does not exist; give the file of a segmentation map")
        super().__init__(**{"path": path, **rest})

    def __str__(self) -> str:
        return f"segmentation {self.path.name}"


class NoPrompt(Config):
    """For a prior that was trained without any condition."""

    type: Literal["none"] = "none"

    def __str__(self) -> str:
        return "no condition"


Prompt = Annotated[TextPrompt | ClassLabel | SegmentationMap | NoPrompt, Field(discriminator="type")]
PROMPTS = (TextPrompt, ClassLabel, SegmentationMap, NoPrompt)


def whole_number(name: str, value: Any, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r:.40}")
    return value


def _whole(name: str, least: int = 1) -> BeforeValidator:
    return BeforeValidator(lambda value: None if value is None else whole_number(name, value, least))


def _codes(name: str) -> BeforeValidator:
    """Codes of a caller, a tensor or a sequence, as a tuple."""

    def read(value: Any) -> tuple[int, ...] | None:
        if value is None:
            return None
        try:
            codes = value if isinstance(value, Tensor) else torch.tensor(list(value))
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"{name} must be whole numbers") from None
        whole = not (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool)
        if codes.ndim != 1 or (len(codes) and not whole):
            raise InputError(f"{name} must be (n,) whole numbers, got {tuple(codes.shape)} of {codes.dtype}")
        return tuple(int(code) for code in codes.tolist())

    return BeforeValidator(read)


class Request(Config):
    prompts: tuple[Prompt, ...]
    num_images_per_prompt: Annotated[int | None, _whole("num_images_per_prompt")] = None  # kept; None: up to 4
    num_candidates: Annotated[int, _whole("num_candidates")] = 16  # sampled for each prompt
    seed: Annotated[int, _whole("seed", least=0)] = 0  # of the first candidate; the next ones count up
    seeds: tuple[int, ...] | None = None  # of each candidate, in place of the two above
    sampling: Sampling | None = None  # None: the bundle's
    changes: dict[str, Any] = {}  # to single settings of it by name; top_k, min_p and plausibility 0 turn them off
    negative_prompt: str | None = None  # takes the place of the empty prompt that guidance steers away from
    first_codes: Annotated[tuple[int, ...] | None, _codes("first_codes")] = None  # of every image; the rest is sampled
    known_codes: Annotated[tuple[int, ...] | None, _codes("known_codes")] = None  # (T,) of every image, -1 for missing
    rerank: bool = True
    likelihood_weight: float | None = None  # of log p(codes | prompt) in nats beside the score; None: the bundle's
    candidate_budget: float | None = None  # share of all candidates' codes that may be sampled; the rest is pruned
    prune_by: Literal["likelihood", "reranker"] = "likelihood"
    log_probs: bool = False  # returned as well
    batch_size: Annotated[int | None, _whole("batch_size")] = None  # candidates at once; None: what fits, up to 64

    @classmethod
    def make(cls, prompt: Any, **settings: Any) -> "Request":
        """From the keywords of a call: `prompt` is one or several, single sampling settings stand among the others.

        Raises InputError for the first thing that is wrong, and for unknown keywords with the nearest name.
        """
        changes = {name: settings.pop(name) for name in Sampling.model_fields if name in settings}
        unknown = [name for name in settings if name not in cls.model_fields or name in ("prompts", "changes")]
        if unknown:
            raise InputError(f"there is no setting '{unknown[0]}'{nearest(unknown[0], keywords())}")
        changes = {name: value for name, value in changes.items() if value is not None}
        return cls.validated({**settings, "prompts": read_prompts(prompt), "changes": changes})

    @classmethod
    def validated(cls, values: Any) -> "Request":
        """Raises InputError, one sentence for the first thing that is wrong."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            cause = first.get("ctx", {}).get("error")
            if isinstance(cause, InputError):
                raise cause from None
            if first["loc"][:1] == ("prune_by",):
                raise InputError(f"prune_by must be 'likelihood' or 'reranker', got '{first.get('input')}'") from None
            key = ".".join(str(part) for part in first["loc"])
            raise InputError(f"{key or 'the request'}: {first['msg']}, got {first.get('input')!r:.60}") from None

    @field_validator("prompts", mode="after")
    @classmethod
    def _prompts_say_something(cls, prompts: tuple[Prompt, ...]) -> tuple[Prompt, ...]:
        if not prompts:
            raise InputError("there are no prompts; give at least one")
        for number, prompt in enumerate(prompts, 1):
            of_several(number, len(prompts), check_text, str(prompt))
        return prompts

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds_are_whole(cls, seeds: Any) -> tuple[int, ...] | None:
        if seeds is None:
            return None
        if not isinstance(seeds, Sequence):
            raise InputError(f"seeds must be whole numbers, got {type(seeds).__name__}")
        chosen = tuple(whole_number("each of seeds", one, least=0) for one in seeds)
        if not chosen or max(chosen) > LARGEST_SEED:
            raise InputError(f"seeds must be at least one number of at most {LARGEST_SEED:,}")
        return chosen

    @field_validator("negative_prompt", mode="before")
    @classmethod
    def _negative_prompt_says_something(cls, text: Any) -> Any:
        if not text:
            return None
        check_text(text, "negative prompt")
        return text

    @field_validator("likelihood_weight", mode="before")
    @classmethod
    def _weight_is_finite(cls, weight: Any) -> float | None:
        return None if weight is None else check_likelihood_weight(weight)

    @field_validator("candidate_budget", mode="before")
    @classmethod
    def _budget_is_a_share(cls, budget: Any) -> float | None:
        if budget is None or budget == 1:
            return None
        if not isinstance(budget, float | int) or not 0 < budget < 1:
            raise InputError(f"candidate_budget must be above 0 and at most 1, got {budget}")
        return float(budget)

    @model_validator(mode="after")
    def _consistent(self) -> "Request":
        last = self.seed + self.num_candidates - 1
        if self.seeds is None and last > LARGEST_SEED:
            raise InputError(
                f"the seeds of {self.num_candidates:,} candidates from {self.seed:,} on go beyond {LARGEST_SEED:,}; "
                "ask for less"
            )
        self.sampled_with(Sampling())
        if self.first_codes and self.known_codes is not None:
            raise InputError("known_codes say of every code whether it is given; leave first_codes out")
        return self

    def sampled_with(self, default: Sampling) -> Sampling:
        """The settings that the codes are sampled with, `default` where nothing else was asked for."""
        for name, value in self.changes.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{name} must be a finite number, got {value}")
        off = {name: None for name in OFF_AT_ZERO if self.changes.get(name) == 0}
        values = (self.sampling or default).model_dump()
        return validate(Sampling, {**values, **self.changes, **off}, where="sampling")

    def resolved(self, sampling: Sampling, likelihood_weight: float) -> "Request":
        """With a bundle's defaults where nothing else was asked for."""
        weight = likelihood_weight if self.likelihood_weight is None else self.likelihood_weight
        update = {"sampling": self.sampled_with(sampling), "changes": {}, "likelihood_weight": weight}
        return self.model_copy(update=update)

    def of_image(self, prompt: Prompt, seed: int) -> "Request":
        """The request that samples one of this one's images again, as a file remembers it: of a map its name alone."""
        if isinstance(prompt, SegmentationMap):
            prompt = TextPrompt(str(prompt))
        same = {"sampling": self.sampling, "negative_prompt": self.negative_prompt}
        codes = {"first_codes": self.first_codes, "known_codes": self.known_codes}
        return Request(prompts=(prompt,), num_candidates=1, seed=seed, **same, **codes)

    @property
    def candidate_seeds(self) -> Sequence[int]:
        """The seed of each candidate of a prompt."""
        return range(self.seed, self.seed + self.num_candidates) if self.seeds is None else self.seeds

    def kept(self, finished: int) -> int:
        """How many images of a prompt are returned; `finished` is what early pruning leaves of the candidates.

        Raises InputError for more than there are.
        """
        candidates = len(self.candidate_seeds)
        keep = min(4, finished) if self.num_images_per_prompt is None else self.num_images_per_prompt
        if keep > candidates:
            raise InputError(f"num_images_per_prompt must be at most num_candidates {candidates:,}, got {keep:,}")
        if keep > finished:
            raise InputError(
                f"the candidate_budget finishes {finished:,} of {candidates:,} candidates, but num_images_per_prompt "
                f"is {keep:,}; ask for fewer images, more candidates or a larger budget"
            )
        return keep


def keywords() -> list[str]:
    """The settings of a call by their names, those of the sampling among them."""
    return [name for name in Request.model_fields if name not in ("prompts", "changes")] + [*Sampling.model_fields]


def read_prompts(prompt: Any) -> tuple[Any, ...]:
    """One prompt or several as a caller writes them: text, or one of `PROMPTS`."""
    if isinstance(prompt, (str, *PROMPTS)):
        prompt = [prompt]
    if not isinstance(prompt, Sequence):
        raise InputError(f"a prompt must be text, got {type(prompt).__name__}")
    for number, one in enumerate(prompt, 1):
        if not isinstance(one, (str, *PROMPTS)):
            of_several(number, len(prompt), check_text, one)
    return tuple(TextPrompt.model_construct(text=one) if isinstance(one, str) else one for one in prompt)


def check_text(prompt: Any, name: str = "prompt") -> None:
    """Raises InputError unless the prompt is text with words in it, of a reasonable length."""
    if not isinstance(prompt, str):
        raise InputError(f"a {name} must be text, got {type(prompt).__name__}")
    if len(prompt) > MOST_CHARACTERS:
        raise InputError(f"the {name} has {len(prompt):,} characters, at most {MOST_CHARACTERS:,} are read; shorten it")
    for character in prompt:
        # Control characters but white space, and the surrogates that stand for bytes which are not UTF-8.
        category = unicodedata.category(character)
        if category == "Cs" or (category == "Cc" and not character.isspace()):
            raise InputError(
                f"the {name} looks like binary data, it has the character U+{ord(character):04X}; give text"
            )
    shown = visible(prompt)
    if not shown:
        what = "holds nothing that can be seen" if prompt.strip() else "is empty"
        raise InputError(f"the {name} {what}; say what the image should show")
    if not any(character.isalnum() for character in shown):
        raise InputError(f"the {name} '{prompt[:20]}' has no letter or digit; describe the image in words")


def check_likelihood_weight(weight: Any) -> float:
    """Raises InputError unless the weight of the prior's likelihood is a finite number from 0 on."""
    if not isinstance(weight, float | int) or not 0 <= weight < math.inf:
        raise InputError(f"likelihood_weight must be a finite number from 0 on, got {weight}")
    return float(weight)


def of_several(number: int, count: int, check: Callable[[Any], Any], value: Any) -> Any:
    """`check(value)`; where there are several prompts, its error says which it is about."""
    try:
        return check(value)
    except InputError as error:
        raise InputError(f"prompt {number} of {count}: {error}" if count > 1 else str(error)) from None
