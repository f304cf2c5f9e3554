"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """:func:`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``path``, in the place of what stood there, with a new file's permissions.

    Raises:
        OSError: ``path`` cannot be written; what stood there stays, and nothing else is left.
    """
    target = Path(path)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
        # A temporary file would be readable by its owner alone.
        draft = Path(folder) / target.name
        draft.write_bytes(data)
        os.replace(draft, target)
