"""The package's imports go one way: backend -> graph_pass -> insert, match, rewrite -> ops."""

from __future__ import annotations

import ast
from pathlib import Path

import mxnorm_pass

ROOT = Path(mxnorm_pass.__file__).parent
# From the top of the house to its floor; a module imports only from layers below its own.
LAYERS = [
    {"__init__", "__main__"},
    {"cli"},
    {"cli.explain", "cli.compare", "cli.calibrate"},
    {"cli.checkpoint"},
    {"cli.config_model", "cli.inputs", "cli.text", "cli.progress"},
    {"cli.arguments", "cli.errors"},
    {"comparing", "comparing.compare"},
    {"comparing.comparison", "comparing.watch"},
    {"calibrating.procedure"},
    {"calibrating.runner"},
    {"calibrating.fallback"},
    {"calibrating.emulation", "calibrating.moments"},
    {"calibrating.probe", "calibrating.sites"},
    {"calibrating", "calibrating.batches", "calibrating.fit", "calibrating.order"},
    {"layers", "tracing", "channels"},
    {"backend", "export", "fake_models"},
    {"announce"},
    {"graph_names"},
    {"recording", "inductor_e8m0", "freezing", "run_graph", "exported_autocast", "specialize"},
    {"plan", "regions"},
    {"graph_pass", "plan_json", "substitute"},
    {"match.derivatives", "match.substitution", "verify"},
    {"float64", "provenance"},
    {"insert", "rewrite", "scopes", "site_graphs"},
    {"traffic"},
    {"snapshot"},
    {"match"},
    {"match.site"},
    {"match.uncast"},
    {"match.router", "match.feeds"},
    {"match.residual", "match.dequantize"},
    {"match.transposed_cast"},
    {"match.linear"},
    {"match.cast", "match.norm"},
    {"match.cast_op", "match.cast_program", "match.scale_layout"},
    {"match.norm_tail", "match.program", "match.scaling", "match.start"},
    {"match.layer_norm", "match.radial", "match.statistic"},
    {"match.row_program"},
    {"match.constant"},
    {
        "match.skip",
        "match.matmul",
        "lowering",
        "graph_code",
        "canonicalize",
        "residual",
        "channel_spaces",
    },
    {"ops", "graph_utils", "source_line"},
    {"functional", "dispatch"},
    {"arguments", "kernels.coverage", "kernels.launch_both"},
    {"kernels.launch"},
    {"kernels", "kernels.norm_cast_both"},
    {"kernels.norm_cast"},
    {"kernels.statistic"},
    {"kernels.mx"},
    {"kernels.rounding", "kernels.publish"},
    {"estimate", "spec"},
    {"config", "channel_order"},
    {"calibration", "report", "weight_names"},
    {"files", "formats", "inductor_options", "module_names", "name_patterns", "errors"},
    {"holders", "compiled_call"},
    {"subgraph", "skip_reason"},
    {"report_diff", "page", "report_table"},
    {"serialize", "collector"},
]
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(
            "mxnorm_pass"
        ):
            continue
        inside = (node.module or "").removeprefix("mxnorm_pass").lstrip(".")
        found |= {inside} if inside else {alias.name for alias in node.names}
    return found


def test_imports_go_down() -> None:
    sources = {module_name(p): p for p in ROOT.rglob("*.py")}
    assert sources.keys() == LEVEL.keys()
    for name, path in sources.items():
        if name == "__init__":
            continue
        for imported in imports(path):
            assert LEVEL[name] < LEVEL[imported], f"{name} imports {imported}"


def test_kernels_and_functional_know_no_graphs() -> None:
    for name in ("functional", "formats", "config", "report"):
        assert "fx" not in {
            alias.name
            for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }


def test_files_and_functions_stay_readable() -> None:
    for path in ROOT.rglob("*.py"):
        source = path.read_text()
        assert len(source.splitlines()) <= 500, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"
