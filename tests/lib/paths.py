"""Where things lie in the repository."""

from __future__ import annotations

from pathlib import Path

LIB = Path(__file__).resolve().parent
TESTS = LIB.parent
ROOT = TESTS.parent
PACKAGE = ROOT / "mxnorm_pass"
EXAMPLES = ROOT / "examples"
README = ROOT / "README.md"
