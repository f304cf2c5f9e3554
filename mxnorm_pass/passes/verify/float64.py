"""Run a joint graph in float64, with MX casts taken as the identity, for ``verify``.

Forward nodes run under autograd, so that the result can be differentiated anew; backward nodes read
their values as constants, as the compiled backward does. Every element type of high precision
becomes float64. A cast hands on what it is given, with scales of 1, whoever has written it; ops of
this package are what ``functional`` says they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from mxnorm_pass import ops
from mxnorm_pass.errors import VerificationError
from mxnorm_pass.graph.modules import module_path
from mxnorm_pass.graph.nodes import aten, is_backward, prims
from mxnorm_pass.numerics.cast import mx_dequantize
from mxnorm_pass.numerics.formats import BlockFormat, block_format
from mxnorm_pass.numerics.norm import Gradient, inverse_rms
from mxnorm_pass.numerics.recipe_text import operand_of_text
from mxnorm_pass.numerics.rms import Estimator, mean_square
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.passes.match.casts.find import Cast, find_casts

_WIDE = (torch.float32, torch.bfloat16, torch.float16)
_ONE = {torch.uint8: 127, torch.float8_e8m0fnu: 127, torch.float8_e4m3fn: 0x38}  # bytes of 1.0
# Of these the dtype says how bits are read, or what the input's was, not what is computed.
_KEEP_DTYPE = frozenset({aten.view.dtype})
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
_NO_LOW_PRECISION = frozenset({aten._softmax.default, aten._log_softmax.default})

Env = dict[fx.Node, Any]


class Float64Interpreter:
    """Evaluates the nodes of one joint graph.

    Args:
        config: says which gradient a norm's estimate has.
        stop: ``detach`` stops the gradient.

    Raises:
        VerificationError: the graph holds a float8 cast that is no MX cast.
    """

    def __init__(self, graph: fx.Graph, config: MXNormConfig, *, stop: bool = True) -> None:
        self._graph = graph
        self._stop = stop
        self._owner = graph.owning_module
        self._config = config
        self._casts: dict[fx.Node, Cast] = {}
        for cast in find_casts(graph, backward=True):
            if not isinstance(cast, Cast):
                raise VerificationError(
                    f"verify: {cast.skip.node} casts in a way that is no known MX cast "
                    f"({cast.skip.detail}), so the graph cannot be checked in float64"
                )
            self._casts |= dict.fromkeys(cast.nodes, cast)

    def run(self, wanted: Sequence[fx.Node], inputs: Sequence[Any]) -> list[Any]:
        """The values of some nodes."""
        env: Env = dict(zip(self._graph.find_nodes(op="placeholder"), inputs, strict=True))
        for node in self._graph.nodes:
            if node.op == "get_attr":
                env[node] = _to_float64(getattr(self._owner, str(node.target)))
            elif node in self._casts:
                if any(user not in self._casts[node].nodes for user in node.users):
                    env[node] = self._cast_result(node, env)
            elif node.op == "call_function":
                env[node] = self._call(node, env)
        return [env[node] for node in wanted]

    def _cast_result(self, node: fx.Node, env: Env) -> Tensor:
        """Values and scales of a cast, which alone are read outside of it, maybe reshaped."""
        like, cast = node.meta["val"], self._casts[node]
        e8m0 = like.dtype in (torch.uint8, torch.float8_e8m0fnu)
        if node is cast.scales or (e8m0 and node is not cast.values):
            return _ones(like)
        source: Tensor = _read(node, env[cast.source])
        return _held(source, cast.format).reshape(_shape(like))

    def _call(self, node: fx.Node, env: Env) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _read(node, env[n]))
        function = self._function(node)
        with torch.set_grad_enabled(not is_backward(node)):
            try:
                return _to_float64(function(*args, **kwargs))
            except (NotImplementedError, RuntimeError):
                if any(isinstance(a, Tensor) and a.is_complex() for a in args):
                    raise _reads_bits(node) from None
                raise

    def _function(self, node: fx.Node) -> Callable[..., Any]:
        target: Any = node.target
        if ops.normalizes(target):
            gradient = self._config.resolve(module_path(node)).config.gradient
            return partial(_norm_cast, target, gradient, node.meta["val"])
        if target in _OWN:
            return _OWN[target]
        if target is aten.detach.default and not self._stop:
            return aten.alias.default
        name = getattr(target, "_opname", "")
        if name.startswith("_scaled_dot_product_"):
            return partial(_attention, target)
        if target is torch.ops.higher_order.invoke_subgraph:
            return self._body
        if target is torch.ops.higher_order.cond:
            return self._branch
        if isinstance(target, torch._ops.HigherOrderOperator):
            return partial(_as_it_is, node)
        if name == "_grouped_mm":
            return _grouped_mm
        return partial(_in_float64, target)

    def _branch(
        self, predicate: Any, true: fx.GraphModule, false: fx.GraphModule, operands: Sequence[Any]
    ) -> tuple[Any, ...]:
        return self._body(true if predicate else false, "", *operands)

    def _body(self, body: fx.GraphModule, name: str, *operands: Any) -> tuple[Any, ...]:
        outputs = body.graph.output_node().args[0]
        interpreter = Float64Interpreter(body.graph, self._config, stop=self._stop)
        nodes = [n for n in outputs if isinstance(n, fx.Node)]  # type: ignore[union-attr]
        values = dict(zip(nodes, interpreter.run(nodes, operands), strict=True))
        return tuple(values.get(n) for n in outputs)  # type: ignore[union-attr, arg-type]


def _reads_bits(node: fx.Node) -> VerificationError:
    return VerificationError(
        f"verify: {node} ({node.target}) reads the bits of elements that share a byte, which "
        "stand for what was cast, so the graph cannot be checked in float64"
    )


def _read(reader: fx.Node, value: Any) -> Any:
    """What a node sees: for a backward one the forward's values are constants."""
    if not is_backward(reader):
        return value
    return pytree.tree_map_only(Tensor, Tensor.detach, value)


def _shape(like: Tensor) -> list[int]:
    return [size if isinstance(size, int) else size.node.hint for size in like.shape]


def _ones(like: Tensor) -> Tensor:
    one = _ONE[like.dtype]
    ones = torch.full(_shape(like), one, dtype=torch.uint8, device=like.device)
    return ones.view(like.dtype)


def _to_float64(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.dtype in _WIDE else t, value)


def _in_float64(target: Any, *args: Any, **kwargs: Any) -> Any:
    if target is operator.getitem or target in _KEEP_DTYPE:
        return target(*args, **kwargs)
    if target in _VIEWS:
        # Other implementations of an op may lay out their results differently.
        return args[0].reshape(*args[1:])
    if target in _NO_LOW_PRECISION:
        args = (*args[:2], False)
    wider: Callable[[Any], Any] = partial(
        pytree.tree_map_only, torch.dtype, lambda d: torch.float64 if d in _WIDE else d
    )
    return target(*wider(args), **wider(kwargs))


def _as_it_is(node: fx.Node, *args: Any) -> Any:
    """A loop, in its own dtypes; what is differentiated through it is left out."""
    like = fx.map_arg(node.args, lambda n: n.meta.get("val"))
    leaves, spec = pytree.tree_flatten(args)
    pairs = zip(leaves, pytree.tree_leaves(like), strict=True)
    own = [
        t.to(v.dtype) if isinstance(t, Tensor) and isinstance(v, Tensor) else t for t, v in pairs
    ]
    with torch.no_grad():
        return node.target(*pytree.tree_unflatten(own, spec))  # type: ignore[operator]


def _norm_cast(
    op: Any, gradient: Gradient, like: Sequence[Tensor], *args: Any
) -> tuple[Tensor, ...]:
    parameters = (argument.name for argument in op._schema.arguments)
    given: Mapping[str, Any] = dict(zip(parameters, args, strict=False))
    residual, weight = given.get("residual"), given["weight"]
    x = given["x"] if residual is None else given["x"] + residual
    names = ("eps", "estimator", "p", "block_weights")
    fmt = block_format(given["format"])
    rho = _rho(x, gradient, block_size=fmt.block_size, **{name: given[name] for name in names})
    y = x * rho if weight is None else x * rho * weight
    in_rows = y if given.get("gain_in_rows", True) else x * rho
    results: dict[str, Any] = {
        "total": x,
        "values": _held(in_rows, fmt),
        "rho": rho,
        "values_t": _along_t(y.reshape(-1, y.shape[-1]).t(), fmt, given.get("along_t", "")),
    }
    outputs = (result.name for result in op._schema.returns)
    pairs = zip(outputs, like, strict=True)
    return tuple(results[n] if n in results else _ones(t) for n, t in pairs)


def _along_t(columns: Tensor, fmt: BlockFormat, operand: str) -> Tensor:
    return _operand_cast(columns, operand, None)[0] if operand else _held(columns, fmt)


def _held(x: Tensor, fmt: BlockFormat) -> Tensor:
    """What is cast, in the shape of values: two elements that share a byte as a complex number."""
    if fmt.element.per_byte == 1:
        return x
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())


def _inverse_rms(
    x: Tensor, block_weights: Sequence[float] | None, eps: float, p: float, size: int, gradient: Any
) -> Tensor:
    weights = None if block_weights is None else torch.tensor(block_weights).to(x)
    return _rho(
        x, gradient, eps=eps, estimator="mxnorm", p=p, block_size=size, block_weights=weights
    )


def _rho(
    x: Tensor, gradient: Gradient, *, eps: float, estimator: Estimator, **options: Any
) -> Tensor:
    """The inverse RMS; autograd finds its derivative, unless it is to have another one."""
    if gradient == "true" or estimator == "exact":
        return torch.rsqrt(mean_square(x, estimator, **options) + eps)
    return inverse_rms(x, eps=eps, estimator=estimator, gradient=gradient, **options)


def _dequantize(
    values: Tensor,
    scales: Tensor,
    format: str,
    dtype: torch.dtype,
    tensor_scale: Tensor | None = None,
) -> Tensor:
    """Values that the graph was given are in bytes; those of a cast are what was cast."""
    if values.is_complex():
        return torch.view_as_real(values).flatten(-2)
    if values.itemsize > 1:
        return values
    if tensor_scale is not None:
        tensor_scale = tensor_scale.float()
    return mx_dequantize(values, scales, format=format, tensor_scale=tensor_scale).double()


def _mx_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    x_format: str,
    weight_format: str,
    dtype: torch.dtype,
    x_tensor_scale: Tensor | None = None,
    weight_tensor_scale: Tensor | None = None,
) -> Tensor:
    rows = _dequantize(x, x_scales, x_format, dtype, x_tensor_scale)
    matrix = _dequantize(weight, weight_scales, weight_format, dtype, weight_tensor_scale)
    y = rows @ matrix.t()
    return y if bias is None else y + bias


def _operand_cast(x: Tensor, *drawn: Any) -> tuple[Tensor, None]:
    """Its transform cancels in the product, which is divided by the headroom of both operands."""
    *_, operand, _tensor_scale = drawn
    return x * operand_of_text(operand).cast.headroom, None


_OWN: dict[Any, Callable[..., Any]] = {
    # It has no derivative of its own.
    prims.convert_element_type.default: lambda x, dtype: _in_float64(aten.to.dtype, x, dtype),
    aten.copy.default: lambda into, source, *_: source.expand_as(into),
    ops.inverse_rms: _inverse_rms,
    ops.dequantize: _dequantize,
    ops.mx_linear: _mx_linear,
    ops.recipe_matmul: lambda left, right, *_: left @ right.t(),
    ops.operand_cast: _operand_cast,
    # What it scales is taken as it is.
    ops.tensor_scale: lambda x: x.new_ones(()),
    ops.operand_tensor_scale: lambda x, *_: x.new_ones(()),
}


def _attention(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Attention's variants, of which some have no float64, by their mathematics."""
    schema = target._schema
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    given = {a.name: given.get(a.name, a.default_value) for a in schema.arguments}
    q, k, v = (given[name] for name in ("query", "key", "value"))
    mask = given.get("attn_mask") if "attn_mask" in given else given.get("attn_bias")
    options = {"attn_mask": mask, "is_causal": given["is_causal"], "scale": given["scale"]}
    if "backward" not in schema.name:
        result = _by_definition(q, k, v, **options)
        return result, *(None for _ in schema.returns[1:])
    gradient = given["grad_out"] if "grad_out" in given else given["grad_out_"]
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        result = _by_definition(*leaves, **options)
    gradients = torch.autograd.grad(result, leaves, gradient)
    return *gradients, *(None for _ in schema.returns[3:])


def _by_definition(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Any, is_causal: bool, scale: Any
) -> Tensor:
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        scores = scores.masked_fill(~allowed, -torch.inf)
    if attn_mask is not None:
        scores = scores + attn_mask
    # Rows that see nothing are 0, as in the fused kernels.
    result: Tensor = scores.softmax(-1).nan_to_num(0.0) @ v
    return result


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    if offs is None:
        return a @ b
    bounds = [0, *offs.tolist()]
    groups = list(zip(bounds, bounds[1:], strict=False))
    if a.ndim == 2 and b.ndim == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in groups])
    if a.ndim == 2:
        rows = [a[i:j] @ b[g] for g, (i, j) in enumerate(groups)]
        rest = a.new_zeros(a.shape[0] - bounds[-1], b.shape[-1])
        return torch.cat([*rows, rest])
    return torch.cat([a[g] @ b[:, i:j] for g, (i, j) in enumerate(groups)], -1)
