"""Compile a small model, print what became of its norms, and turn parts of it off."""

import torch
from torch import nn

import mxnorm_pass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.RMSNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


model, x = nn.Sequential(*(Block() for _ in range(4))), torch.randn(8, 64)
compiled = torch.compile(model, backend="mxnorm")
with mxnorm_pass.record() as report:
    compiled(x).sum().backward()  # the first call compiles
print(report)
options = {"modules": {"0.*": False, "3.norm": {"estimator": "exact"}}}
print(mxnorm_pass.explain(model, x, options=options))  # runs nothing; compile takes these, too
