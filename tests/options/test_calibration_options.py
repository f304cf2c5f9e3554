"""Which norms a calibration speaks of, what overrules it, and when it is refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import export
from torch import Tensor, nn
from usage import Block, inputs

import mxnorm_pass
from mxnorm_pass import Calibration, CalibrationWarning, MXNormWarning, Report
from mxnorm_pass.options.channel_order import channel_statistics
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.options.parse import parse_options

WEIGHTS = torch.tensor([0.1, 0.07])


class Blocks(nn.Module):
    """Two norms and their linears, each pair a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [block(x) for block in self.blocks]


FIRST, SECOND = "blocks.0.norm", "blocks.1.norm"
NORMS: dict[str, list[str]] = {FIRST: [], SECOND: []}


def calibration(*norms: str, **values: Any) -> Calibration:
    return Calibration(**{"weights": {n: WEIGHTS for n in norms or (FIRST, SECOND)}, **values})


@contextmanager
def caught() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as all_warnings:
        warnings.simplefilter("always", MXNormWarning)
        yield all_warnings


def explain(made: Any, model: nn.Module | None = None, **options: Any) -> Report:
    torch._dynamo.reset()
    with torch.no_grad():
        x = inputs(4, 64)
        given = {"calibration": made, "inner": "aot_eager", **options}
        return mxnorm_pass.explain(model or Blocks(), x, options=given)


def run(made: Any, model: nn.Module | None = None, **options: Any) -> list[str]:
    """Messages of the warnings."""
    torch._dynamo.reset()
    options = {"calibration": made, "inner": "aot_eager", **options}
    with caught() as found, torch.no_grad():
        torch.compile(model or Blocks(), backend="mxnorm", options=options)(inputs(4, 64))
    return [str(w.message) for w in found if issubclass(w.category, MXNormWarning)]


def said(report: Report) -> list[tuple[str | None, str | None]]:
    return [(site.estimator, site.calibration) for site in report.sites]


ESTIMATED, EXACT = ("mxnorm", "block weights"), ("exact", "exact")
MODULES: dict[str, tuple[dict[str, Any], Calibration, list[Any]]] = {
    "none": ({}, calibration(), [ESTIMATED, ESTIMATED]),
    "exact": ({}, calibration(exact=(SECOND,)), [ESTIMATED, EXACT]),
    "exact without weights": ({}, calibration(FIRST, exact=(SECOND,)), [ESTIMATED, EXACT]),
    "unknown": ({}, calibration(FIRST), [ESTIMATED, ("exact", "unknown")]),
    "True decides nothing": ({SECOND: True}, calibration(exact=(SECOND,)), [ESTIMATED, EXACT]),
    "a rule without estimator": (
        {SECOND: {"gain": "activation"}}, calibration(exact=(SECOND,)), [ESTIMATED, EXACT]
    ),
    "a rule says exact": (
        {SECOND: {"estimator": "exact"}}, calibration(), [ESTIMATED, ("exact", None)]
    ),
    "a rule asks for the weights": (
        {SECOND: {"estimator": "mxnorm"}}, calibration(exact=(SECOND,)), [ESTIMATED, ESTIMATED]
    ),
    "a rule asks for what is not there": (
        {SECOND: {"estimator": "mxnorm"}}, calibration(FIRST), [ESTIMATED, ("mxnorm", None)]
    ),
    "a rule for an unknown norm": (
        {SECOND: {"estimator": "exact"}}, calibration(FIRST), [ESTIMATED, ("exact", None)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_what_applies_to_a_norm(name: str) -> None:
    modules, made, want = MODULES[name]
    report = explain(made, modules=modules)
    assert said(report) == want
    assert Report.from_json(report.to_json()) == report


def test_the_report_says_how() -> None:
    how = [site.how for site in explain(calibration(FIRST)).sites]
    assert how[0].startswith("mxnorm, block weights, fold")
    assert how[1].startswith("exact, not in the calibration, activation")
    assert "exact, by calibration" in str(explain(calibration(exact=(SECOND,))))


def test_warnings() -> None:
    assert run(calibration()) == []
    assert run(calibration(exact=(SECOND,))) == []
    (message,) = run(calibration(FIRST))
    assert f"does not know {SECOND}; they keep the exact RMS" in message
    (message,) = run(calibration(FIRST), modules={SECOND: {"estimator": "mxnorm"}})
    assert message.startswith("mxnorm: 1 norms estimate their RMS without calibration")
    assert run(calibration(FIRST), modules={SECOND: {"estimator": "exact"}}) == []


def test_uncalibrated_inference_still_warns() -> None:
    with caught() as found, torch.no_grad():
        torch.compile(Block(), backend="mxnorm", options={"inner": "aot_eager"})(inputs(4, 64))
    assert [w.category for w in found if "calibrate" in str(w.message)] == [CalibrationWarning]


# Calibrations of other models


@pytest.mark.parametrize("use", [explain, run])
def test_other_names(use: Any) -> None:
    with pytest.raises(ValueError, match=rf"knows no norm.*it has other; the graph has {FIRST}"):
        use(calibration("other"))
    made = calibration("other")
    both = {n: {"estimator": "exact"} for n in (FIRST, SECOND)}
    assert said(explain(made, modules=both)) == [("exact", None)] * 2


def test_a_prefix_helps() -> None:
    made = calibration()
    with pytest.raises(ValueError, match="calibration.under"):
        run(made, nn.Sequential(Blocks()))
    assert said(explain(made.under("0"), nn.Sequential(Blocks()))) == [ESTIMATED, ESTIMATED]
    inner = calibration("1.blocks.0.norm", "1.blocks.1.norm")
    assert said(explain(inner, prefix="1")) == [ESTIMATED, ESTIMATED]


def test_another_width() -> None:
    made = Calibration({FIRST: torch.ones(3), SECOND: WEIGHTS})
    with pytest.raises(ValueError, match=rf"'{FIRST}' has width 96.*this graph it has width 64"):
        run(made)
    with pytest.raises(ValueError, match="width 64 in blocks of 16.*blocks of 32"):
        run(Calibration({FIRST: torch.ones(4)}, block_size=16))
    with pytest.raises(ValueError, match="width 96"):
        mxnorm_pass.apply(export(Blocks(), inputs(4, 64)), {"calibration": made})


# The channel order


def permuted(model: Blocks, order: Tensor) -> Blocks:
    with torch.no_grad():
        for block in model.blocks:
            block.norm.weight.copy_(block.norm.weight[order])
            block.linear.weight.copy_(block.linear.weight[:, order])
    return model


def ordered(model: Blocks) -> Calibration:
    order = torch.arange(63, -1, -1)
    return calibration(order=order, channels=channel_statistics(permuted(model, order), NORMS))


def test_an_order_that_was_not_applied() -> None:
    made = ordered(Blocks())
    flipped = permuted(Blocks(), torch.arange(63, -1, -1))
    assert run(made, flipped) == []
    assert said(explain(made, flipped)) == [ESTIMATED, ESTIMATED]
    for use in (run, explain):
        with pytest.raises(ValueError, match=r"permute_channels\(model, calibration.order\)"):
            use(made, Blocks())
    with pytest.raises(ValueError, match="permute_channels"):
        mxnorm_pass.apply(export(Blocks(), inputs(4, 64)), {"calibration": made})
    program = mxnorm_pass.apply(export(flipped, inputs(4, 64)), {"calibration": made})
    assert program is not None


def test_an_order_in_layers_that_are_compiled_on_their_own() -> None:
    made, model = ordered(Blocks()), Blocks()
    options = {"calibration": made, "inner": "aot_eager"}
    names = mxnorm_pass.compile_layers(model, "blocks.?", options=options)
    assert names == ("blocks.0", "blocks.1")
    with pytest.raises(ValueError, match="permute_channels"), torch.no_grad():
        model(inputs(4, 64))


def test_an_order_that_cannot_be_told() -> None:
    made = calibration(order=torch.arange(63, -1, -1))
    (message,) = run(made)
    assert "do not tell which order" in message and "permute_channels" in message
    assert run(calibration(order=torch.arange(64))) == []


# Options


def refused(**options: Any) -> str:
    with pytest.raises(ValueError) as error:
        parse_options(options)
    return str(error.value)


def test_p() -> None:
    made = calibration(p=1.5)
    assert parse_options({"calibration": made}).config.p == 1.5
    assert parse_options({"calibration": made, "p": 1.5}).config.p == 1.5
    assert parse_options({"calibration": calibration(), "p": 2}).config.p == 2
    assert "p=2.0 is not valid: expected 1.5, for which" in refused(calibration=made, p=2)
    assert "p=2.0" in refused(calibration=made, p=2.0)
    rules = {"*": {"p": 1}}
    assert "modules['*']['p']=1.0" in refused(calibration=made, modules=rules)
    assert parse_options({"calibration": made, "modules": {"*": {"p": 1.5}}}).config.p == 1.5


def test_estimator() -> None:
    assert "exclude each other" in refused(calibration=calibration(), estimator="exact")
    parse_options({"calibration": calibration(), "estimator": "mxnorm"})


def test_a_path(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    message = refused(calibration=str(path))
    assert f"calibration={str(path)!r} is not valid: expected the path of a calib" in message
    path.write_text("nothing")
    assert "is no calibration file" in refused(calibration=path)
    calibration().save(path)
    for spelled in (path, str(path)):
        config = parse_options({"calibration": spelled}).config
        assert config == MXNormConfig(calibration=calibration())
    with pytest.raises(ValueError, match="expected the path of a calibration"):
        run(tmp_path / "nowhere")


@pytest.mark.parametrize("bad", [{}, False, 3])
def test_other_values(bad: Any) -> None:
    assert f"calibration={bad!r} is not valid" in refused(calibration=bad)


def test_configs_differ_by_their_calibration() -> None:
    base, same = (MXNormConfig(calibration=calibration()) for _ in range(2))
    other = MXNormConfig(calibration=calibration(exact=(SECOND,)))
    assert base == same and base != other != MXNormConfig()
    assert len({base.fingerprint(), same.fingerprint(), other.fingerprint()}) == 2


def test_layers_share_a_fingerprint_where_their_weights_are_equal() -> None:
    def of(i: int, **weights: Tensor) -> str:
        norms = {f"{name}.norm": w for name, w in weights.items()}
        config = MXNormConfig(calibration=Calibration(norms), prefix=f"a{i}")
        return config.fingerprint_for([f"a{i}", f"a{i}.norm"])

    assert of(0, a0=WEIGHTS, a1=WEIGHTS) == of(1, a0=WEIGHTS, a1=WEIGHTS)
    assert of(0, a0=WEIGHTS, a1=2 * WEIGHTS) != of(1, a0=WEIGHTS, a1=2 * WEIGHTS)
