"""Block formats of the words in which tests vary them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mxnorm_pass.numerics.formats import BlockFormat, block_format
from mxnorm_pass.numerics.norm_cast import NormCastSpec

_WORDS = ("elem_dtype", "scale_mode", "block_size")


def in_a_format(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with element type, scale mode and block size as one format, if none is named."""
    words = {name: options[name] for name in _WORDS if name in options}
    others = {name: value for name, value in options.items() if name not in _WORDS}
    return {"format": BlockFormat.of(**words), **others}


def spec_with(spec: NormCastSpec, **changes: Any) -> NormCastSpec:
    """The spec with other options, those of its format among them, or with a format by name."""
    if "format" in changes:
        return replace(spec, **{**changes, "format": block_format(changes["format"])})
    fmt = spec.format
    words = {"elem_dtype": fmt.elem_dtype, "scale_mode": fmt.scale_mode}
    words |= {"block_size": fmt.block_size}
    return replace(spec, **in_a_format({**words, **changes}))
