"""What Inductor makes of a norm and a cast where ``triton.nested_reduction`` is on: one kernel.

The option of torch 2.13 and 2.14, off by default, lets Inductor fuse the row sum, the blocks'
maxima and the cast. Where torch has it, it compiles the functions below. For an older torch
``nested_kernels.py`` has stored the Triton kernels, which are launched in each of ``TILES``; the
benchmark keeps the fastest.

Of elements in 4 bits, as people write that cast, Inductor makes two kernels, with codes of 4 bytes
between them: what packs two elements has half the size, and is not fused. So the functions for them
take two elements as one int32, which gives one kernel.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from benchlib import RESULTS
from torch import Tensor

from mxnorm_pass import functional
from mxnorm_pass.functional import BlockFormat
from mxnorm_pass.numerics import nvfp4
from mxnorm_pass.numerics.cast import divide
from mxnorm_pass.numerics.e8m0 import e8m0_exponent

EPS = 1e-5
KERNELS = RESULTS / "nested_kernels.json"
# By the default of 30 operations Inductor computes NVFP4's block scales for each element anew.
OPTIONS = {"triton.nested_reduction": True, "realize_opcount_threshold": 14}

# What the kernels of Inductor expect in their module.
HEADER = """\
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math


"""


@dataclass(frozen=True)
class Tile:
    """How a kernel is launched: rows of a program, elements of a row at a time, warps."""

    rows: int
    elements: int
    warps: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.elements} {self.warps} warps"


# Inductor itself tries elements up to 2048; longer ones leave a row in the registers or L1.
TILES = [
    Tile(*numbers)
    for numbers in (
        (1, 1024, 4),
        (1, 1024, 8),
        (1, 2048, 4),
        (1, 2048, 8),
        (1, 4096, 8),
        (1, 4096, 16),
        (1, 8192, 16),
        (2, 1024, 4),
        (2, 2048, 8),
        (4, 1024, 8),
    )
]


def has_option() -> bool:
    """Can this torch compile it itself?"""
    return hasattr(torch._inductor.config.triton, "nested_reduction")


@dataclass(frozen=True)
class Function:
    """What Inductor compiles, for a variant and a format.

    Attributes:
        residual: does it add one first, and return the sum first?
        format: of the cast.
    """

    residual: bool
    format: BlockFormat

    @property
    def inputs(self) -> tuple[str, ...]:
        """Fields of the benchmark's ``Inputs``."""
        residual = ("residual",) if self.residual else ()
        scale = () if self.format.has_e8m0_scales else ("tensor_scale",)
        return ("x", *residual, "weight", *scale)

    @property
    def outputs(self) -> tuple[str, ...]:
        return ("total", "values", "scales") if self.residual else ("values", "scales")

    @property
    def reads_pairs(self) -> bool:
        """Are two bf16 read as one int32?"""
        return self.format.element.per_byte == 2

    def as_read(self, inputs: Any) -> dict[str, Tensor]:
        """Views of the benchmark's ``Inputs`` as :meth:`__call__` takes them."""
        tensors = {name: getattr(inputs, name) for name in self.inputs}
        return {
            name: t.view(torch.int32) if self.reads_pairs and name != "tensor_scale" else t
            for name, t in tensors.items()
        }

    def __call__(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """``outputs`` of ``inputs``; a total of pairs is int32, too."""
        compute = norm_cast_of_pairs if self.reads_pairs else norm_cast
        return compute(self.format, **tensors)

    def as_named(self, results: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """``outputs`` by name, each in its own dtype."""
        outputs = dict(zip(self.outputs, results, strict=True))
        if self.residual:
            outputs["total"] = outputs["total"].view(torch.bfloat16)
        return outputs


def norm_cast(
    fmt: BlockFormat,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    tensor_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """HuggingFace's norm of [T, D] and ``functional``'s cast.

    Of torchao's cast Inductor computes a block's scale for each element anew.
    """
    total = x if residual is None else x + residual
    high = total.to(torch.float32)
    rho = torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + EPS)
    y = weight * (high * rho).to(x.dtype)
    values, scales = functional.mx_cast(y, fmt, tensor_scale=tensor_scale)
    return (values, scales) if residual is None else (total, values, scales)


def norm_cast_of_pairs(
    fmt: BlockFormat,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    tensor_scale: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The same of bf16 pairs, int32 [T, D/2] and [D/2], to elements of 4 bits."""
    total = x
    if residual is not None:
        total = joined([a + b for a, b in zip(halves(x), halves(residual), strict=True)])
    high = [half.to(torch.float32) for half in halves(total)]
    square = (high[0] * high[0] + high[1] * high[1]).sum(-1, keepdim=True)
    rho = torch.rsqrt(square / (2 * x.shape[-1]) + EPS)
    normed = [g * (h * rho).to(g.dtype) for g, h in zip(halves(weight), high, strict=True)]
    values, scales = cast_of_halves(fmt, normed, tensor_scale)
    return (values, scales) if residual is None else (total, values, scales)


def cast_of_halves(
    fmt: BlockFormat, y: list[Tensor], tensor_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The cast of first and second elements, bf16 [T, D/2], to values [T, D/2] and scales."""
    from torchao.prototype.mx_formats.kernels import f32_to_f4_unpacked

    blocks = [h.to(torch.float32).unflatten(-1, (-1, fmt.block_size // 2)) for h in y]
    absmax = torch.maximum(blocks[0].abs(), blocks[1].abs()).amax(-1, keepdim=True)
    if fmt.has_e8m0_scales:
        scales = e8m0_exponent(absmax, fmt)
        scaled = [divide(block, scales, fmt) for block in blocks]
    else:
        scales = nvfp4.block_scales(absmax, tensor_scale)
        scaled = [block * nvfp4.reciprocals(scales, tensor_scale) for block in blocks]
    largest = fmt.element.max
    first, second = (f32_to_f4_unpacked(block.clamp(-largest, largest)) for block in scaled)
    return (first | (second << 4)).flatten(-2), scales.squeeze(-1).view(fmt.scale_dtype)


def halves(pairs: Tensor) -> list[Tensor]:
    """First and second bf16 of each int32."""
    first, second = pairs << 16, pairs & ~0xFFFF
    return [half.view(torch.float32).to(torch.bfloat16) for half in (first, second)]


def joined(both: list[Tensor]) -> Tensor:
    """The int32 that :func:`halves` takes apart."""
    first, second = (half.view(torch.int16).to(torch.int32) for half in both)
    return (first & 0xFFFF) | (second << 16)


@dataclass(frozen=True)
class NestedKernel:
    """A kernel that Inductor has written.

    Attributes:
        variant: "norm" or "residual".
        format: short name of the format.
        width: D.
        whole_rows: it has no mask of rows, for T divisible by ``WHOLE_ROWS``.
        arguments: names of its pointers: fields of ``Inputs``, and outputs.
        source: lines of the Triton function.
    """

    variant: str
    format: str
    width: int
    whole_rows: bool
    arguments: tuple[str, ...]
    source: tuple[str, ...]

    @property
    def function(self) -> Function:
        return Function(self.variant == "residual", functional.block_format(self.format))

    @property
    def row_elements(self) -> int:
        """Elements of a row as the kernel counts them: pairs, where it reads pairs."""
        return self.width // (2 if self.function.reads_pairs else 1)

    @property
    def tiles(self) -> list[Tile]:
        """Those of ``TILES`` that are no longer than a row."""
        longest = 1 << (self.row_elements - 1).bit_length()
        return [tile for tile in TILES if tile.elements <= longest]


# A multiple of Inductor's largest XBLOCK: for that many rows it writes no mask.
WHOLE_ROWS = 4096


@cache
def stored() -> Any:
    return json.loads(KERNELS.read_text())


@cache
def stored_kernels() -> list[NestedKernel]:
    return [
        NestedKernel(**{**e, "arguments": tuple(e["arguments"]), "source": tuple(e["source"])})
        for e in stored()["kernels"]
    ]


def stored_kernel(variant: str, format: str, tokens: int, width: int) -> NestedKernel | None:
    """The one for a shape, if there is one."""
    wanted = (variant, format, width, tokens % WHOLE_ROWS == 0)
    for kernel in stored_kernels():
        if (kernel.variant, kernel.format, kernel.width, kernel.whole_rows) == wanted:
            return kernel
    return None


def offers(variant: str, format: str, tokens: int, width: int) -> bool:
    """Is there a kernel for it? In both directions Inductor needs several."""
    if variant == "both":
        return False
    return has_option() or stored_kernel(variant, format, tokens, width) is not None


def candidates(
    variant: str, format: str, tokens: int, width: int
) -> Iterator[tuple[str, Callable[[Any], dict[str, Tensor]]]]:
    """Calls on ``Inputs`` by how they are launched, of which the fastest counts."""
    function = Function(variant == "residual", functional.block_format(format))
    if has_option():
        yield "autotuned", compiled(function)
        return
    kernel = stored_kernel(variant, format, tokens, width)
    if kernel is None:
        raise ValueError(f"no stored kernel for {variant} {format} {tokens}x{width}")
    for tile in kernel.tiles:
        yield str(tile), launching(kernel, tile)


def compiled(function: Function) -> Callable[[Any], dict[str, Tensor]]:
    """By this torch's Inductor, with its autotuning."""
    options = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    fast = torch.compile(
        function.__call__,
        fullgraph=True,
        dynamic=False,
        options={**options, **OPTIONS},
    )

    def call(inputs: Any) -> dict[str, Tensor]:
        return function.as_named(fast(function.as_read(inputs)))

    return call


def launching(kernel: NestedKernel, tile: Tile) -> Callable[[Any], dict[str, Tensor]]:
    def call(inputs: Any) -> dict[str, Tensor]:
        return launch(kernel, tile, inputs)

    return call


def launch(kernel: NestedKernel, tile: Tile, inputs: Any) -> dict[str, Tensor]:
    from mxnorm_pass.kernels.launch import launcher

    x, function = inputs.x, kernel.function
    outputs = empty_outputs(function, x)
    # Triton 3.6 has no e8m0, and what reads pairs writes them.
    as_bytes = {n: t.view(torch.uint8) for n, t in outputs.items() if t.dtype is E8M0}
    if function.reads_pairs and "total" in outputs:
        as_bytes["total"] = outputs["total"].view(torch.int32)
    tensors = {**function.as_read(inputs), **outputs, **as_bytes}
    tokens = x.shape[0]
    launcher(load(kernel))[((tokens + tile.rows - 1) // tile.rows,)](
        *(tensors[name] for name in kernel.arguments),
        tokens,
        kernel.row_elements,
        XBLOCK=tile.rows,
        R0_BLOCK=tile.elements,
        num_warps=tile.warps,
        num_stages=1,
    )
    return outputs


E8M0 = torch.float8_e8m0fnu


def empty_outputs(function: Function, x: Tensor) -> dict[str, Tensor]:
    fmt = function.format
    outputs = {"total": torch.empty_like(x)} if function.residual else {}
    outputs["values"] = x.new_empty(fmt.values_shape(x.shape), dtype=fmt.elem_dtype)
    outputs["scales"] = x.new_empty(fmt.scales_shape(x.shape), dtype=fmt.scale_dtype)
    return outputs


@cache
def load(kernel: NestedKernel) -> Any:
    """The Triton function, of a module in a file, from which Triton reads the source."""
    folder = Path(tempfile.mkdtemp(prefix="nested_kernels_"))
    path = folder / f"nested_{kernel.variant}_{kernel.format}_{kernel.width}.py"
    text = HEADER + "\n".join(kernel.source) + "\n"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    names = re.findall(r"^def (\w+)\(", text, re.MULTILINE)
    return getattr(module, names[0])
