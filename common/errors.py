"""What a user did wrong, in one sentence: the command line prints it and exits with 2, Python sees a ValueError.

Input that can be followed, but not to the letter, is a warning of one sentence; the command line prints it and goes on.
"""


class InputError(ValueError):
    """Wrong input. The message is one sentence that says what was wrong, where, and what to do about it."""


class WriteError(RuntimeError):
    """Something could not be written although the input was right. The message says which file, and what to do."""


class InputWarning(UserWarning):
    """Input that was not followed to the letter. The message is one sentence that says what was done instead."""


def nearest(name: str, known: list[str]) -> str:
    """`, did you mean 'x'?` for the known name spelled most like `name`, or the list of all when none is near."""
    from difflib import get_close_matches

    matches = get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean '{matches[0]}'?" if matches else f"; known are {', '.join(sorted(known))}"
