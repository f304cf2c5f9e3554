"""Custom ops that the rewritten graph calls: schema, checks, fake tensors, kernels, decompositions.

``mxnorm_pass::norm_cast``           norm and MX cast in one (``functional.mxnorm_cast``)
``mxnorm_pass::norm_cast_both``      the same, cast along D and along T
                                     (``functional.mxnorm_cast_both``)
``mxnorm_pass::add_norm_cast``       residual add first; its sum is a result, too
``mxnorm_pass::add_norm_cast_both``  both
``mxnorm_pass::cast``                MX cast (``functional.mx_cast``)
``mxnorm_pass::dequantize``          back to high precision (``functional.mx_dequantize``)
``mxnorm_pass::inverse_rms``         the estimate alone, differentiable (``functional.inverse_rms``)
``mxnorm_pass::inverse_rms_backward``  its derivative (``functional.inverse_rms_vjp``)
``mxnorm_pass::mark``                computes nothing; says where in a traced graph a place of
                                     Dynamo's graph is

Results are contiguous, whatever the strides of what is given. Each op stays one node in the joint
graph, where people read it and the partitioner treats it as one. On CUDA devices a Triton kernel
runs, elsewhere, and where no kernel covers the case, the decomposition: ``functional``. In a
compiled graph ``lowering`` makes the same choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, fx

from mxnorm_pass import functional
from mxnorm_pass.numerics.cast import dequantize_blocks
from mxnorm_pass.numerics.layout import blocked_scales_shape
from mxnorm_pass.numerics.norm import Gradient
from mxnorm_pass.numerics.norm_cast import NormCastSpec
from mxnorm_pass.numerics.rms import mean_square
from mxnorm_pass.ops.call import NormCastCall
from mxnorm_pass.ops.checks import (
    check_blocks,
    check_cast,
    check_inverse_rms,
    check_norm_cast,
    check_quantized,
    check_rows,
    check_rows_in_blocks,
)

log = logging.getLogger(__name__)

NAMESPACE = "mxnorm_pass"


def _norm_cast(
    x: Tensor, weight: Tensor | None, block_weights: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    spec = NormCastSpec(*options)
    check_norm_cast(x, weight, block_weights, spec)
    return functional.mxnorm_cast(
        x.contiguous(), weight, block_weights=block_weights, **spec.keywords()
    )


def _norm_cast_both(
    x: Tensor, weight: Tensor | None, block_weights: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *args, gain_in_rows = options
    spec = NormCastSpec(*args)
    check_norm_cast(x, weight, block_weights, spec)
    check_rows_in_blocks("x", x, spec.block_size)
    return functional.mxnorm_cast_both(
        x.contiguous(),
        weight,
        block_weights=block_weights,
        gain_in_rows=gain_in_rows,
        **spec.keywords(),
    )


_SPEC = len(fields(NormCastSpec))


def _after_add(function: Callable[..., Any]) -> Callable[..., Any]:
    """The op that adds a residual to its first argument and returns the sum before the rest."""

    def add_first(
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        block_weights: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, ...]:
        spec = NormCastSpec(*options[:_SPEC])
        check_norm_cast(x, weight, block_weights, spec, residual)
        total = (x + residual).contiguous()
        return total, *function(total, weight, block_weights, *options)

    return add_first


def _cast(
    x: Tensor, block_size: int, elem_dtype: torch.dtype, scale_mode: str
) -> tuple[Tensor, Tensor]:
    check_cast(block_size, elem_dtype, scale_mode)
    check_rows("x", x)
    check_blocks("x", x, block_size)
    return functional.mx_cast(
        x.contiguous(),
        block_size=block_size,
        elem_dtype=elem_dtype,
        scale_mode=scale_mode,  # type: ignore[arg-type]
    )


def _dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    check_quantized(values, scales, dtype)
    return dequantize_blocks(values.contiguous(), scales, dtype)


def _fake_cast(
    x: Tensor, block_size: int, elem_dtype: torch.dtype, scale_mode: str
) -> tuple[Tensor, Tensor]:
    check_cast(block_size, elem_dtype, scale_mode)
    check_rows("x", x)
    check_blocks("x", x, block_size)
    shape = x.shape
    scales = x.new_empty((*shape[:-1], shape[-1] // block_size), dtype=torch.float8_e8m0fnu)
    return x.new_empty(shape, dtype=elem_dtype), scales


def _fake_norm_cast(
    x: Tensor, weight: Tensor | None, block_weights: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    spec = NormCastSpec(*options)
    check_norm_cast(x, weight, block_weights, spec)
    values, scales = _fake_cast(x, spec.block_size, spec.elem_dtype, spec.scale_mode)
    if spec.scale_layout == "blocked":
        scales = scales.new_empty(blocked_scales_shape(scales.shape))
    return values, scales, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _fake_norm_cast_both(
    x: Tensor, weight: Tensor | None, block_weights: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *args, _ = options
    spec = NormCastSpec(*args)
    along_rows = _fake_norm_cast(x, weight, block_weights, *args)
    check_rows_in_blocks("x", x, spec.block_size)
    rows = x.reshape(-1, x.shape[-1]).t()
    return *along_rows, *_fake_cast(rows, spec.block_size, spec.elem_dtype, spec.scale_mode)


def _inverse_rms(
    x: Tensor,
    block_weights: list[float] | None,
    eps: float,
    p: float,
    block_size: int,
    gradient: Gradient,
) -> Tensor:
    check_inverse_rms(x, block_weights, p, block_size, gradient)
    square = mean_square(x.contiguous(), "mxnorm", p, block_size, _weights(block_weights, x))
    return torch.rsqrt(square + eps)


def _inverse_rms_backward(
    grad: Tensor,
    x: Tensor,
    rho: Tensor,
    block_weights: list[float] | None,
    eps: float,
    p: float,
    block_size: int,
    gradient: Gradient,
) -> Tensor:
    check_inverse_rms(x, block_weights, p, block_size, gradient)
    return functional.inverse_rms_vjp(
        x.contiguous(),
        rho,
        grad,
        eps=eps,
        p=p,
        block_size=block_size,
        block_weights=_weights(block_weights, x),
        gradient=gradient,
    )


def _weights(block_weights: list[float] | None, like: Tensor) -> Tensor | None:
    if block_weights is None:
        return None
    return torch.tensor(block_weights, dtype=torch.float32, device=like.device)


def _fake_inverse_rms(x: Tensor, block_weights: list[float] | None, *options: Any) -> Tensor:
    _, p, block_size, gradient = options
    check_inverse_rms(x, block_weights, p, block_size, gradient)
    return x.new_empty((*x.shape[:-1], 1))


def _fake_inverse_rms_backward(grad: Tensor, x: Tensor, *options: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _do_nothing(values: list[Tensor], scope: int, position: int) -> None:
    return


def _fake_dequantize(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    check_quantized(values, scales, dtype)
    return values.new_empty(values.shape, dtype=dtype)


_library = torch.library.Library(NAMESPACE, "DEF")
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {}


def _define(
    schema: str,
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    differentiable: bool = False,
) -> Any:
    name = schema.split("(")[0]
    _library.define(schema)
    _library.impl(name, eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if not differentiable:
        _library.impl(name, _without_derivative(op), "Autograd")
    DECOMPOSITIONS[op] = eager
    return op


def _run_kernel_on_cuda(op: Any) -> Any:
    """Where a kernel can run the op it does; where none can, its decomposition."""

    def run(*args: Any) -> Any:
        call = NormCastCall.of(op, args)
        reason = call.why_no_kernel()
        if reason is not None:
            log.debug("%s is decomposed: %s", op, reason)
            return DECOMPOSITIONS[op](*args)
        with torch.cuda.device(call.x.device):
            return call.run_kernel()

    _library.impl(op._schema.name.split("::")[1], run, "CUDA")
    return op


def _without_derivative(op: Any) -> Callable[..., Any]:
    """Refuse to be differentiated: the graphs that call the ops have their backward already."""

    def forward(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            raise RuntimeError(
                f"{op} has no derivative: what mxnorm_pass.apply rewrote is for inference. Run it "
                "under torch.no_grad(), or train with torch.compile(model, backend='mxnorm')"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return forward


_NORM = (
    "Tensor? weight, Tensor? block_weights, float eps, str estimator, float p, int block_size, "
    "ScalarType elem_dtype, str scale_mode, ScalarType? norm_dtype, ScalarType out_dtype, "
    "str scale_layout"
)
_ALONG_ROWS = "Tensor values, Tensor scales, Tensor rho"
_BOTH = f"{_ALONG_ROWS}, Tensor values_t, Tensor scales_t"

norm_cast = _define(
    f"norm_cast(Tensor x, {_NORM}) -> ({_ALONG_ROWS})",
    _norm_cast,
    _fake_norm_cast,
)
norm_cast_both = _define(
    f"norm_cast_both(Tensor x, {_NORM}, bool gain_in_rows) -> ({_BOTH})",
    _norm_cast_both,
    _fake_norm_cast_both,
)
add_norm_cast = _define(
    f"add_norm_cast(Tensor x, Tensor residual, {_NORM}) -> (Tensor total, {_ALONG_ROWS})",
    _after_add(_norm_cast),
    _after_add(_fake_norm_cast),
)
add_norm_cast_both = _define(
    f"add_norm_cast_both(Tensor x, Tensor residual, {_NORM}, bool gain_in_rows) "
    f"-> (Tensor total, {_BOTH})",
    _after_add(_norm_cast_both),
    _after_add(_fake_norm_cast_both),
)
cast = _define(
    "cast(Tensor x, int block_size, ScalarType elem_dtype, str scale_mode) "
    "-> (Tensor values, Tensor scales)",
    _cast,
    _fake_cast,
)
dequantize = _define(
    "dequantize(Tensor values, Tensor scales, ScalarType dtype) -> Tensor",
    _dequantize,
    _fake_dequantize,
)

_ESTIMATE = "float[]? block_weights, float eps, float p, int block_size, str gradient"
inverse_rms_backward = _define(
    f"inverse_rms_backward(Tensor grad, Tensor x, Tensor rho, {_ESTIMATE}) -> Tensor",
    _inverse_rms_backward,
    _fake_inverse_rms_backward,
)
inverse_rms = _define(
    f"inverse_rms(Tensor x, {_ESTIMATE}) -> Tensor",
    _inverse_rms,
    _fake_inverse_rms,
    differentiable=True,
)
mark = _define(
    "mark(Tensor[] values, int scope, int position) -> ()",
    _do_nothing,
    _do_nothing,
    differentiable=True,
)
# Without results it would be dead code.
fx.node.has_side_effect(mark)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.options = inputs
    ctx.save_for_backward(x, output)


def _differentiate_inverse_rms(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, rho = ctx.saved_tensors
    return inverse_rms_backward(grad, x, rho, *ctx.options), *(None for _ in ctx.options)


torch.library.register_autograd(
    f"{NAMESPACE}::inverse_rms",
    _differentiate_inverse_rms,
    setup_context=_save_for_backward,
    lib=_library,
)

NORM_CASTS = tuple(
    map(_run_kernel_on_cuda, (norm_cast, norm_cast_both, add_norm_cast, add_norm_cast_both))
)
