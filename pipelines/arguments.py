"""What a call of the pipeline is given, checked before anything is drawn: prompts, seeds, counts, weights."""

import math
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from tessera.errors import InputError, InputWarning
from tessera.text.normalization import visible

MOST_CHARACTERS = 32_000  # of a prompt
SHOWN_OF_CUT = 120  # characters of what was cut off a prompt
LARGEST_SEED = 2**53 - 1  # JSON and JavaScript read numbers up to here exactly


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


def check_prompt(prompt: str, name: str = "prompt") -> None:
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
    seen = visible(prompt)
    if not seen:
        what = "holds nothing that can be seen" if prompt.strip() else "is empty"
        raise InputError(f"the {name} {what}; say what the picture should show")
    if not any(character.isalnum() for character in seen):
        raise InputError(f"the {name} '{prompt[:20]}' has no letter or digit; describe the picture in words")


def check_seeds(num_candidates: int, seed: int, seeds: Sequence[int] | None) -> Sequence[int]:
    """The seed of each candidate. Raises InputError for counts below 1 and seeds outside of 0 .. 2^53 - 1."""
    if seeds is None:
        count = whole_number("num_candidates", num_candidates)
        last = whole_number("seed", seed, least=0) + count - 1
        if last > LARGEST_SEED:
            raise InputError(
                f"the seeds of {count:,} candidates from {seed:,} on go beyond {LARGEST_SEED:,}; ask for less"
            )
        return range(seed, seed + count)
    chosen = [whole_number("each of seeds", one, least=0) for one in seeds]
    if not chosen or max(chosen) > LARGEST_SEED:
        raise InputError(f"seeds must be at least one number of at most {LARGEST_SEED:,}")
    return chosen


def check_keep(num_images: int | None, num_candidates: int, finished: int | None = None) -> int:
    """How many pictures of a prompt are returned; `finished` is what early pruning leaves of the candidates.

    Raises InputError unless 1 <= num_images <= num_candidates, or finished.
    """
    there = num_candidates if finished is None else finished
    keep = whole_number("num_images_per_prompt", min(4, there) if num_images is None else num_images)
    if keep > num_candidates:
        raise InputError(f"num_images_per_prompt must be at most num_candidates {num_candidates:,}, got {keep:,}")
    if keep > there:
        raise InputError(
            f"the candidate_budget finishes {there:,} of {num_candidates:,} candidates, but num_images_per_prompt is "
            f"{keep:,}; ask for fewer pictures, more candidates or a larger budget"
        )
    return keep


def check_likelihood_weight(weight: float) -> float:
    """Raises InputError unless the weight of the prior's likelihood is a finite number from 0 on."""
    if not isinstance(weight, float | int) or not 0 <= weight < math.inf:
        raise InputError(f"likelihood_weight must be a finite number from 0 on, got {weight}")
    return float(weight)


def whole_number(name: str, value: int, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r:.40}")
    return value


def warn_of_cut(name: str, left_out: dict[str, str]) -> None:
    """One sentence (InputWarning) about the end of a prompt that each reader, such as the prior, leaves out, if any."""
    parts = [(reader, " ".join(cut.split())) for reader, cut in left_out.items() if cut]
    if not parts:
        return
    (first, cut), *others = parts
    said = f"{name} is longer than the {first} reads; left out is '{_start(cut)}'"
    said += "".join(f", and by the {reader} '{_start(cut)}'" for reader, cut in others)
    warnings.warn(said, InputWarning, stacklevel=3)


def _start(text: str) -> str:
    return text if len(text) <= SHOWN_OF_CUT else f"{text[:SHOWN_OF_CUT]}... ({len(text):,} characters)"


def _named(prompts: Sequence[str], i: int, check: Callable[[str], Any]) -> Any:
    """`check(prompts[i])`; where there are several prompts, its error says which it is about."""
    try:
        return check(prompts[i])
    except InputError as error:
        raise InputError(f"prompt {i + 1} of {len(prompts)}: {error}" if len(prompts) > 1 else str(error)) from None
