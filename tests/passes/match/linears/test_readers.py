"""What reads a norm: linears that fuse, readers that keep the exact norm, switches, rounding."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matching import (
    BF16,
    CONSUMERS,
    EPS,
    F32,
    GRADIENT_TOLERANCE,
    WIDTH,
    Model,
    assert_close,
    assert_fused,
    assert_gradients,
    assert_same_bits,
    assert_skipped,
    assert_untouched,
    cast_reference,
    converted_model,
    expected_warnings,
    gradients,
    in_both_modes,
    inputs,
    olmo,
    only_site,
    reference,
    rms_norm,
    run,
    uncompiled,
)
from reference import quantize_with_torchao
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass import SkipReason, functional

pytestmark = expected_warnings


class FlatModel(Model):
    """Both linears read one view of the norm's output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x).view(-1, WIDTH)
        return self.first(h), self.second(h)


class UntransposedModel(Model):
    """Weights are [D, N], multiplied from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.right = nn.Parameter(self.second.weight.detach().t().contiguous())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return self.first(y), y @ self.right + 0 * self.second.weight.sum()


@in_both_modes
def test_one_view_for_two_linears(train: bool) -> None:
    model, x = FlatModel(), inputs().requires_grad_(train)
    got, report = run(model, x, train=train)
    assert_fused(report)
    want = tuple(y.flatten(0, 1) for y in reference(model, x, model.norm.weight))
    assert_same_bits(got, want)
    if train:
        assert_gradients(model, x, got, want, GRADIENT_TOLERANCE[F32])


def test_weight_that_is_not_transposed() -> None:
    model, x = UntransposedModel(), inputs()
    got, report = run(model, x)
    site = only_site(report)
    assert site.status == "fused" and site.consumers[0] == "first" and len(site.consumers) == 2
    assert_same_bits(got, reference(model, x, model.norm.weight))


class HeadModel(Model):
    """A norm over each half of the channels; the linears read both halves side by side."""

    def __init__(self) -> None:
        super().__init__(gain_shape=(WIDTH // 2,))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x.unflatten(-1, (2, -1))).flatten(-2)
        return self.first(y), self.second(y)


class HalvesModel(Model):
    """The linears read each half of a norm's channels as a row of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH // 2, 64), nn.Linear(WIDTH // 2, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x).unflatten(-1, (2, -1))
        return self.first(y), self.second(y)


@in_both_modes
@pytest.mark.parametrize("kind", [HeadModel, HalvesModel])
def test_linear_of_another_width_than_the_norm(kind: type[Model], train: bool) -> None:
    """The gain has another width than the weight: it goes to the activation."""
    model, x = kind(), inputs().requires_grad_(train)
    got, report = run(model, x, train=train)
    site = only_site(report)
    assert (site.status, site.gain) == ("fused", "activation")
    width, gain = model.norm.weight.numel(), model.norm.weight
    rows = x.reshape(-1, width)
    shape = (2, 8, -1) if kind is HeadModel else (2, 8, 2, -1)
    values, scales, _ = functional.mxnorm_cast(rows, gain, eps=EPS)
    quantized = values.reshape(shape), scales.reshape(shape)
    y = functional.mxnorm(rows, gain, eps=EPS).reshape(shape)
    linears = (model.first, model.second)
    want = [functional.mx_linear(y, m.weight, m.bias, quantized=quantized) for m in linears]
    assert_same_bits(got, want)
    if train:
        assert_gradients(model, x, got, want, GRADIENT_TOLERANCE[F32])


class TwiceModel(Model):
    """One norm and one linear, each applied to two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(self.norm(x)), self.first(self.norm(x.flip(0) * 2))


def test_one_norm_applied_twice() -> None:
    model, x = TwiceModel(), inputs().requires_grad_()
    got, report = run(model, x, train=True)
    assert [(s.norm, s.status, s.consumers) for s in report.sites] == [
        ("norm", "fused", ("first",))
    ] * 2
    want = tuple(
        reference(model, t, model.norm.weight, fused=CONSUMERS)[0] for t in (x, x.flip(0) * 2)
    )
    assert_same_bits(got, want)
    names, leaves = zip(
        *[(n, p) for n, p in model.named_parameters() if "second" not in n], strict=True
    )
    close = gradients(got, (x, *leaves)), gradients(want, (x, *leaves))
    assert_close(*close, ("x", *names), GRADIENT_TOLERANCE[F32])


class ProductModel(Model):
    """The norm's output, multiplied with a 2-D tensor in one of several ways."""

    def __init__(self, product: Callable[[ProductModel, Tensor, Tensor], Tensor]) -> None:
        super().__init__(olmo)
        self.product = product

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor]:
        return (self.product(self, self.norm(x), z),)


LINEAR_PRODUCTS = {
    "y @ parameter": lambda model, y, z: y @ model.second.weight.t(),
    "F.linear(y, parameter)": lambda model, y, z: F.linear(y, model.second.weight),
    "F.linear(y, input)": lambda model, y, z: F.linear(y, z),
}


@in_both_modes
@pytest.mark.parametrize("product", list(LINEAR_PRODUCTS.values()), ids=list(LINEAR_PRODUCTS))
def test_product_with_a_weight_is_a_linear(product: Any, train: bool) -> None:
    model, x = ProductModel(product), inputs().requires_grad_(train)
    z = model.second.weight.detach().clone().requires_grad_(train)
    got, report = run(model, x, z, train=train)
    site = only_site(report)
    assert (site.status, site.gain) == ("fused", "fold") and len(site.consumers) == 1, str(site)
    want = reference(model, x, model.norm.weight)[1:]
    assert_same_bits(got, want)
    if train:
        assert_close(gradients(got, [x]), gradients(want, [x]), ["x"], GRADIENT_TOLERANCE[F32])


@in_both_modes
@pytest.mark.parametrize("rows", [(2, 8), (16,)], ids=str)
def test_product_with_an_input_is_no_linear(rows: tuple[int, ...], train: bool) -> None:
    """Attention scores look like this: two activations, neither of them a weight."""
    model = ProductModel(lambda model, y, z: y @ z.t())
    x, z = inputs(*rows, WIDTH).requires_grad_(train), inputs(32, WIDTH, scale=1.0, seed=4)
    z.requires_grad_(train)
    got, report = run(model, x, z, train=train)
    assert_skipped(report, SkipReason.NO_MX_CAST)
    assert_untouched(report)
    want = model(x, z)
    assert_same_bits(got, want)
    if train:
        leaves = [x, z, model.norm.weight]
        names = ["x", "z", "gain"]
        close = gradients(got, leaves), gradients(want, leaves)
        assert_close(*close, names, GRADIENT_TOLERANCE[F32])


def test_product_with_an_input_beside_a_linear() -> None:
    """The linear fuses, the product reads the exact norm."""
    model = ProductModel(lambda model, y, z: torch.cat([y @ z.t(), model.second(y)], -1))
    x, z = inputs(), inputs(24, WIDTH, scale=1.0, seed=4)
    got, report = run(model, x, z)
    assert_fused(report, consumers=["second"])
    product, linear = got[0].split([24, 32], -1)
    with torch.no_grad():
        assert_same_bits([product], [model.norm(x) @ z.t()])
        assert_same_bits([linear], reference(model, x, model.norm.weight)[1:])


# Readers that keep the exact norm


@in_both_modes
def test_one_consumer_off(train: bool) -> None:
    """It reads the exact norm, and its cotangent takes the exact norm's way back."""
    model, x = Model(olmo), inputs().requires_grad_(train)
    got, report = run(model, x, train=train, modules={"second": False})
    assert_fused(report, consumers=["first"])
    want = reference(model, x, model.norm.weight, fused=["first"])
    assert torch.equal(got[0], want[0])
    # Not bits: the exact norm is the graph's own here, spelled differently from `functional`.
    assert_close(got, want, CONSUMERS, GRADIENT_TOLERANCE[F32])
    if train:
        assert_gradients(model, x, got, want, GRADIENT_TOLERANCE[F32])


class AlsoReadModel(Model):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        return self.first(y), self.second(y), torch.sigmoid(y)


def test_another_reader_of_the_norm() -> None:
    """It keeps the exact norm, forward and backward."""
    model, x = AlsoReadModel(olmo), inputs().requires_grad_()
    got, report = run(model, x, train=True)
    assert_fused(report)
    exact = functional.mxnorm(x, model.norm.weight, eps=EPS, estimator="exact")
    want = (*reference(model, x, model.norm.weight), torch.sigmoid(exact))
    assert_same_bits(got[:2], want[:2])
    assert_gradients(model, x, got, want, GRADIENT_TOLERANCE[F32])


class Router(Model):
    """Two linears, and one whose output picks experts."""

    def __init__(self) -> None:
        super().__init__(olmo)
        self.gate = nn.Linear(WIDTH, 32, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        logits = self.gate(y.view(-1, WIDTH))
        picked = torch.softmax(logits, -1).topk(2).indices
        return self.first(y), self.second(y), logits, picked


@in_both_modes
@pytest.mark.parametrize("modules", [{}, {"*": True}], ids=str)
def test_router_keeps_the_exact_norm(train: bool, modules: dict[str, bool]) -> None:
    model, x = Router(), inputs()
    got, report = run(model, x, train=train, modules=modules)
    assert_fused(report)
    assert torch.equal(got[2], uncompiled(model, x)[2])


def test_router_that_is_named() -> None:
    _, report = run(Router(), inputs(), modules={"gate": True})
    assert only_site(report).consumers == ("gate", *CONSUMERS)


class Gate(Router):
    """The same linear, whose output only scales."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.norm(x)
        return self.first(y), self.second(y), torch.softmax(self.gate(y), -1)


def test_gate_is_no_router() -> None:
    _, report = run(Gate(), inputs())
    assert only_site(report).consumers == (*CONSUMERS, "gate")


@pytest.mark.parametrize(("rows", "fused"), [(8, False), (48, False), (64, True)])
def test_linears_in_whole_blocks_are_cast(rows: int, fused: bool) -> None:
    """Torch's MX matmul wants the weight's rows in blocks of 32 too; an adapter has fewer."""
    model, x = Model(olmo), inputs()
    model.second = nn.Linear(WIDTH, rows)
    got, report = run(model, x)
    assert_fused(report, consumers=CONSUMERS if fused else ["first"])
    if not fused:
        assert torch.equal(got[1], uncompiled(model, x)[1])


# Readers that are no linears


class Unread(Model):
    """Nobody multiplies what the norm returns."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(x), self.first(x)


class ThroughAbs(Model):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x).abs()
        return self.first(y), self.second(y)


class ComputedWeight(Model):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return F.linear(y, self.first.weight * 2), F.linear(y, self.second.weight.sin())


class Transposed(Model):
    """The linear mixes tokens, not channels."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x).transpose(1, 2)
        return F.linear(y, self.first.weight), F.linear(y, self.second.weight)


@pytest.mark.parametrize("kind", [Unread, ThroughAbs, ComputedWeight, Transposed])
def test_no_linear_reads_the_norm(kind: type[Model]) -> None:
    model, x = kind(), inputs(2, WIDTH, WIDTH)
    got, report = run(model, x)
    assert_skipped(report, SkipReason.NO_MX_CAST)
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


def test_plain_linears_without_inserted_casts() -> None:
    model, x = Model(), inputs()
    got, report = run(model, x, quantize="existing")
    assert_skipped(report, SkipReason.NO_MX_CAST)
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


# Switches


def test_norm_off() -> None:
    """Its linears are still fed by a norm, so they are still cast."""
    model, x = Model(), inputs()
    got, report = run(model, x, modules={"norm": False})
    assert_skipped(report, SkipReason.DISABLED)
    assert_same_bits(got, cast_reference(model, x))
    assert not torch.equal(got[0], uncompiled(model, x)[0])


def test_everything_off() -> None:
    model, x = Model(), inputs()
    got, report = run(model, x, modules={"*": False})
    assert_skipped(report, SkipReason.DISABLED)
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


def test_all_plain_consumers_off() -> None:
    """The user chose it, so no warning calls it a surprise."""
    model, x = Model(), inputs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got, report = run(model, x, modules={"first": False, "second": False})
    assert not [w for w in caught if issubclass(w.category, mxnorm_pass.MXNormWarning)]
    assert_skipped(report, SkipReason.DISABLED)
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


def test_fold_without_the_weights_casts() -> None:
    model, x = converted_model(), inputs(dtype=BF16)
    got, report = run(model, x, gain="fold")
    site = assert_skipped(report, SkipReason.NO_WEIGHT_CAST)
    assert "first" in site.detail and "second" in site.detail
    # Their linears run on values and scales all the same.
    (graph,) = report.graphs
    assert "norm_cast" not in graph.after and graph.ops_after["mxnorm_pass.mx_linear.default"] == 2
    assert_same_bits(got, uncompiled(model, x))

    got, report = run(model, x)
    assert_fused(report, gain="activation")
    values = functional.mxnorm_cast(x, model.norm.weight, eps=EPS)[:2]
    activation = functional.mx_dequantize(*values, BF16)
    want = [F.linear(activation, m.weight.dequantize()) for m in (model.first, model.second)]
    assert_same_bits(got, want)


def test_all_consumers_with_casts_of_their_own_off() -> None:
    model, x = converted_model(), inputs(dtype=BF16)
    got, report = run(model, x, modules={"first": False, "second": False})
    site = assert_skipped(report, SkipReason.DISABLED)
    assert site.consumers == CONSUMERS
    assert_untouched(report)
    assert_same_bits(got, uncompiled(model, x))


class Apart(Model):
    """The norm reads rows whose elements lie apart in memory, and returns rows that do not."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x.mT.contiguous().mT)


@pytest.mark.parametrize("estimator", ["mxnorm", "exact"])
def test_rows_that_lie_apart_in_memory(estimator: str) -> None:
    """What the op returns is contiguous then too, as the views after it expect."""
    model, x = Apart(rms_norm, dtype=BF16), inputs(16, WIDTH, dtype=BF16)
    model.first.bias = None
    quantize_with_torchao(model)
    got, report = run(model, x, estimator=estimator)
    assert only_site(report).status == "fused"
    want = uncompiled(model, x)
    if estimator == "mxnorm":
        values = functional.mxnorm_cast(x, model.norm.weight, eps=EPS)[:2]
        activation = functional.mx_dequantize(*values, BF16)
        want = [F.linear(activation, m.weight.dequantize()) for m in (model.first, model.second)]
    assert_same_bits(got, want)
