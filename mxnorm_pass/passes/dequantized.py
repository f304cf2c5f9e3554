"""Who reads a cast's results only to undo it: a kernel can write the dequantised values instead."""

from __future__ import annotations

from typing import Any

from torch import fx

from mxnorm_pass import ops
from mxnorm_pass.kernels.coverage import DTYPES
from mxnorm_pass.numerics.formats import BlockFormat, block_format

# Among the arguments of ``dequantize``.
_FORMAT, _DTYPE, _TENSOR_SCALE = 2, 3, 4


def dequantizing_readers(
    node: fx.Node, positions: tuple[int, int], fmt: BlockFormat, tensor_scale: Any
) -> list[fx.Node]:
    """The ``dequantize`` nodes that alone read an op's values and scales, to one dtype.

    Args:
        positions: of values and scales among the results.
        fmt, tensor_scale: in which they were written.

    Returns:
        None where there are other readers, or those that read them as something else.
    """
    results = {user.args[1]: user for user in node.users}
    values, scales = (results.get(i) for i in positions)
    if values is None or scales is None:
        return []
    readers = list(values.users)
    if list(scales.users) != readers:
        return []
    for reader in readers:
        if reader.target is not ops.dequantize or reader.args[:2] != (values, scales):
            return []
        if not _undoes(reader, fmt, tensor_scale):
            return []
    dtypes = {reader.args[_DTYPE] for reader in readers}
    return readers if len(dtypes) == 1 and dtypes <= set(DTYPES) else []


def dequantized_dtype(readers: list[fx.Node]) -> Any:
    """The dtype of what they make; None where there are none."""
    return readers[0].args[_DTYPE] if readers else None


def _undoes(dequantize: fx.Node, wrote: BlockFormat, tensor_scale: Any) -> bool:
    """Does it read elements, scales and the tensor's scale as they were written?"""
    if (dequantize.args[_TENSOR_SCALE:] or (None,)) != (tensor_scale,):
        return False
    # Scale modes say how scales were chosen, not what they are.
    read = block_format(dequantize.args[_FORMAT])  # type: ignore[arg-type]
    formats = ((f.element, f.block_size, f.scale_dtype) for f in (read, wrote))
    return next(formats) == next(formats)
