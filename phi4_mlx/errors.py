"""What can go wrong through no fault of ours.

Each message is one line that names the value, the limit and the way out, and the command line prints it as it stands.

    Phi4Error
    ├── ConfigError       config.json asks for something this code does not do
    ├── CheckpointError   weights that are missing, damaged or of another shape
    ├── TokenizerError    tokenizer files that cannot be read or do not agree
    └── RequestError      a prompt, an option or a file that cannot be served
"""

from __future__ import annotations


class Phi4Error(Exception):
    """A mistake that the user can mend; catch this one to catch them all."""


class ConfigError(Phi4Error):
    """config.json is missing, is not JSON, or asks for maths that this model code does not do."""


class CheckpointError(Phi4Error):
    """A checkpoint is missing, damaged, incomplete, or does not fit its config.json."""


class TokenizerError(Phi4Error):
    """Tokenizer files are missing, damaged, or disagree with each other."""


class RequestError(Phi4Error):
    """A prompt, an option, or a file named on the command line cannot be served."""


def check_number(name: str, value: float, low: float, high: float) -> None:
    """Raises RequestError unless `value` is a number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low} to {high}, not {value!r}")


def check_whole(name: str, value: int, low: int, high: int = 2**31) -> None:
    """Raises RequestError unless `value` is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
