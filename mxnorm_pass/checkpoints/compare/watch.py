"""The backend's own graph, run node by node, with an eye on the ops that replaced the norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from mxnorm_pass import ops
from mxnorm_pass.checkpoints.batches import Batch, token_rows
from mxnorm_pass.compilation.inner import compile_with_interpreter
from mxnorm_pass.compilation.job import CompileJob
from mxnorm_pass.graph.modules import module_path
from mxnorm_pass.numerics.cast import mx_dequantize
from mxnorm_pass.numerics.norm_cast import mxnorm_cast
from mxnorm_pass.ops.call import NormCastCall
from mxnorm_pass.options.parse import parse
from mxnorm_pass.report.announce import announce_failure
from mxnorm_pass.report.report import Report
from mxnorm_pass.report.site import Site


@dataclass
class Observation:
    """What one norm's op returned, summed up over tokens that are no padding.

    Attributes:
        ratios: rho~ / rho of these tokens, in order, one tensor [T] for each call.
        places: their numbers among all tokens, padding included, alike.
    """

    ratios: list[Tensor] = field(default_factory=list)
    places: list[Tensor] = field(default_factory=list)
    error: float = 0.0
    power: float = 0.0
    _tokens: int = 0

    def add(self, call: NormCastCall, results: Mapping[str, Tensor], batch: Batch) -> None:
        x = results.get("total", call.x).to(torch.float32)
        rho = torch.rsqrt(x.square().mean(-1, keepdim=True) + call.spec.eps)
        places = torch.arange(rho.numel(), device=x.device).reshape(rho.shape)
        self.ratios.append(token_rows(batch, results["rho"] / rho).flatten().cpu())
        self.places.append(token_rows(batch, places).flatten().cpu() + self._tokens)
        self._tokens += rho.numel()
        with_gain = call.weight is not None and call.gain_in_rows is not False
        y = x * rho * call.weight.to(torch.float32) if with_gain else x * rho  # type: ignore[union-attr]
        error = _dequantized(call, x, results) - y
        self.error += float(token_rows(batch, error).square().sum())
        self.power += float(token_rows(batch, y).square().sum())

    @property
    def relative_error(self) -> float:
        """Of the values that the linears read, against the exact norm before any cast."""
        return math.sqrt(self.error / self.power) if self.power else 0.0


def _dequantized(call: NormCastCall, x: Tensor, results: Mapping[str, Tensor]) -> Tensor:
    values, scales, tensor_scale = results["values"], results["scales"], call.tensor_scale
    if call.spec.scale_layout != "row-major":
        options = {**call.spec.keywords(), "scale_layout": "row-major"}
        weight = call.weight if call.gain_in_rows is not False else None
        values, scales, _ = mxnorm_cast(
            x,
            weight,
            block_weights=call.block_weights,
            tensor_scale=tensor_scale,
            **options,
        )
    return mx_dequantize(values, scales, format=call.spec.format, tensor_scale=tensor_scale)


class WatchedModel:
    """A model compiled for a config, whose norms' ops are watched and can be set to exact.

    Args:
        options: as for ``torch.compile``; ``inner`` and Inductor's play no part.

    Attributes:
        exact: names of the norms that now run with ``estimator="exact"`` in the same graph.
        observed: what the ops returned, by norm name; None: nobody looks.
        batch: the inputs of the run, which say what is padding.
        report: what the backend did.
    """

    def __init__(self, model: nn.Module, options: Mapping[str, Any]) -> None:
        self.exact: frozenset[str] = frozenset()
        self.observed: dict[str, Observation] | None = None
        self.batch: Batch = {}
        self.report = Report()
        self._parsed = parse({**options, "inner": "eager"})
        self._run = torch.compile(model, backend=self._backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    @property
    def sites(self) -> list[Site]:
        """The fused ones, each once."""
        return list({site.norm: site for site in self.report.fused}.values())

    def _backend(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        job = CompileJob.of(gm, example_inputs, self._parsed)
        job.check_channels()
        try:
            job.prepare()
            compiled = compile_with_interpreter(job, lambda graph: _Watching(graph, self))
        except Exception as error:
            announce_failure(error, gm)
            raise
        for result in job.results:
            self.report.add(result.graph)
        return compiled

    def norm_cast(self, norm: str, op: Any, args: Sequence[Any], first: bool) -> Any:
        """Run an op of that norm; the first of several is observed."""
        names = [argument.name for argument in op._schema.arguments]
        if norm in self.exact:
            given = dict(zip(names, args, strict=True))
            args = list({**given, "estimator": "exact", "block_weights": None}.values())
        results = op(*args)
        if first and self.observed is not None:
            named = dict(zip((r.name for r in op._schema.returns), results, strict=True))
            observation = self.observed.setdefault(norm, Observation())
            observation.add(NormCastCall.of(op, args), named, self.batch)
        return results


class _Watching(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, watched: WatchedModel) -> None:
        super().__init__(gm)
        self._watched = watched
        self._norms = {n: module_path(n) for n in gm.graph.nodes if ops.normalizes(n.target)}
        self._first = {norm: node for node, norm in reversed(self._norms.items())}

    def run_node(self, n: fx.Node) -> Any:
        norm = self._norms.get(n)
        if norm is None:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        return self._watched.norm_cast(norm, n.target, args, self._first[norm] is n)
