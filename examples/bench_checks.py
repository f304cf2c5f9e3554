"""Poisoned outputs, and how far a contestant's casts are from ``functional``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Outputs = dict[str, Tensor]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


@dataclass(frozen=True)
class Check:
    """Outputs of one contestant against what ``functional`` gives.

    Attributes:
        unwritten: elements, of all calls, that still held the poison after the timed replays.
        compared: elements of the first rows that were compared.
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
    """0xFF in every byte: a NaN in each of our dtypes, which finite inputs never give."""
    for tensor in outputs.values():
        bits(tensor).fill_(-1)


def unwritten(outputs: Outputs) -> int:
    return sum(int((bits(tensor) == -1).sum()) for tensor in outputs.values())


def codes_in_order(tensor: Tensor) -> Tensor:
    """Numbers that count up from one float8 to the next; both zeros are 0."""
    code = tensor.view(torch.uint8).to(torch.int16)
    if tensor.dtype == torch.float8_e8m0fnu:
        return code
    return torch.where(code >= 128, 128 - code, code)


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
