"""Record the graphs that the installed torch and torchao trace.

``python tests/lib/golden/record.py`` adds what is new to ``graphs`` and notes in ``index.json``
which versions trace which file.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from golden.index import Index, Recording, installed  # noqa: E402
from golden.sm100 import has_triton, import_torchao, sm100  # noqa: E402
from golden.text import to_text  # noqa: E402
from torch import fx  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402

from mxnorm_pass.compilation.decompositions import norm_decompositions

DECOMPOSITIONS = {"aten": norm_decompositions, "inductor": select_decomp_table}


class Traced(BaseException):
    """Ends a compile once its graph is there."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.module = module


def trace(case: Any, decompositions: dict[Any, Any]) -> fx.GraphModule:
    """The graph at the point where ``MXNormPass`` sees it."""

    def captured(module: fx.GraphModule, *_: Any, **__: Any) -> Any:
        raise Traced(module)

    torch._dynamo.reset()
    torch._higher_order_ops.triton_kernel_wrap.kernel_side_table.reset_table()
    model = case.model()
    x = torch.ones(case.shape, dtype=case.dtype, requires_grad=case.train)
    backend = aot_autograd(
        fw_compiler=captured,
        inference_compiler=captured,
        partition_fn=captured,
        decompositions=decompositions,
        keep_inference_input_mutations=True,
    )
    mode = sm100() if case.sm100 else nullcontext()
    try:
        with mode, torch.set_grad_enabled(case.train):
            if case.export:
                table = {**_composite_decompositions(), **decompositions}
                exported = torch.export.export(model, (x,)).run_decompositions(table)
                return _without_assertions(exported.graph_module)
            torch.compile(model, backend=backend, fullgraph=True)(x)
    except Traced as traced:
        return traced.module
    raise AssertionError("nothing was compiled")


def _composite_decompositions() -> dict[Any, Any]:
    """Ops that ``torch.compile`` never shows and ``torch.export`` keeps, as where.ScalarSelf."""
    table = torch.export.default_decompositions()
    composite = "CompositeImplicitAutograd"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {op: f for op, f in table.items() if has_kernel(op.name(), composite)}


def _without_assertions(module: fx.GraphModule) -> fx.GraphModule:
    """Only exported graphs have them, and they go before the pass."""
    target = torch.ops.aten._assert_tensor_metadata.default
    for node in module.graph.find_nodes(op="call_function", target=target):
        module.graph.erase_node(node)
    return module


def record(names: list[str]) -> Iterator[Recording]:
    import_torchao()
    from golden.cases import CASES, Unavailable

    for case in CASES.values():
        if names and case.name not in names:
            continue
        for kind, table in DECOMPOSITIONS.items():
            try:
                if case.needs_triton and not has_triton():
                    raise Unavailable("triton is not installed")
                module = trace(case, table())
            except Unavailable as reason:
                yield Recording(case.name, kind, None, str(reason))
            except torch._dynamo.exc.Unsupported as error:
                yield Recording(case.name, kind, None, f"Dynamo: {str(error).splitlines()[0]}")
            else:
                title = f"{case.name}, decompositions: {kind}."
                yield Recording(case.name, kind, to_text(module.graph, title, case.device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="write here, as JSON, and change nothing else")
    parser.add_argument("cases", nargs="*", help="names of cases; all without any")
    arguments = parser.parse_args()
    recordings = list(record(arguments.cases))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps([asdict(r) for r in recordings]))
        return
    index = Index.load()
    index.add(recordings, installed())
    index.remove_unused()
    index.save()
    print(f"{installed()}: {len(recordings)} recordings, {len(index.graphs)} spellings in all")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    main()
