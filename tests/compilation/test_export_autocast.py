"""Programs that were exported under an autocast, which they do not hold."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from exporting import InRegions, apply, export
from matching import BF16, F32, assert_same_bits, expected_warnings, inputs
from pairwise import each_value
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass.compilation.exported_autocast import exported_autocast

pytestmark = expected_warnings


def autocast(enabled: bool = True) -> AbstractContextManager[None]:
    return torch.autocast("cpu", BF16, enabled=enabled)


class Block(nn.Module):
    """norm -> one or two linears -> maybe back to the input's dtype."""

    def __init__(self, linears: int, back: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(64, eps=1e-6)
        self.linears = nn.Sequential(*(nn.Linear(64, 64) for _ in range(linears)))
        self.back = back

    def forward(self, x: Tensor) -> Tensor:
        y = self.linears(self.norm(x))
        return y.to(x.dtype) if self.back else y


class WithoutGrad(nn.Module):
    """All in a region that is no autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(1, True)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.block(x)


MODELS = {
    "one linear": lambda: Block(1, True),
    "two linears": lambda: Block(2, True),
    "bf16 output": lambda: Block(2, False),
    "no_grad region": WithoutGrad,
}


@pytest.mark.full
@each_value(name=list(MODELS), inside={"applied outside": False, "applied inside": True})
def test_results_are_those_under_the_autocast(name: str, inside: bool) -> None:
    model, x = MODELS[name](), inputs(4, 64)
    with torch.no_grad(), autocast():
        program = export(model, x)
        want = model(x)
        compiled = torch.compile(model, backend="mxnorm", options={"inner": "aot_eager"})
        with mxnorm_pass.record() as report:
            estimated = compiled(x)
    assert len(report.fused) == 1
    with autocast(enabled=inside):
        kept, _ = apply(program, quantize="existing")
        rewritten, report = apply(program)
    assert len(report.fused) == 1
    with torch.no_grad():
        assert_same_bits([rewritten.module()(x)], [estimated])
        with autocast():
            assert_same_bits([kept.module()(x), rewritten.module()(x)], [want, estimated])


def test_dtype_of_the_autocast_is_read_off_the_program() -> None:
    x = inputs(4, 64)
    assert exported_autocast(export(Block(2, True), x).graph_module) == {}
    assert exported_autocast(export(InRegions(), inputs()).graph_module) == {}
    for dtype in (BF16, torch.float16):
        with torch.autocast("cpu", dtype):
            found = exported_autocast(export(Block(2, True), x).graph_module)
        assert found == {"cpu": dtype}


def test_an_autocast_region_inside_of_another() -> None:
    """The inner one turns it off."""

    class Off(Block):
        def forward(self, x: Tensor) -> Tensor:
            with autocast(enabled=False):
                return super().forward(x)

    model, x = Off(1, True), inputs(4, 64)
    with torch.no_grad(), autocast():
        program, report = apply(export(model, x), quantize="existing")
        assert program.module()(x).dtype == F32
        assert_same_bits([program.module()(x)], [model(x)])
    assert len(report.sites) == 1
