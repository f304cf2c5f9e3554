"""Which extra of this package brings which library that a compile does not need."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_EXTRAS = {
    "jinja2": "report",
    "markupsafe": "report",
    "safetensors": "checkpoints",
    "scipy": "checkpoints",
    "torchao": "checkpoints",
    "tqdm": "checkpoints",
    "transformers": "checkpoints",
    "matplotlib": "examples",
}


@contextmanager
def named_extras() -> Iterator[None]:
    """Let the error of an import inside say what to install.

    Raises:
        ModuleNotFoundError: a library is missing; where it belongs to an extra the message has the
            command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        raise ModuleNotFoundError(
            f"{error.name} is not installed. It comes with: pip install 'mxnorm_pass[{extra}]'",
            name=error.name,
        ) from error
