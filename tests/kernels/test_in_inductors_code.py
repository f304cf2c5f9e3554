"""Inductor copies a kernel's source, with all that it reads, into the code that it writes."""

from __future__ import annotations

import ast
from typing import Any

import pytest
from torch._inductor.codegen.wrapper import (
    user_defined_triton_kernel_transitive_closure_source_code as source_of,
)

from mxnorm_pass.kernels.norm_cast import norm_cast_kernel
from mxnorm_pass.kernels.norm_cast_both import norm_cast_both_kernel
from mxnorm_pass.kernels.operand_casts import operand_casts_kernel


@pytest.mark.parametrize("kernel", [norm_cast_kernel, norm_cast_both_kernel, operand_casts_kernel])
def test_sources_can_be_quoted(kernel: Any) -> None:
    (quoted,) = ast.parse(f"'''{source_of(kernel)}'''").body
    assert isinstance(quoted, ast.Expr) and isinstance(quoted.value, ast.Constant)
    names = {n.name for n in ast.walk(ast.parse(quoted.value.value)) if hasattr(n, "name")}
    assert "to_elements" in names
