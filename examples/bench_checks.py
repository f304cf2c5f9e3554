"""Poisoned outputs, and how far a contestant's casts are from ``functional``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}
# Bytes of a block of 16 elements in 4 bits, the smallest there is.
PACKED_BLOCK = 8


@dataclass(frozen=True)
class Check:
    """Outputs of one contestant against what ``functional`` gives.

    Attributes:
        unwritten: elements, of all calls, that still held the poison after the timed replays; of
            elements in 4 bits the bytes of whole blocks.
        compared: elements of the first rows that were compared, bytes where two share one.
        differing: those among them whose bits differ.
        steps: the most codes that a scale lies away, or a value in a block of equal scale.
    """

    unwritten: int
    compared: int
    differing: int
    steps: int


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(BITS[tensor.element_size()])


def poison(outputs: Outputs) -> None:
    """0xFF in every byte: a NaN in our dtypes, which finite inputs never give, or twice -6."""
    for tensor in outputs.values():
        bits(tensor).fill_(-1)


def unwritten(outputs: Outputs) -> int:
    return sum(int(poisoned(tensor).sum()) for tensor in outputs.values())


def poisoned(tensor: Tensor) -> Tensor:
    """Where the poison is left, as a mask."""
    found: Tensor = bits(tensor) == -1
    if tensor.dtype != torch.uint8:
        return found
    # No code of 4 bits is a NaN, but random inputs give no block whose elements are all -6.
    whole = found.unflatten(-1, (-1, PACKED_BLOCK)).all(-1, keepdim=True)
    return whole.expand(*whole.shape[:-1], PACKED_BLOCK)


def codes_in_order(tensor: Tensor) -> Tensor:
    """Numbers that count up from one element to the next; both zeros are 0.

    Of float8 in ``tensor``'s shape; of uint8, which holds two elements of 4 bits, twice as wide.
    """
    code = tensor.view(torch.uint8).to(torch.int16)
    if tensor.dtype == torch.float8_e8m0fnu:
        return code
    sign = 128
    if tensor.dtype == torch.uint8:
        code, sign = torch.stack((code & 15, code >> 4), -1).flatten(-2), 8
    return torch.where(code >= sign, sign - code, code)


def compare(outputs: Outputs, expected: Outputs, unwritten: int) -> Check:
    """Compare the rows, or for ``values_t`` and ``scales_t`` the columns, that are expected."""
    compared = differing = steps = 0
    equal_scale: dict[str, Tensor] = {}
    # Scales first: the values in a block whose scale differs are all of another size.
    for name in sorted(expected, key=lambda name: not name.startswith("scales")):
        want = expected[name]
        got = outputs[name][: want.shape[0], : want.shape[1]]
        differs = bits(got.contiguous()) != bits(want.contiguous())
        compared += want.numel()
        differing += int(differs.sum())
        if name == "total":
            # Not a code: any difference is a wrong sum.
            steps = max(steps, 2 * int(differs.any()))
            continue
        distance = (codes_in_order(got.contiguous()) - codes_in_order(want.contiguous())).abs()
        if name.startswith("scales"):
            equal_scale[name.replace("scales", "values")] = ~differs
        else:
            same = equal_scale[name]
            blocks = distance.view(*same.shape, distance.shape[-1] // same.shape[-1])
            distance = torch.where(same.unsqueeze(-1), blocks, 0)
        steps = max(steps, int(distance.max()))
    return Check(unwritten, compared, differing, steps)
