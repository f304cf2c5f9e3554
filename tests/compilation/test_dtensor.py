"""DTensors: the pass sees the local tensors of one rank and must not touch them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import mxnorm_pass
from mxnorm_pass import Report, SkipReason

WIDTH = 128
pytestmark = pytest.mark.filterwarnings("ignore::mxnorm_pass.MXNormWarning")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.first = nn.Linear(WIDTH, 64)
        self.second = nn.Linear(WIDTH, 32, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        return self.first(y), self.second(y)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """Two ranks, of which this process is the first; no collective moves data."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def distribute(model: Model, mesh: DeviceMesh, linear: Placement) -> Model:
    """All parameters as DTensors; the linears' are placed as asked, the norm's are replicated."""
    for name, parameter in list(model.named_parameters()):
        owner, _, child = name.rpartition(".")
        placement = Replicate() if owner == "norm" else linear
        value = distribute_tensor(parameter.detach(), mesh, [placement])
        setattr(model.get_submodule(owner), child, nn.Parameter(value))
    return model


def run(model: nn.Module, x: Tensor, train: bool) -> tuple[tuple[Tensor, ...], Report]:
    torch._dynamo.reset()
    with mxnorm_pass.record() as report, torch.set_grad_enabled(train):
        compiled = torch.compile(model, backend="mxnorm", options={"inner": "aot_eager"})
        return compiled(x), report


def local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(
    "linear, data",
    [(Replicate(), Replicate()), (Shard(0), Replicate()), (Replicate(), Shard(0))],
    ids=["replicated", "column parallel", "data parallel"],
)
def test_dtensor_parameters(
    mesh: DeviceMesh, linear: Placement, data: Placement, train: bool
) -> None:
    model = distribute(Model(), mesh, linear)
    x = torch.randn(4, 8, WIDTH, generator=torch.Generator().manual_seed(1))
    x = distribute_tensor(x, mesh, [data]).requires_grad_(train)
    got, report = run(model, x, train)

    (site,) = report.sites
    assert (site.norm, site.status, site.reason) == ("norm", "skipped", SkipReason.DTENSOR)
    assert site.detail == "DTensor"
    (graph,) = report.graphs
    assert graph.name == ("training_0" if train else "inference_0")
    assert graph.before == graph.after

    want = model(x)
    for a, b in zip(got, want, strict=True):
        assert a.placements == b.placements
        assert torch.equal(local(a), local(b))
    if train:
        # Gradients that no communication adds up: this process group moves nothing.
        sharded = isinstance(linear, Shard)
        leaves = [p for n, p in model.named_parameters() if not (sharded and "norm" in n)]
        leaves = leaves if sharded else [x, *leaves]
        for a, b in zip(_gradients(got, leaves), _gradients(want, leaves), strict=True):
            assert torch.equal(local(a), local(b))


def _gradients(outputs: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])


def test_the_same_model_fuses_without_dtensors() -> None:
    _, report = run(Model(), torch.randn(4, 8, WIDTH), train=False)
    (site,) = report.sites
    assert (site.status, site.consumers) == ("fused", ("first", "second"))


def test_an_exported_program_of_dtensors_is_refused(mesh: DeviceMesh) -> None:
    """torch cannot decompose it, and nothing in it may be rewritten."""
    x = distribute_tensor(torch.randn(4, 8, WIDTH), mesh, [Replicate()])
    program = torch.export.export(distribute(Model(), mesh, Replicate()), (x,))
    with pytest.raises(ValueError, match="this one holds DTensors: export the model of one rank"):
        mxnorm_pass.apply(program)
