"""The exceptions for mistakes that a user can correct, and two checks of numbers.

Each message is one line that names the value, the limit and the way out; the command line prints it unchanged.

    Phi4Error
    ├── ConfigError       config.json asks for something that is not supported, or a JSON file is damaged
    ├── CheckpointError   weights are missing, damaged or of another shape
    ├── TokenizerError    tokenizer files cannot be read or contradict each other
    └── RequestError      a prompt, an option or a file cannot be used
"""

from __future__ import annotations

_LONGEST = 1500  # characters of a message; names and values in it may be of any length


class Phi4Error(Exception):
    """A mistake that the user can correct; the base class of the others.

    The message is one line; the middle of a long one, where names and values stand, is left out.
    """

    def __init__(self, message: str):
        line = " ".join(message.splitlines())
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} ... {line[5 - _LONGEST // 2 :]}"
        super().__init__(line)


class ConfigError(Phi4Error):
    """config.json asks for maths that is not implemented, or a JSON file is missing or not a JSON object."""


class CheckpointError(Phi4Error):
    """A checkpoint is missing, damaged, incomplete, or does not fit its config.json."""


class TokenizerError(Phi4Error):
    """Tokenizer files are missing, damaged, or contradict each other."""


class RequestError(Phi4Error):
    """A prompt, an option, or a file named on the command line cannot be used."""


class Interruption(BaseException):
    """The base of exceptions by which a signal ends work: user code that is called must not swallow them."""


def message_of(error: BaseException) -> str:
    """The text of an exception of any code on one line; its own `__str__` may fail."""
    try:
        return " ".join(f"{error}".split())
    except (KeyboardInterrupt, Interruption):
        raise
    except BaseException:
        return "its text cannot be read"


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Checks that an option is a number in a range.

    Args:
        name: the option, for the message.
        value: the value to check.
        low: the least value allowed.
        high: the greatest value allowed.

    Raises:
        RequestError: the value is not an int or a float, or is out of the range.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low} to {high}, not {value!r}")


def check_whole(name: str, value: object, low: int, high: int = 2**31) -> None:
    """Checks that an option is a whole number in a range.

    Args:
        name: the option, for the message.
        value: the value to check.
        low: the least value allowed.
        high: the greatest value allowed.

    Raises:
        RequestError: the value is not an int, or is out of the range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
