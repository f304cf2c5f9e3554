"""MXNorm for ``torch.compile``: RMSNorm, MX cast and matmul rewritten to share one absmax.

Public names are loaded on first use; importing the package touches neither Dynamo nor Inductor.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mxnorm_pass import functional as functional
    from mxnorm_pass.checkpoints.calibrate.calibrate import calibrate as calibrate
    from mxnorm_pass.checkpoints.channels.permute import permute_channels as permute_channels
    from mxnorm_pass.checkpoints.compare.compare import compare as compare
    from mxnorm_pass.checkpoints.compare.comparison import Comparison as Comparison
    from mxnorm_pass.checkpoints.convert.conversion import Conversion as Conversion
    from mxnorm_pass.checkpoints.convert.convert import convert as convert
    from mxnorm_pass.compilation.explain import explain as explain
    from mxnorm_pass.compilation.export import apply as apply
    from mxnorm_pass.compilation.layers import compile_layers as compile_layers
    from mxnorm_pass.errors import CalibrationWarning as CalibrationWarning
    from mxnorm_pass.errors import ConversionError as ConversionError
    from mxnorm_pass.errors import MXNormWarning as MXNormWarning
    from mxnorm_pass.errors import VerificationError as VerificationError
    from mxnorm_pass.options.calibration import Calibration as Calibration
    from mxnorm_pass.options.config import MXNormConfig as MXNormConfig
    from mxnorm_pass.report.diff import ReportDiff as ReportDiff
    from mxnorm_pass.report.reason import SkipReason as SkipReason
    from mxnorm_pass.report.recording import record as record
    from mxnorm_pass.report.report import Report as Report
    from mxnorm_pass.report.site import Graph as Graph
    from mxnorm_pass.report.site import NearMiss as NearMiss
    from mxnorm_pass.report.site import Site as Site

__version__ = "0.1.0"

_HOME = {
    "Calibration": "options.calibration",
    "CalibrationWarning": "errors",
    "Comparison": "checkpoints.compare.comparison",
    "Conversion": "checkpoints.convert.conversion",
    "ConversionError": "errors",
    "Graph": "report.site",
    "MXNormConfig": "options.config",
    "MXNormWarning": "errors",
    "NearMiss": "report.site",
    "Report": "report.report",
    "ReportDiff": "report.diff",
    "Site": "report.site",
    "SkipReason": "report.reason",
    "VerificationError": "errors",
    "apply": "compilation.export",
    "calibrate": "checkpoints.calibrate.calibrate",
    "compare": "checkpoints.compare.compare",
    "compile_layers": "compilation.layers",
    "convert": "checkpoints.convert.convert",
    "explain": "compilation.explain",
    "permute_channels": "checkpoints.channels.permute",
    "record": "report.recording",
}
__all__ = sorted([*_HOME, "functional"])


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("mxnorm_pass.functional")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"mxnorm_pass.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
