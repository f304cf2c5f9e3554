"""The program around the rewritten graph: what stays as it was, and what can follow."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import (
    EMBEDDING,
    InRegions,
    apply,
    both_modes,
    calls,
    export,
    export_llama,
    logits,
    own_ops,
    save,
    saved_and_loaded,
)
from matching import (
    BF16,
    WIDTH,
    Model,
    assert_same_bits,
    expected_warnings,
    huggingface,
    inputs,
    layer_norm,
    only_site,
    reference,
)
from pairwise import each_value
from reference import Recipe, build_llama, reference_of
from torch import Tensor, nn
from torch.export import ExportedProgram

import mxnorm_pass
from mxnorm_pass import ops

pytestmark = [
    expected_warnings,
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
]


def snapshot(program: ExportedProgram) -> tuple[Any, ...]:
    return (
        str(program),
        str(program.graph_signature),
        {name: (id(t), t.requires_grad) for name, t in program.state_dict.items()},
        [sorted(node.meta) for node in program.graph.nodes],
    )


@pytest.mark.parametrize("model", [Model(None), InRegions()], ids=["norm", "regions"])
def test_the_given_program_is_not_changed(model: nn.Module) -> None:
    x = inputs()
    given = export(model, x)
    before, outputs = snapshot(given), given.module()(x)
    program, report = apply(given)
    assert only_site(report).status == "fused"
    assert snapshot(given) == before
    assert_same_bits(given.module()(x), outputs)
    for name, weight in given.state_dict.items():
        assert program.state_dict[name].data_ptr() == weight.data_ptr()


OFF: dict[str, tuple[nn.Module, Mapping[str, Any]]] = {
    "modules": (Model(None), {"modules": {"*": False}}),
    "no casts": (Model(None), {"quantize": "existing"}),
    "layer norm": (Model(layer_norm), {}),
    "width": (Model(huggingface, width=80), {}),
    "regions": (InRegions(), {"modules": {"*": False}}),
}


@each_value(name=list(OFF), decompose=[False, True])
def test_nothing_to_rewrite_gives_a_copy(name: str, decompose: bool) -> None:
    model, config = OFF[name]
    width = 80 if name == "width" else WIDTH
    x = inputs(2, 8, width)
    given = export(model, x)
    program = mxnorm_pass.apply(given, config, decompose=decompose)
    assert program is not given and program.graph is not given.graph
    assert str(program) == str(given)
    assert_same_bits(program.module()(x), given.module()(x))
    program.graph.erase_node(program.graph.output_node())
    assert_same_bits(given.module()(x), model(x))


class Aliases(nn.Module):
    """Outputs that alias inputs, buffers and one another; a buffer that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Model(huggingface)
        self.register_buffer("count", torch.zeros(()))
        self.shift = torch.full((WIDTH,), 0.5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.count.add_(1)
        first, second = self.inner(x + self.shift)
        norm = self.inner.norm(x)
        return {
            "first": first,
            "row": first[0],
            "norm": [norm, norm],
            "x": x.view(-1),
            "n": 3,
            "o": None,
        }


@both_modes
def test_aliases_and_mutations(strict: bool) -> None:
    model = Aliases()
    x = inputs()
    program, report = apply(export(model, x, strict=strict))
    assert len(report.fused) == 1
    signature = program.graph_signature
    assert list(signature.buffers_to_mutate.values()) == ["count"]
    names = [getattr(n, "name", None) for n in program.graph.output_node().args[0]]
    assert names == [getattr(s.arg, "name", None) or None for s in signature.output_specs]
    rewritten = saved_and_loaded(program).module()
    for count in (1, 2):
        got = rewritten(x)
        assert float(rewritten.count) == count
    gain = model.inner.norm.weight
    want = reference(model.inner, x + 0.5, gain)
    exact = model.inner.norm(x)
    assert_same_bits([got["first"], got["row"]], [want[0].detach(), want[0][0].detach()])
    assert_same_bits(got["norm"], [exact.detach()] * 2)
    assert torch.equal(got["x"], x.view(-1)) and got["n"] == 3


@pytest.mark.parametrize("kept", [(), ("0",), ("0", "0.norm")], ids=str)
def test_unflatten(kept: tuple[str, ...]) -> None:
    """A fused norm has no call of its own left that could be preserved."""
    model = nn.Sequential(Model(huggingface))
    given = export(model, inputs(), preserve_module_call_signature=kept)
    program, _ = apply(given)
    tree = torch.export.unflatten(program)
    assert dict(tree.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert_same_bits(tree(inputs()), program.module()(inputs()))


def test_tied_weights_stay_tied() -> None:
    model = build_llama(layers=1, tie_word_embeddings=True)
    program, _ = apply(export_llama(model))
    head, embedding = (program.state_dict[n] for n in ("lm_head.weight", EMBEDDING))
    assert head is embedding
    assert torch.equal(logits(program.module()), logits(reference_of(model, Recipe())))


@pytest.mark.full
@pytest.mark.parametrize(
    "surroundings",
    [lambda: torch.autocast("cpu", dtype=BF16), torch.no_grad, torch.inference_mode],
    ids=["autocast", "no_grad", "inference_mode"],
)
def test_the_surroundings_of_apply_do_not_matter(surroundings: Callable[[], Any]) -> None:
    given = export(InRegions(), inputs())
    want = mxnorm_pass.apply(given)
    with surroundings():
        program = mxnorm_pass.apply(given)
    assert str(program) == str(want)
    assert_same_bits(program.module()(inputs()), want.module()(inputs()))


def test_parameters_take_no_gradient() -> None:
    """The ops have none; a gradient that is silently missing must not look like one."""
    given = export(Model(huggingface), inputs())
    program, _ = apply(given)
    assert all(p.requires_grad for p in given.parameters())
    outputs = program.module()(inputs())
    assert not any(y.requires_grad for y in outputs)


@pytest.mark.full
@pytest.mark.parametrize("decompose", [False, True])
def test_what_follows(decompose: bool) -> None:
    """Compile, decompose, save and load: all with the same bits."""
    model = Model(None, dtype=BF16)
    x = inputs(dtype=BF16)
    program = mxnorm_pass.apply(export(model, x), decompose=decompose)
    assert bool(own_ops(program)) is not decompose
    assert {t.namespace for t in calls(program) if hasattr(t, "namespace")} <= {
        "aten",
        ops.NAMESPACE,
    }
    want = reference(model, x, model.norm.weight)
    core = program.run_decompositions()
    for runnable in (program, core, saved_and_loaded(program), saved_and_loaded(core)):
        assert_same_bits(runnable.module()(x), want)
        assert bool(own_ops(runnable)) is not decompose
    assert_same_bits(torch.compile(program.module(), backend="aot_eager")(x), want)


@pytest.mark.full
def test_decompose_an_earlier_result() -> None:
    model = Model(huggingface)
    x = inputs()
    fused = mxnorm_pass.apply(export(model, x))
    again = mxnorm_pass.apply(fused)
    assert str(again) == str(fused)
    decomposed = mxnorm_pass.apply(fused, decompose=True)
    assert not own_ops(decomposed)
    assert_same_bits(decomposed.module()(x), fused.module()(x))


LOAD = """
import sys, torch
x = torch.load(sys.argv[3])
bare = torch.export.load(sys.argv[2]).module()(x)
try:
    torch.export.load(sys.argv[1])
except RuntimeError:
    print("refused without", "mxnorm_pass" not in sys.modules)
import mxnorm_pass.ops
whole = torch.export.load(sys.argv[1]).module()(x)
print(all(map(torch.equal, bare, whole)))
"""


@pytest.mark.full
def test_load_in_another_process(tmp_path: Path) -> None:
    """With the ops only after their import; decomposed without this package."""
    given = export(Model(huggingface), inputs())
    paths = [str(tmp_path / name) for name in ("ops.pt2", "aten.pt2", "x.pt")]
    save(mxnorm_pass.apply(given), paths[0])
    save(mxnorm_pass.apply(given, decompose=True), paths[1])
    torch.save(inputs(), paths[2])
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["refused without True", "True"]


@pytest.mark.full
def test_aot_inductor(tmp_path: Path) -> None:
    """Error against float64 at most 1.5 times that of the program that was packaged."""
    model = Model(huggingface, dtype=BF16)
    x = inputs(dtype=BF16)
    program = mxnorm_pass.apply(export(model, x), decompose=True)
    # It leaves metadata in the config, which is in the cache keys of all later compiles.
    with torch._inductor.config.patch({"aot_inductor.metadata": {}}):
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"aot_inductor.precompile_headers": False},
        )
    got = torch._inductor.aoti_load_package(package)(x)
    double = copy.deepcopy(model).double()
    truth = reference(double, x.double(), double.norm.weight)
    for a, b, t in zip(got, program.module()(x), truth, strict=True):
        assert (a - t).norm() <= 1.5 * (b - t).norm()
