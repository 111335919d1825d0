"""The one exception a user is meant to read: one line that names what was given, what was found and what is allowed."""

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

MUCH_FARTHER = 0.15  # likeness that an option may be behind the nearest one


class L3DError(ValueError):
    """Bad input. The command line prints its message as one line and exits with code 2."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`"; did you mean 'a' or 'b'?"` for the options nearest to `name`, or an empty string.

    Beside a near one (one letter is missing) those that are much farther from it are left out.
    """
    near = get_close_matches(name, list(options), n=3, cutoff=0.5)
    likeness = {option: SequenceMatcher(None, option, name).ratio() for option in near}
    near = [option for option in near if likeness[option] > likeness[near[0]] - MUCH_FARTHER]
    return f"; did you mean {' or '.join(repr(match) for match in near)}?" if near else ""


def require_choice(key: str, value: str, options: Iterable[str]) -> None:
    """Raise unless `value` is one of `options`; `key` is the setting's name in the message."""
    options = list(options)
    if value not in options:
        raise L3DError(f"{key}: found {value!r}, allowed are {', '.join(options)}{did_you_mean(value, options)}")
