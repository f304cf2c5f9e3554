"""Let Inductor's C++ backend emit ``torch.float8_e8m0fnu``, the scale dtype of MX.

Upstream, ``torch/_inductor/codegen/cpp_utils.py`` maps dtypes to C++ types (``DTYPE_TO_CPP``) and
to ATen scalar types (``DTYPE_TO_ATEN``).  In torch 2.13 neither has e8m0, so a CPU graph with an
e8m0 buffer fails in codegen with a ``KeyError`` or "missing from ... DTYPE_TO_CPP".  Every other
codegen module holds the same dict objects, so the two entries are all that is missing.

The entry is ``at::Float8_e8m0fnu`` (``cpp_prefix.h`` gets it through ``c10/util/TypeCast.h``) and
not ``uint8_t``: assignment and ``c10::bit_cast`` copy the byte, and a value conversion would run
the code that eager runs rather than read the exponent byte as an integer.  Conversions and
arithmetic do not reach C++ codegen at all: ``unsupported_input_tensor`` in
``torch/_inductor/lowering.py`` sends them to ATen.

e8m0 is deliberately not added to ``VECTORIZABLE_DTYPES`` in ``torch/_inductor/codegen/cpp.py``.
``TilingSelect.select_tiling`` then makes each loop that touches e8m0 a scalar one.  Explicit
vectors would be unsafe: ``CppTile2DKernel.store`` has an inline list of the 8-bit dtypes whose
stores must be bounded, and e8m0 is not in it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import torch

_lock = threading.Lock()
_depth = 0
_inserted: list[tuple[dict[torch.dtype, str], str]] = []


def _tables() -> list[tuple[dict[torch.dtype, str], str]]:
    # compile_fx first: it loads the ROCm and CUTLASS modules, which copy DTYPE_TO_CPP when they
    # are imported. Imported inside the context, those copies would keep the entry.
    import_module("torch._inductor.compile_fx")
    from torch._inductor.codegen import cpp_utils

    return [
        (cpp_utils.DTYPE_TO_CPP, "at::Float8_e8m0fnu"),
        (cpp_utils.DTYPE_TO_ATEN, "at::kFloat8_e8m0fnu"),
    ]


def _enter() -> None:
    global _depth
    tables = _tables()
    with _lock:
        if _depth == 0:
            for table, name in tables:
                if torch.float8_e8m0fnu not in table:
                    table[torch.float8_e8m0fnu] = name
                    _inserted.append((table, name))
        _depth += 1


def _exit() -> None:
    global _depth
    with _lock:
        _depth -= 1
        if _depth == 0:
            for table, name in _inserted:
                if table.get(torch.float8_e8m0fnu) is name:
                    del table[torch.float8_e8m0fnu]
            _inserted.clear()


@contextmanager
def cpu_e8m0_support() -> Iterator[None]:
    """Make Inductor's C++ codegen accept e8m0 tensors while the context is open.

    Patches ``DTYPE_TO_CPP`` and ``DTYPE_TO_ATEN`` of ``torch/_inductor/codegen/cpp_utils.py``,
    which lack the dtype in torch 2.13.  A table that has it already is left alone.  Re-entrant and
    thread safe: the first entry patches, the last exit restores, also after an exception.

    It has to be open while Inductor generates code, which is inside ``inner_compile`` for both the
    forward and the lazily compiled backward::

        compile_fx(gm, example_inputs, inner_compile=cpu_e8m0_support()(compile_fx_inner))

    The FX graph and AOTAutograd cache keys do not depend on ``inner_compile``, and a cache hit
    needs no codegen, so both caches work as usual.  Code is generated in this process (only the
    C++ compiler runs elsewhere), except with ``TORCHINDUCTOR_FX_COMPILE_MODE=SUBPROCESS``, where
    the context has no effect and the upstream error is raised.
    """
    _enter()
    try:
        yield
    finally:
        _exit()
