"""Random specs of small models: norms, casts, readers and views; plain data, and strategies.

A failing spec prints as code that builds its model again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hand_casts import HAND_CASTS
from hypothesis import strategies as st
from matching import (
    BF16,
    F32,
    SPELLINGS,
    NormFunction,
    eps_outside_sqrt,
    layer_norm,
    layer_norm_by_hand,
    layer_norm_of_var_mean,
    layer_norm_of_variance,
    variance_norm,
)
from norm_spellings import LAYER_NORMS, NO_NORMS, OTHER_FORMS
from torch import Tensor

from mxnorm_pass import SkipReason


@dataclass(frozen=True)
class NearMiss:
    """What looks like an RMSNorm; ``reason`` None: it is no norm at all, and gets no site."""

    function: NormFunction
    reason: SkipReason | None


NEAR_MISSES = {
    "layer norm": NearMiss(layer_norm, SkipReason.LAYER_NORM),
    "layer norm by hand": NearMiss(layer_norm_by_hand, SkipReason.LAYER_NORM),
    "layer norm of variance": NearMiss(layer_norm_of_variance, SkipReason.LAYER_NORM),
    "layer norm of var_mean": NearMiss(layer_norm_of_var_mean, SkipReason.LAYER_NORM),
    "eps outside sqrt": NearMiss(eps_outside_sqrt, SkipReason.NORM_FORM),
    "variance norm": NearMiss(variance_norm, None),
    **{name: NearMiss(f, SkipReason.LAYER_NORM) for name, f in LAYER_NORMS.items()},
    **{name: NearMiss(f, SkipReason.NORM_FORM) for name, f in OTHER_FORMS.items()},
    **{name: NearMiss(f, None) for name, f in NO_NORMS.items()},
}

# Each keeps the elements in row-major order.
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "flatten": lambda y: y.reshape(-1, y.shape[-1]),
    "unsqueeze": lambda y: y.unsqueeze(0),
    "row by row": lambda y: y.unsqueeze(-2),
    "clone": lambda y: y.clone(),
    "there and back": lambda y: y.flatten().view(y.shape),
    "squeeze": lambda y: y.squeeze(0) if y.ndim > 2 else y,
    "halves": lambda y: y.unflatten(-1, (2, -1)),
}


# Each from the hidden state, the source and the norm's output of the stage before, another input.
SOURCES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "hidden": lambda hidden, before, y, branch: hidden,
    "residual": lambda hidden, before, y, branch: hidden + branch,
    "scaled": lambda hidden, before, y, branch: hidden * 2,
    "strided": lambda hidden, before, y, branch: hidden.mT.contiguous().mT,
    "sliced": lambda hidden, before, y, branch: torch.cat([hidden, branch], -1)[
        ..., : hidden.shape[-1]
    ],
    "expanded": lambda hidden, before, y, branch: hidden[:1].expand(hidden.shape),
    "detached": lambda hidden, before, y, branch: hidden.detach(),
    "same": lambda hidden, before, y, branch: before,
    "norm": lambda hidden, before, y, branch: y,
}

# Those that the backend gives no casts.
KEEP_THE_NORM = ("output", "elementwise", "product", "transposed", "chunked", "einsum")


# Specs


@dataclass(frozen=True)
class NormSpec:
    """A norm.

    Attributes:
        spelling: a key of ``SPELLINGS`` or ``NEAR_MISSES``.
        heads: over each half of the channels.
        gain: "plain", "computed" from the parameter or a "row" of a larger one.
    """

    spelling: str
    gain_dtype: torch.dtype = F32
    eps: float = 1e-5
    heads: bool = False
    gain: str = "plain"
    trains: bool = True


@dataclass(frozen=True)
class ReaderSpec:
    """Who reads a norm.

    Attributes:
        kind: a key of ``READERS``.
        cast: of linears: "plain", "torchao inference", "torchao training" or "by hand".
        mode: scale mode of a torchao cast, or a key of ``HAND_CASTS``.
        dtype: to which the norm's output is cast before the linear.
        rows: output channels; None: as many as input channels.
        gradient: "kept", "detached" (none for the norm) or "off" (under ``no_grad``).
    """

    kind: str = "linear"
    view: str = "none"
    dtype: torch.dtype = F32
    cast: str = "plain"
    mode: str = "rceil"
    rows: int | None = 32
    bias: bool = False
    trains: bool = True
    gradient: str = "kept"


@dataclass(frozen=True)
class StageSpec:
    """A norm of ``source`` and its readers.

    Attributes:
        norm: None: the module of the stage before, applied once more.
        source: a key of ``SOURCES``.
        view, dtype: what all readers see of the norm's output; dtype None: as it is.
        inline: no module of its own for the norm or any reader.
        chain: add the first output that fits to the hidden state.
    """

    norm: NormSpec | None
    readers: tuple[ReaderSpec, ...]
    source: str = "hidden"
    chain: bool = False
    view: str = "none"
    dtype: torch.dtype | None = None
    inline: bool = False
    checkpoint: bool = False


@dataclass(frozen=True)
class ModelSpec:
    shape: tuple[int, ...]
    dtype: torch.dtype
    stages: tuple[StageSpec, ...]
    train: bool = False
    input_trains: bool = True
    autocast: bool = False
    dynamic: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def has_only_own_casts(self) -> bool:
        kept = KEEP_THE_NORM
        linears = [r for s in self.stages for r in s.readers if r.kind not in kept]
        return all(r.cast != "plain" for r in linears)


# Strategies


def _sampled(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


@st.composite
def _norm_specs(draw: st.DrawFn, dtype: torch.dtype, width: int, gains: bool) -> NormSpec:
    near_miss = draw(st.integers(0, 9)) == 9
    if near_miss:
        return NormSpec(draw(_sampled(*NEAR_MISSES)), dtype)
    spelling = draw(_sampled(*SPELLINGS))
    mixed = gains and spelling in ("huggingface", "nn.RMSNorm", "gemma", "t5", "olmo")
    return NormSpec(
        spelling,
        draw(_sampled(F32, BF16)) if mixed else dtype,
        draw(_sampled(1e-6, 1e-5, 1e-2)),
        heads=width > 32 and draw(st.integers(0, 7)) == 0,
        gain=draw(_sampled("plain", "plain", "computed", "row")),
        trains=draw(st.integers(0, 7)) > 0,
    )


@st.composite
def _reader_specs(draw: st.DrawFn, spec: ModelSpec, own_casts: bool, inline: bool) -> ReaderSpec:
    linear = "inline" if inline else "linear"
    kinds = [linear] * 6 + ["output", "elementwise", "product", "transposed"]
    kinds += [] if own_casts else ["chunked", "right", "einsum", *([] if inline else ["router"])]
    kind = draw(_sampled(*kinds))
    views = [v for v in VIEWS if v != "halves" or spec.shape[-1] > 32]
    dtype = F32 if spec.autocast else draw(_sampled(spec.dtype, spec.dtype, F32, BF16))
    reader = ReaderSpec(
        kind, dtype=dtype, bias=draw(st.booleans()), trains=draw(st.integers(0, 7)) > 0
    )
    if kind in ("output", "elementwise", "product", "transposed"):
        return reader
    reader = replace(
        reader,
        view=draw(_sampled(*views)),
        rows=draw(_sampled(32, 64, None, 48)),
        gradient=draw(_sampled("kept", "kept", "kept", "kept", "detached", "off")),
    )
    return draw(_own_casts(reader, spec, own_casts)) if kind == "linear" else reader


@st.composite
def _own_casts(draw: st.DrawFn, reader: ReaderSpec, spec: ModelSpec, own_casts: bool) -> ReaderSpec:
    casts = [] if own_casts else ["plain"] * 3
    if not spec.train:
        casts += ["torchao training", "torchao inference", "by hand"]
    elif spec.tokens % 32 == 0 and not spec.dynamic:
        # Its backward casts along the tokens, in blocks of 32 of them.
        casts += ["torchao training"]
    cast = "plain" if spec.autocast else draw(_sampled(*casts))
    if cast == "plain":
        return reader
    mode = draw(_sampled(*(HAND_CASTS if cast == "by hand" else ("rceil", "floor"))))
    dtype = {"torchao inference": BF16, "by hand": F32}.get(cast, reader.dtype)
    rows = 64 if reader.rows == 48 else reader.rows
    return replace(reader, cast=cast, mode=mode, dtype=dtype, rows=rows)


@st.composite
def _options(draw: st.DrawFn, stages: Sequence[StageSpec], quantize: Sequence[str]) -> Any:
    options = {
        "quantize": draw(_sampled(*quantize)),
        "gain": draw(_sampled("auto", "auto", "fold", "activation")),
        "gradient": draw(_sampled("true", "orthogonal", "paper")),
        "p": draw(_sampled(2, 1, 3.5)),
        "format": draw(_sampled("mxfp8", "mxfp8", "mxfp6 e3m2", "mxfp4", "nvfp4")),
        # Where a norm stays as it is the cast of its output has a bound of its own.
        "tensor_scale": "amax",
    }
    rules: dict[str, Any] = {}
    overrides = _sampled({"p": 1.5}, {"gradient": "paper"}, {"gain": "activation"}, {"p": 3}, True)
    formats = _sampled({"elem_dtype": torch.float8_e5m2}, {"format": "mxfp4"}, True)
    if options["format"] != "nvfp4":
        formats |= _sampled({"scale_mode": "floor"})
    for i, stage in enumerate(stages):
        if draw(st.integers(0, 3)) == 0:
            rules[f"stages.{i}.norm*"] = draw(_sampled(False) | overrides)
        for j, reader in enumerate(stage.readers):
            kinds = ("linear", "router", "right")
            if reader.kind in kinds and not stage.inline and draw(st.integers(0, 3)) == 0:
                end = "" if reader.kind == "right" else ".linear"
                rules[f"stages.{i}.readers.{j}{end}"] = draw(_sampled(False, False) | formats)
    return {**options, "modules": rules}


@st.composite
def model_specs(
    draw: st.DrawFn,
    *,
    own_casts: bool = False,
    quantize: Sequence[str] = ("norm-fed", "norm-fed", "existing", "all"),
    dynamic: bool = False,
) -> ModelSpec:
    """Args: ``own_casts``: every linear comes with its casts."""
    width = draw(_sampled(64, 64, 32, 128))
    train = draw(st.booleans())
    whole_blocks = ((32,), (2, 16), (2, 2, 8), (1, 32), (32, 1))
    others = ((16,), (2, 8), (1,), (1, 1), (1, 8), (8, 1), (2, 1, 3))
    lead = draw(_sampled(*whole_blocks, *(() if own_casts and train else others)))
    autocast = not own_casts and draw(st.integers(0, 7)) == 0
    dtype = F32 if autocast else draw(_sampled(F32, BF16))
    spec = ModelSpec(
        (*lead, width),
        dtype,
        (),
        train=train,
        input_trains=draw(st.integers(0, 7)) > 0,
        autocast=autocast,
        dynamic=dynamic and draw(st.integers(0, 5)) == 0,
    )
    stages: list[StageSpec] = []
    for i in range(draw(st.integers(1, 3))):
        again = i > 0 and draw(st.integers(0, 5)) == 0
        norm = None if again else draw(_norm_specs(dtype, width, not autocast))
        sources = [name for name in SOURCES if i or name not in ("norm", "same")]
        inline = not own_casts and draw(st.integers(0, 3)) == 0
        view = draw(_sampled("none", "none", "flatten", "unsqueeze", "clone", "there and back"))
        readers = draw(st.lists(_reader_specs(spec, own_casts, inline), min_size=1, max_size=4))
        if any(r.kind == "transposed" for r in readers):
            view = "none"
        stage = StageSpec(
            norm,
            tuple(readers),
            draw(_sampled("hidden", "residual", *sources)),
            draw(st.booleans()),
            view,
            None if autocast else draw(_sampled(None, None, F32, BF16)),
            inline,
            checkpoint=train and not spec.dynamic and draw(st.integers(0, 5)) == 0,
        )
        stages.append(stage)
    return replace(spec, stages=tuple(stages), options=draw(_options(stages, quantize)))
