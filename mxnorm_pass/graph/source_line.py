"""The line of the user's model that a node was traced from."""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import fx

_FRAME = re.compile(r'^ *File "(.+?)", line (\d+)(?:, in .*)?(?:\n +(.*))?', re.MULTILINE)
_TORCH = f"{Path(torch.__file__).parent}{os.sep}"
_PACKAGES = re.compile(r".*[/\\](?:site|dist)-packages[/\\]")


def source_line(*nodes: fx.Node) -> str:
    """``file:line: code`` of the first node that knows where it comes from; "" where none does.

    It is the innermost frame outside of torch. Backward nodes and those of decompositions bear
    their forward op's trace. Paths of installed packages start at the package.
    """
    trace = next((t for n in nodes if (t := n.meta.get("stack_trace"))), "")
    frames = _FRAME.findall(trace)
    if not frames:
        return ""
    of_user = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    path, line, code = (of_user or frames)[-1]
    return f"{_PACKAGES.sub('', path)}:{line}" + (f": {code.strip()}" if code else "")
