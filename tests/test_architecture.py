"""Imports go one way, as mxnorm_pass/README.md draws it."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

import pytest
from paths import PACKAGE

# From the top of the house to its floor: a folder imports from itself and from those below it.
FOLDERS = [
    "",  # what users import: the backend, functional, and the command line's start
    "cli",
    "checkpoints",
    "compilation",
    "passes.before_autograd",
    "passes",
    "passes.verify",
    "passes.rewrite",
    "passes.match",
    "report",
    "ops",
    "kernels",
    "graph",
    "options",
    "numerics",
]
# In the package's root, but at its floor.
LEAVES = {"names", "files", "errors", "extras"}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def rank(module: str) -> int:
    """The higher, the further down."""
    if module in LEAVES:
        return len(FOLDERS)
    folder = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    while folder not in FOLDERS:
        folder = folder.rpartition(".")[0]
    return FOLDERS.index(folder)


def imports(module: str) -> set[str]:
    """The modules of this package that a module imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        package, _, inside = node.module.partition(".")
        if package != "mxnorm_pass":
            continue
        for alias in node.names:
            name = f"{inside}.{alias.name}".lstrip(".")
            found.add(name if name in MODULES else inside)
    return found - {module}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    if module in ("__init__", ""):
        return
    for imported in imports(module):
        assert rank(module) <= rank(imported), f"{module} imports {imported}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: imports(module) for module in MODULES if module != "__init__"}
    assert list(TopologicalSorter(graph).static_order())


def test_every_folder_says_what_it_is_for() -> None:
    for folder in (path for path in PACKAGE.rglob("*") if (path / "__init__.py").exists()):
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


@pytest.mark.parametrize("folder, unknown", [("numerics", "fx"), ("kernels", "fx")])
def test_the_math_knows_no_graphs(folder: str, unknown: str) -> None:
    for path in (PACKAGE / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert unknown not in {alias.name for alias in node.names}, path


def test_files_and_functions_stay_readable() -> None:
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text()
        assert len(source.splitlines()) <= 500, path
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"
