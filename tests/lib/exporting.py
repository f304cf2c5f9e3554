"""Models exported, rewritten and saved."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from matching import BF16, Model, huggingface
from reference import token_ids
from torch import Tensor, nn
from torch._export.serde.serialize import _TORCH_TO_SERIALIZE_DTYPE
from torch.export import ExportedProgram

import mxnorm_pass
from mxnorm_pass import Report, ops

both_modes = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
IDS = token_ids()
EMBEDDING = "model.embed_tokens.weight"


def export(model: nn.Module, *args: Any, strict: bool = False, **options: Any) -> ExportedProgram:
    return torch.export.export(model, args, strict=strict, **options)


def apply(program: ExportedProgram, **config: Any) -> tuple[ExportedProgram, Report]:
    with mxnorm_pass.record() as report:
        return mxnorm_pass.apply(program, config), report


def run(model: nn.Module, *args: Any, **config: Any) -> tuple[tuple[Tensor, ...], Report]:
    """Outputs of the exported and rewritten model, and what the pass says of it."""
    program, report = apply(export(model, *args), **config)
    return program.module()(*args), report


def export_llama(model: nn.Module, strict: bool = False, **options: Any) -> ExportedProgram:
    return torch.export.export(model, (IDS,), {"use_cache": False}, strict=strict, **options)


def logits(model: Callable[..., Any], ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def save(program: ExportedProgram, file: io.BytesIO | str) -> None:
    if torch.float8_e8m0fnu not in _TORCH_TO_SERIALIZE_DTYPE:
        pytest.skip("this torch cannot save programs that hold float8_e8m0fnu")
    torch.export.save(program, file)


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    save(program, file)
    file.seek(0)
    return torch.export.load(file)


def calls(program: ExportedProgram) -> list[Any]:
    return [node.target for node in program.graph.nodes if node.op == "call_function"]


def own_ops(program: ExportedProgram) -> list[str]:
    return [str(target) for target in calls(program) if str(target).startswith(ops.NAMESPACE)]


class InRegions(nn.Module):
    """A model called inside of a no_grad and an autocast region."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Model(huggingface)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
            return self.inner(x)
