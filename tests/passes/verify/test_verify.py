"""``verify=True``: what is wrong is found and named, and what is right passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_programs import FUSED, HalfGradient, Program, inputs
from matching import BF16, F32, expected_warnings
from pairwise import each_value, pairwise, some
from reference import build_llama, convert_to_mxfp8_training, token_ids
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import Report, ops
from mxnorm_pass.errors import VerificationError
from mxnorm_pass.passes.rewrite import estimate, fusion

pytestmark = expected_warnings
D, EPS = 64, 1e-6


class Layer(nn.Module):
    def __init__(self, dtype: torch.dtype = F32) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D, eps=EPS, dtype=dtype)
        self.lin = nn.Linear(D, D, bias=False, dtype=dtype)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.lin(self.norm(x)).tanh()


class Stack(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = layer(), layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class SharedLayer(Layer):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + self.lin(self.norm(x)).tanh()


class OwnGradients(Layer):
    """A hook, a Function and a detached reader around what is fused."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        out = self.lin(HalfGradient.apply(y))
        y.register_hook(lambda g: g.clamp(-0.1, 0.1))
        return x + out + y.detach().sigmoid()


def verified(model: nn.Module, *args: Any, **options: Any) -> Report:
    """A training compile that checks itself."""
    torch._dynamo.reset()
    options = {"inner": "aot_eager", "verify": True, **options}
    with mxnorm_pass.record() as report:
        torch.compile(model, backend="mxnorm", options=options)(*args)
    return report


def x_of(dtype: torch.dtype = F32) -> Tensor:
    return inputs(8).to(dtype).requires_grad_()


# What is wrong

Break = Callable[[pytest.MonkeyPatch], None]


def wrong_factor(patch: pytest.MonkeyPatch) -> None:
    right = estimate.inverse_rms_vjp
    patch.setattr(estimate, "inverse_rms_vjp", lambda *a, **k: right(*a, **k) * 0.5)


def wrong_derivative(patch: pytest.MonkeyPatch) -> None:
    """The rewrite's alone; ``functional`` is right."""
    right = estimate._inverse_rms_vjp
    patch.setattr(estimate, "_inverse_rms_vjp", lambda *a: right(*a) + a[1] * 0.01)


def no_derivative(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(estimate, "_inverse_rms_vjp", lambda grad, x, *options: torch.zeros_like(x))


def gain_twice(patch: pytest.MonkeyPatch) -> None:
    right = fusion.fold_gain

    def twice(*args: Any) -> None:
        right(*args)
        graph, fusion = args
        for node in graph.find_nodes(op="call_function", target=ops.norm_cast):
            node.update_arg(1, fusion.norm.gain)

    patch.setattr(fusion, "fold_gain", twice)


def exact_in_the_forward(patch: pytest.MonkeyPatch) -> None:
    """The forward is not what has been differentiated."""
    right = fusion.fuse_casts

    def fuse(graph: Any, *args: Any) -> Any:
        rho = right(graph, *args)
        rho.args[0].update_arg(5, "exact")
        return rho

    patch.setattr(fusion, "fuse_casts", fuse)


@pytest.mark.parametrize(
    "broken", [wrong_factor, wrong_derivative, no_derivative, gain_twice, exact_in_the_forward]
)
def test_a_wrong_rewrite_is_found(broken: Break, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Stack(), x_of()
    broken(monkeypatch)
    with pytest.raises(VerificationError, match="is not the derivative of the forward"):
        verified(model, x)
    verified(model, x, verify=False)


@pytest.mark.parametrize("off", ["first", "second"])
def test_the_message_names_the_site(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Stack(), x_of()
    wrong_derivative(monkeypatch)
    site = "second" if off == "first" else "first"
    with pytest.raises(VerificationError, match=f"the site is '{site}.norm'"):
        verified(model, x, modules={f"{off}.*": False})


@pytest.mark.parametrize("gradient", ["orthogonal", "paper"])
def test_a_wrong_gradient_of_another_kind_is_found(
    gradient: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_derivative(monkeypatch)
    with pytest.raises(VerificationError, match="is not the derivative"):
        verified(Stack(), x_of(), gradient=gradient)


@pytest.mark.full
def test_a_wrong_rewrite_of_a_shared_body_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_derivative(monkeypatch)
    with pytest.raises(VerificationError, match="is not the derivative"):
        verified(Stack(SharedLayer), x_of())


# What is right


@each_value(p=[1, 2, 3], gradient=["true", "orthogonal", "paper"])
def test_every_gradient_passes(gradient: str, p: int) -> None:
    report = verified(Stack(), x_of(), gradient=gradient, p=p)
    assert len(report.fused) == 2


@pytest.mark.full
@pytest.mark.parametrize("program", FUSED)
def test_models_with_gradients_of_their_own_pass(program: type[Program]) -> None:
    report = verified(program(), inputs(1, 32).requires_grad_(), modules={"off": False})
    assert report.fused and not report.skipped


@pytest.mark.full
@each_value(inner=["aot_eager", "inductor"], layer=[SharedLayer, OwnGradients])
def test_bodies_and_functions_pass(layer: type[Layer], inner: str) -> None:
    assert len(verified(Stack(layer), x_of(), inner=inner).fused) == 2


class Branch(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > -1e9, lambda t: Layer.forward(self, t), lambda t: t * 2, (x,))


class Loop(Layer):
    """Differentiated, but for its first rounds."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            start = torch.tensor(0), x.detach()
            _, z = torch._higher_order_ops.while_loop(self.goes_on, self.round, start)
        return super().forward(x) + z

    def goes_on(self, i: Tensor, z: Tensor) -> Tensor:
        return i < 2

    def round(self, i: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, super().forward(z)


@pytest.mark.full
@pairwise(dtype=[F32, BF16], body=[Branch, Loop], estimator=["mxnorm", "exact"])
def test_branches_and_loops_pass(body: type[Layer], dtype: torch.dtype, estimator: str) -> None:
    class Both(Stack):
        def __init__(self) -> None:
            super().__init__(lambda: Layer(dtype))
            self.second = body(dtype)

    report = verified(Both(), x_of(dtype), estimator=estimator)
    assert report.fused and report.skipped


def test_bf16_passes() -> None:
    assert len(verified(Stack(lambda: Layer(BF16)), x_of(BF16)).fused) == 2


@pytest.mark.full
@some(
    ["mxnorm-plain"],
    estimator=["mxnorm", "exact"],
    converted={"plain": False, "torchao": True},
)
def test_llamas_pass(converted: bool, estimator: str) -> None:
    model = build_llama(BF16, layers=1)
    if converted:
        convert_to_mxfp8_training(model)
    report = verified(model, token_ids(), estimator=estimator)
    assert len(report.fused) == 2


def test_inference_passes() -> None:
    with torch.no_grad():
        assert len(verified(Stack(), inputs(8)).fused) == 2


# estimator="exact"


def another_eps(patch: pytest.MonkeyPatch) -> None:
    right = fusion.fuse_casts

    def fuse(graph: Any, *args: Any) -> Any:
        rho = right(graph, *args)
        rho.args[0].update_arg(4, 0.5)
        return rho

    patch.setattr(fusion, "fuse_casts", fuse)


def gain_left_out(patch: pytest.MonkeyPatch) -> None:
    right = fusion.fuse_casts

    def fuse(graph: Any, *args: Any) -> Any:
        rho = right(graph, *args)
        rho.args[0].update_arg(1, None)
        return rho

    patch.setattr(fusion, "fuse_casts", fuse)


@each_value(train={"inference": False, "training": True}, broken=[another_eps, gain_left_out])
def test_exact_may_change_no_output(
    broken: Break, train: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = Stack(), x_of()
    with torch.set_grad_enabled(train):
        verified(model, x, estimator="exact")
        broken(monkeypatch)
        with pytest.raises(VerificationError):
            verified(model, x, estimator="exact")


def test_the_message_names_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    another_eps(monkeypatch)
    with (
        torch.no_grad(),
        pytest.raises(VerificationError, match=r"changes the output \w+: 512 of 512"),
    ):
        verified(Stack(), inputs(8), estimator="exact")
