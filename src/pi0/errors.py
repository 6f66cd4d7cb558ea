"""The one family of errors that users see.

    Pi0Error
    ├── CheckpointError    a file, tensor or layout is not what it should be
    ├── ConfigError        a size, dtype or option that the model cannot have
    ├── ObservationError   an image, state or prompt that the policy cannot use
    ├── EngineError        an engine or device that is unavailable
    ├── DataError          a dataset's files, columns or pictures are not what they should be
    └── LimitError         actions beyond the limits that a robot states

Each message is one sentence or a short list: what it is about, what was expected, what was found
and how to mend it.
"""


class Pi0Error(Exception):
    """Base of all errors raised on purpose by this package."""


class CheckpointError(Pi0Error):
    """A checkpoint's files or tensors are not what was expected."""


class ConfigError(Pi0Error):
    """A size, dtype or option that the model cannot have."""


class ObservationError(Pi0Error):
    """An observation (images, state, prompt) that cannot be used."""


class EngineError(Pi0Error):
    """An engine or a device that is not available."""


class DataError(Pi0Error):
    """A dataset's files, columns or pictures are not what was expected."""


class LimitError(Pi0Error):
    """Actions are beyond the limits that a robot states."""


def install_hint(extra: str) -> str:
    """How to install an extra of this package, which is on no index yet."""
    return f"In the folder of this repository: pip install '.[{extra}]'."


def kind_of(value: object) -> str:
    """The type of a value in an error message, such as "an int"."""
    name = type(value).__name__
    return f"a{'n' if name[0] in 'aeioAEIO' else ''} {name}"


def human_bytes(count: int) -> str:
    """A number of bytes as people read it, such as "7.02 GB"."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"
