"""A compile that fails raises, or warns where Dynamo then runs the code uncompiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from pairwise import pairwise
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed, SkipFrame, Unsupported
from torch._subclasses.fake_tensor import DataDependentOutputException
from usage import Block, block_reference, inputs

import mxnorm_pass
from mxnorm_pass import MXNormWarning
from mxnorm_pass.passes import joint, lower

both_inner = pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
both_modes = pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])


class BrokenPass(Exception):
    """What no one expects."""


def data_dependent() -> Exception:
    return DataDependentOutputException(torch.ops.aten._local_scalar_dense.default)


# By exception: what Dynamo does with it is up to its type, or to suppress_errors.
FAILURES: dict[str, tuple[Callable[[], Exception], bool]] = {
    "data dependent": (data_dependent, False),
    "skip": (lambda: SkipFrame("skipped"), False),
    "suppressed": (lambda: BrokenPass("the pass is broken"), True),
}


@pytest.fixture
def suppressing() -> Iterator[Callable[[bool], None]]:
    before = torch._dynamo.config.suppress_errors
    yield lambda on: setattr(torch._dynamo.config, "suppress_errors", on)
    torch._dynamo.config.suppress_errors = before


def failing(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Exception]) -> None:
    def fail(*args: Any) -> Any:
        raise make()

    monkeypatch.setattr(joint, "find_norms", fail)


def step(function: Callable[[Tensor], Tensor], block: Block, train: bool) -> tuple[Tensor, ...]:
    """Output and, in training, gradients."""
    x = inputs(8, 64).requires_grad_(train)
    with torch.set_grad_enabled(train):
        out = function(x)
    if not train:
        return (out,)
    return out.detach(), *torch.autograd.grad(out.sum(), (x, *block.parameters()))


@pairwise(
    kind=list(FAILURES),
    train={"inference": False, "training": True},
    inner=["aot_eager", "inductor"],
)
def test_what_dynamo_swallows_is_a_warning(
    kind: str,
    train: bool,
    inner: str,
    monkeypatch: pytest.MonkeyPatch,
    suppressing: Callable[[bool], None],
) -> None:
    make, suppressed = FAILURES[kind]
    suppressing(suppressed)
    failing(monkeypatch, make)
    block = Block()
    compiled = torch.compile(block, backend="mxnorm", options={"inner": inner})
    with pytest.warns(MXNormWarning, match="now runs as it is") as caught:
        got = step(compiled, block, train)
    (warning,) = (w for w in caught if isinstance(w.message, MXNormWarning))
    said, error = str(warning.message), make()
    assert f"{type(error).__name__}: {error}" in said
    assert "usage.py" in said and "Cause: " in said and "To do: " in said
    assert all(map(torch.equal, got, step(block, block, train)))


@pairwise(
    kind=["data dependent", "suppressed"],
    train={"inference": False, "training": True},
    inner=["aot_eager", "inductor"],
)
def test_fullgraph_raises(
    kind: str,
    train: bool,
    inner: str,
    monkeypatch: pytest.MonkeyPatch,
    suppressing: Callable[[bool], None],
) -> None:
    make, suppressed = FAILURES[kind]
    suppressing(suppressed)
    failing(monkeypatch, make)
    block = Block()
    compiled = torch.compile(block, backend="mxnorm", options={"inner": inner}, fullgraph=True)
    raised = (Unsupported, BackendCompilerFailed)
    with warnings.catch_warnings(), pytest.raises(raised, match="local_scalar_dense|is broken"):
        warnings.simplefilter("ignore", MXNormWarning)
        step(compiled, block, train)


@both_inner
@both_modes
def test_what_dynamo_raises_needs_no_warning(
    train: bool, inner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, lambda: BrokenPass("the pass is broken"))
    block = Block()
    compiled = torch.compile(block, backend="mxnorm", options={"inner": inner})
    with (
        warnings.catch_warnings(action="error"),
        pytest.raises(BackendCompilerFailed, match="BrokenPass: the pass is broken"),
    ):
        step(compiled, block, train)


def test_wrong_options_under_suppress_errors(suppressing: Callable[[bool], None]) -> None:
    suppressing(True)
    compiled = torch.compile(Block(), backend="mxnorm", options={"estimater": "exact"})
    with torch.no_grad(), pytest.warns(MXNormWarning, match="'estimater'"):
        compiled(inputs(8, 64))


@pytest.mark.full
def test_a_backward_that_does_not_compile_raises(
    monkeypatch: pytest.MonkeyPatch, suppressing: Callable[[bool], None]
) -> None:
    """Inductor compiles it in ``backward()``, where Dynamo has no part."""
    suppressing(True)
    original, graphs = lower.lower, []

    def fail_in_backward(graph: fx.Graph, decompositions: Any) -> Any:
        graphs.append(graph)
        if len(graphs) > 1:
            raise data_dependent()
        return original(graph, decompositions)

    monkeypatch.setattr(lower, "lower", fail_in_backward)
    out = torch.compile(Block(), backend="mxnorm")(inputs(8, 64).requires_grad_())
    with pytest.raises(Exception, match="local_scalar_dense"):
        out.sum().backward()


def test_explain_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, data_dependent)
    with pytest.warns(MXNormWarning, match="DataDependentOutputException"):
        report = mxnorm_pass.explain(Block(), inputs(8, 64))
    assert not report.graphs


# Modes that surround a compile and have no part in it


def custom_hooks() -> AbstractContextManager[Any]:
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True),
    "anomaly mode without a check": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "hooks of saved tensors": custom_hooks,
    "save on CPU": torch.autograd.graph.save_on_cpu,
    "one thread of autograd": lambda: torch.autograd.set_multithreading_enabled(False),
    "default device": lambda: torch.device("cpu"),
}


@pytest.mark.full
@pytest.mark.parametrize(
    "mode, inner", [*((mode, "aot_eager") for mode in MODES), ("anomaly mode", "inductor")]
)
def test_a_training_step_in_a_mode(mode: str, inner: str) -> None:
    block, reference = Block(), Block()
    compiled = torch.compile(block, backend="mxnorm", options={"inner": inner})
    with warnings.catch_warnings(), mxnorm_pass.record() as report:
        warnings.filterwarnings("ignore", "Anomaly Detection")
        warnings.simplefilter("error", MXNormWarning)
        with MODES[mode]():
            got = step(compiled, block, train=True)
    assert [len(graph.sites) for graph in report.graphs] == [len(report.fused)] == [1]
    want = step(lambda x: block_reference(reference, x), reference, train=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
