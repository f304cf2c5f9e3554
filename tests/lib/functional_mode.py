"""An uncompiled model whose norms and norm-fed linears are those of ``functional``.

While the mode is active, each norm returns what its class computes and leaves a note on that very
tensor. The note follows it through views, and where a linear reads the tensor, ``mx_linear`` takes
its place. All other readers (residuals, routers, experts) see the exact output. Nothing here knows
the pass or its report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mxnorm_pass import functional

_VIEWS = frozenset(
    {
        Tensor.view,
        Tensor.reshape,
        Tensor.flatten,
        Tensor.unsqueeze,
        Tensor.squeeze,
        Tensor.contiguous,
        Tensor.clone,
        torch.reshape,
        torch.flatten,
        torch.unsqueeze,
        torch.squeeze,
        F.dropout,
    }
)
# Components of module names: heads, and linears whose output selects experts.
_PLAIN = frozenset({"lm_head", "output", "gate", "router"})


@dataclass(frozen=True)
class NormRule:
    """What a norm module computes, as arguments of ``functional.mxnorm``.

    Attributes:
        one_plus: the gain is 1 + weight, in float32.
        early_cast: x / rms is rounded to the input's dtype before the gain.
    """

    one_plus: bool
    early_cast: bool

    @classmethod
    @torch.no_grad()
    def of(cls, norm: nn.Module, x: Tensor, output: Tensor) -> NormRule:
        """The first rule whose exact output on x is the module's own, bit for bit."""
        for flags in product((False, True), repeat=2):
            rule = cls(*flags)
            if torch.equal(rule.output(norm, x, "exact"), output):
                return rule
        raise AssertionError(f"no rule gives the output of {type(norm).__name__}")

    def gain(self, norm: nn.Module) -> Tensor | None:
        weight = getattr(norm, "weight", None)
        return 1.0 + weight.float() if self.one_plus and weight is not None else weight

    def arguments(self, norm: nn.Module, x: Tensor) -> dict[str, Any]:
        norm_dtype = x.dtype if self.early_cast else None
        return {"eps": eps_of(norm), "norm_dtype": norm_dtype, "out_dtype": x.dtype}

    def output(self, norm: nn.Module, x: Tensor, estimator: Any, **options: Any) -> Tensor:
        arguments = self.arguments(norm, x) | options
        return functional.mxnorm(x, self.gain(norm), estimator=estimator, **arguments)


def eps_of(norm: nn.Module) -> float:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(norm, name, None), float):
            return value
    raise AssertionError(f"{type(norm).__name__} has no eps")


def rms_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The model's norms by name; T5 calls its RMSNorm a layer norm."""
    modules = {name: (m, type(m).__name__) for name, m in model.named_modules()}
    suffixes = ("RMSNorm", "T5LayerNorm")
    return {name: m for name, (m, kind) in modules.items() if kind.endswith(suffixes)}


def randomise_gains(model: nn.Module) -> None:
    """Gains away from 1, so that a dropped one shows; weights start at 1, or at 0 as 1 + w."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        weights = [p for norm in rms_norms(model).values() for p in norm.parameters()]
        for weight in weights:
            weight += torch.rand(weight.shape, generator=random) - 0.5


@dataclass
class _Note:
    """How one norm's output came about; what linears read in its place is computed once."""

    name: str
    norm: nn.Module
    rule: NormRule
    x: Tensor
    options: Mapping[str, Any]

    @cached_property
    def output(self) -> Tensor:
        return self.rule.output(self.norm, self.x, "mxnorm", **self.options)

    @cached_property
    def quantized(self) -> tuple[Tensor, Tensor]:
        """Values and scales of the normalised input; the gain is left to the weight."""
        values, scales, _ = functional.mxnorm_cast(self.x, eps=eps_of(self.norm))
        return values, scales


class FunctionalMode(TorchFunctionMode):
    """See the module's description.

    Args:
        estimator: "mxnorm"; "exact" casts what the norm's class computes.
        options: keyword arguments of ``functional.mxnorm``, such as ``gradient``.

    Attributes:
        calls: names of the norms that ran, in order.
        rules: by the norms' class.
        layer_norm_calls: how often an ``nn.LayerNorm`` ran.
        linears: for each norm that feeds linears, their names.
    """

    def __init__(self, model: nn.Module, estimator: str, **options: Any) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.rules: dict[str, NormRule] = {}
        self.layer_norm_calls = 0
        self.linears: dict[str, list[str]] = {}
        self._exact = estimator == "exact"
        self._options = options
        self._names = {id(p): n.rpartition(".")[0] for n, p in model.named_parameters()}
        tied = model.named_parameters(remove_duplicate=False)
        self._plain = {id(p) for n, p in tied if _PLAIN.intersection(n.split("."))}
        self._norms = rms_norms(model)

    def __enter__(self) -> FunctionalMode:
        self._hooks = [
            norm.register_forward_hook(partial(self._leave_note, name))
            for name, norm in self._norms.items()
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _leave_note(self, name: str, norm: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        rule = NormRule.of(norm, args[0], output)
        self.calls.append(name)
        self.rules[type(norm).__name__] = rule
        output._note = _Note(name, norm, rule, args[0], self._options)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.layer_norm_calls += function is F.layer_norm
        note = getattr(args[0], "_note", None) if args else None
        if note is not None and function is F.linear and self._is_fed(*args[:2]):
            return self._linear(note, *args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        if note is not None and function in _VIEWS and result.dtype == args[0].dtype:
            result._note = note
        return result

    def _is_fed(self, x: Tensor, weight: Tensor) -> bool:
        whole_blocks = all(size % 32 == 0 for size in weight.shape)
        return id(weight) in self._names and id(weight) not in self._plain and whole_blocks

    def _linear(self, note: _Note, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        self.linears.setdefault(note.name, []).append(self._names[id(weight)])
        if self._exact:
            return functional.mx_linear(x, weight, bias)
        values, scales = (t.reshape(*x.shape[:-1], t.shape[-1]) for t in note.quantized)
        gain = note.rule.gain(note.norm)
        output = note.output.reshape(x.shape)
        return functional.mx_linear(output, weight, bias, quantized=(values, scales), gain=gain)
