"""Python's garbage collector, which a pass over a large graph does without."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect no cycles meanwhile.

    The collector walks the whole heap once enough new objects have lived for a while. The heap of a
    process that compiles is large, and what the pass keeps is many objects that die with it:
    the walk finds nothing and takes longer than the pass on a large graph. Reference counts free
    what they free.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
