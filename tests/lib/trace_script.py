"""Compile a model twice, cold and from the cache, as other compiles go on; print the report."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

import mxnorm_pass


class Model(nn.Module):
    """One norm is fused, the other is read by the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.last = nn.RMSNorm(64), nn.Linear(64, 64), nn.RMSNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.linear(self.norm(x)))


def main() -> None:
    warnings.simplefilter("ignore", mxnorm_pass.MXNormWarning)
    model, x = Model(), torch.randn(4, 64)
    with mxnorm_pass.record() as report, torch.no_grad():
        # Gives the first compile of the model another number than the second one.
        torch.compile(torch.sin, backend="eager")(x)
        torch.compile(model, backend="mxnorm")(x)
        torch._dynamo.reset()
        torch.compile(model, backend="mxnorm")(x)
    print(report.to_json())


if __name__ == "__main__":
    main()
