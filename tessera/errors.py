"""What a user did wrong, in one sentence: the command line prints it and exits with 2, Python sees a ValueError.

Input that can be followed only in part is a warning of one sentence; the command line prints it and continues.
"""

import re


class InputError(ValueError):
    """Wrong input. The message is one sentence that says what was wrong, where, and what to do about it."""


class WriteError(RuntimeError):
    """Something could not be written although the input was right. The message says which file, and what to do."""


class InputWarning(UserWarning):
    """Input that was not followed to the letter. The message is one sentence that says what was done instead."""


def reason(error: BaseException, most: int = 240) -> str:
    """What a library says went wrong, in one line for users: without its own paths, and without torch's advice to
    load a file in the way that runs what is in it."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "weights_only" in text or "Weights only" in text:
        return "it holds something other than tensors, which is never executed, or it is damaged"
    text = re.sub(r"\S*(site|dist)-packages\S*", "(a library)", text)
    return text if len(text) <= most else text[: most - 3] + "..."


def nearest(name: str, known: list[str]) -> str:
    """`, did you mean 'x'?` for the known name spelled most like `name`, or the list of all when none is near.

    Case counts only among names that differ in nothing else.
    """
    from difflib import get_close_matches

    alike = [one for one in known if one.lower() == name.lower()]
    matches = alike or get_close_matches(name, known, n=1, cutoff=0.5)
    if not matches:
        lower = {one.lower(): one for one in known}
        matches = [lower[one] for one in get_close_matches(name.lower(), list(lower), n=1, cutoff=0.5)]
    return f", did you mean '{matches[0]}'?" if matches else f"; known are {', '.join(sorted(known))}"
