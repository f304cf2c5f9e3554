"""Bodies in a graph: layers that share one, branches, loops, checkpointed layers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matching import F32, GRADIENT_TOLERANCE, expected_warnings
from pairwise import each_value, some
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mxnorm_pass
from mxnorm_pass import MXNormWarning, Report, SkipReason, functional

pytestmark = expected_warnings
D, EPS = 64, 1e-6


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.lin = nn.RMSNorm(D, eps=EPS), nn.Linear(D, D, bias=False)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lin(self.norm(x))

    def reference(self, x: Tensor, mode: str = "fused") -> Tensor:
        """Args: mode: "fused", "off" (neither norm nor linear) or "norm off"."""
        if mode == "off":
            return self.forward(x)
        weight = self.lin.weight
        if mode == "norm off":
            return x + functional.mx_linear(self.norm(x), weight)
        y = functional.mxnorm(x, self.norm.weight, eps=EPS)
        quantized = functional.mxnorm_cast(x, eps=EPS)[:2]
        return x + functional.mx_linear(y, weight, gain=self.norm.weight, quantized=quantized)


class SharedLayer(Layer):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + self.lin(self.norm(x))


class Stack(nn.Module):
    """Three layers behind one another; the first has another input than the others."""

    def __init__(self, layer: type[Layer] = SharedLayer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def reference(self, x: Tensor, modes: dict[int, str]) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = Layer.reference(layer, x, modes.get(i, "fused"))
        return x


def inputs() -> Tensor:
    x = torch.randn(8, D, generator=torch.Generator().manual_seed(1))
    x[:, :4] *= 5
    return x


def run(model: Any, x: Tensor, **options: Any) -> tuple[Tensor, Report]:
    torch._dynamo.reset()
    with mxnorm_pass.record() as report:
        return torch.compile(model, backend="mxnorm", options=options)(x), report


def gradients(model: nn.Module, x: Tensor, function: Callable[[Tensor], Any]) -> dict[str, Tensor]:
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    out.backward(torch.linspace(-1, 1, out.numel()).reshape(out.shape))
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"out": out.detach().clone(), "x": leaf.grad, **found}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        # Of a branch that is not taken all gradients are 0.
        error, scale = float((got[name] - value).norm()), float(value.norm())
        assert error <= GRADIENT_TOLERANCE[F32] * scale, f"{name}: {error} of {scale}"


NAMES = [f"layers.{i}.norm" for i in range(3)]
TOGGLES: dict[str, tuple[dict[str, Any], dict[int, str]]] = {
    "all on": ({}, {}),
    "first off": ({"layers.0.*": False}, {0: "off"}),
    "last off": ({"layers.2.*": False}, {2: "off"}),
    "one norm off": ({"layers.1.norm": False}, {1: "norm off"}),
    "one on": ({"layers.*": False, "layers.1.*": True}, {0: "off", 2: "off"}),
}


@pytest.mark.full
@each_value(
    toggle=TOGGLES,
    train={"inference": False, "training": True},
    inner=["aot_eager", "inductor"],
)
def test_layers_that_share_a_body_are_told_apart(toggle: Any, train: bool, inner: str) -> None:
    modules, modes = toggle
    if inner == "inductor" and len(modes) > 1:
        pytest.skip("one toggle through Inductor is enough")
    model, x = Stack(), inputs()
    options = {"inner": inner, "modules": modules}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "mxnorm: (nothing|the pattern)", MXNormWarning)
        if train:
            torch._dynamo.reset()
            with mxnorm_pass.record() as report:
                compiled = torch.compile(model, backend="mxnorm", options=options)
                got = gradients(model, x, compiled)
            assert_same(got, gradients(model, x, lambda t: model.reference(t, modes)))
        else:
            with torch.no_grad():
                out, report = run(model, x, **options)
                torch.testing.assert_close(out, model.reference(x, modes), rtol=1e-6, atol=1e-6)
    assert sorted(site.norm for site in report.sites) == NAMES
    for i, name in enumerate(NAMES):
        (site,) = [s for s in report.sites if s.norm == name]
        expected = "skipped" if modes.get(i) else "fused"
        assert site.status == expected, str(site)
        if site.status == "fused":
            assert site.consumers == (f"layers.{i}.lin",)
        else:
            assert site.reason is SkipReason.DISABLED


def test_layers_that_are_treated_alike_stay_one_graph() -> None:
    model, x = Stack(), inputs()
    with torch.no_grad():
        _, report = run(model, x, inner="aot_eager")
    whole, body = report.graphs
    assert not whole.sites and [site.norm for site in body.sites] == NAMES
    with torch.no_grad():
        _, report = run(model, x, inner="aot_eager", modules={"layers.2.*": False})
    assert len(report.graphs) == 3


class Function(nn.Module):
    """The shared body is a function's: its calls differ in the weights alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = Layer(), Layer()

    def forward(self, x: Tensor) -> Tensor:
        @torch.compiler.nested_compile_region
        def body(t: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
            y = nn.functional.rms_norm(t, (D,), gain, EPS)
            return nn.functional.linear(y, weight)

        x = x * 2
        x = body(x, self.a.norm.weight, self.a.lin.weight)
        return body(x, self.b.norm.weight, self.b.lin.weight)


def test_calls_of_a_function_are_told_apart_by_their_weights() -> None:
    model = Function()
    with torch.no_grad():
        _, report = run(model, inputs(), inner="aot_eager")
        assert [site.consumers for site in report.fused] == [("a.lin.weight",), ("b.lin.weight",)]
        _, report = run(model, inputs(), inner="aot_eager", modules={"b.*": False})
    assert [site.consumers for site in report.fused] == [("a.lin.weight",)]
    assert [site.reason for site in report.skipped] == [SkipReason.DISABLED]


class Cond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shallow, self.deep = Layer(), Layer()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > -1e9, lambda t: self.shallow(t), lambda t: self.deep(t), (x,))


@pytest.mark.full
@some(["inductor"], inner=["aot_eager", "inductor"])
def test_branches_in_inference(inner: str) -> None:
    model, x = Cond(), inputs()
    with torch.no_grad():
        got, report = run(model, x, inner=inner)
        want = model.shallow.reference(x)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert sorted((s.norm, s.status) for s in report.sites) == [
        ("deep.norm", "fused"),
        ("shallow.norm", "fused"),
    ]


@some(["aot_eager"], inner=["aot_eager", "inductor"])
def test_branches_in_training_keep_the_exact_norm(inner: str) -> None:
    model, x = Cond(), inputs()
    torch._dynamo.reset()
    options = {"inner": inner, "quantize": "all"}
    with mxnorm_pass.record() as report:
        got = gradients(model, x, torch.compile(model, backend="mxnorm", options=options))
    assert_same(got, gradients(model, x, model))
    assert sorted(s.norm for s in report.sites) == ["deep.norm", "shallow.norm"]
    assert {s.reason for s in report.sites} == {SkipReason.BACKWARD}


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = Layer()

    def forward(self, x: Tensor) -> Tensor:
        def condition(i: Tensor, t: Tensor) -> Tensor:
            return i < 3

        def body(i: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return i + 1, self.layer(t)

        return torch._higher_order_ops.while_loop(condition, body, (torch.tensor(0), x))[1]


def test_a_loop_in_inference() -> None:
    model, x = Loop(), inputs()
    with torch.no_grad():
        got, report = run(model, x, inner="aot_eager")
        for _ in range(3):
            x = model.layer.reference(x)
    torch.testing.assert_close(got, x, rtol=1e-6, atol=1e-6)
    assert [(s.norm, s.status) for s in report.sites] == [("layer.norm", "fused")]


class CheckpointedLayer(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def test_checkpointed_layers_are_part_of_the_graph() -> None:
    model, x = Stack(CheckpointedLayer), inputs()
    torch._dynamo.reset()
    with mxnorm_pass.record() as report:
        options = {"inner": "aot_eager", "modules": {"layers.1.*": False}}
        got = gradients(model, x, torch.compile(model, backend="mxnorm", options=options))
    assert_same(got, gradients(model, x, lambda t: model.reference(t, {1: "off"})))
    assert len(report.graphs) == 1
    assert [(s.norm, s.status) for s in report.sites] == [
        (NAMES[0], "fused"),
        (NAMES[1], "skipped"),
        (NAMES[2], "fused"),
    ]
