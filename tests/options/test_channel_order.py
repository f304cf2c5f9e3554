"""Which order a model's channels are in, told from its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mxnorm_pass.options.calibration import Calibration
from mxnorm_pass.options.channel_order import channel_statistics, check_channels

D = 128
NORMS = {"norm": ["linear"]}


class Block(nn.Module):
    def __init__(self, gains: bool = True, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.norm, self.linear = nn.RMSNorm(D), nn.Linear(D, 32, bias=False)
        with torch.no_grad():
            self.linear.weight.normal_(generator=random)
            if gains:
                self.norm.weight.normal_(1, 0.2, generator=random)

    @torch.no_grad()
    def permuted(self, order: Tensor) -> Block:
        self.norm.weight.copy_(self.norm.weight[order])
        self.linear.weight.copy_(self.linear.weight[:, order])
        return self


def some_order(seed: int = 1) -> Tensor:
    return torch.randperm(D, generator=torch.Generator().manual_seed(seed))


def calibrated(model: Block, order: Tensor | None) -> Calibration:
    """What is measured on a model whose channels are in that order."""
    return Calibration(
        {"norm": torch.ones(4)}, order=order, channels=channel_statistics(model, NORMS)
    )


def check(made: Calibration, model: nn.Module) -> bool:
    return check_channels(made, dict(model.named_parameters()))


@pytest.mark.parametrize("gains", [True, False], ids=["gains", "columns of the linear"])
@given(seed=st.integers(0, 2**16))
def test_the_order_must_have_been_applied(gains: bool, seed: int) -> None:
    order = some_order(seed)
    made = calibrated(Block(gains).permuted(order), order)
    assert list(made.channels) == ["norm.weight" if gains else "linear.weight"]
    assert check(made, Block(gains).permuted(order))
    with pytest.raises(ValueError, match=r"permute_channels\(model, calibration.order\)"):
        check(made, Block(gains))
    with pytest.raises(ValueError, match="other weights"):
        check(made, Block(gains).permuted(some_order(seed + 1)))
    with pytest.raises(ValueError, match="other weights"):
        check(made, Block(gains, seed=7).permuted(order))


def test_natural_order() -> None:
    made = calibrated(Block(), None)
    assert check(made, Block())
    with pytest.raises(ValueError, match="other weights"):
        check(made, Block().permuted(some_order()))
    assert check(calibrated(Block(), torch.arange(D)), Block())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_and_a_fine_tune_do_no_harm(dtype: torch.dtype) -> None:
    order = some_order()
    made = calibrated(Block().permuted(order), order)
    tuned = Block().permuted(order)
    with torch.no_grad():
        tuned.norm.weight += 0.1 * torch.randn(D, generator=torch.Generator().manual_seed(3))
    assert check(made, tuned.to(dtype))
    untouched = Block().to(dtype)
    with pytest.raises(ValueError, match="permute_channels"):
        check(made, untouched)


def test_what_cannot_be_told() -> None:
    order = some_order()
    flat = Block(gains=False)
    nn.init.ones_(flat.linear.weight)
    assert calibrated(flat, order).channels == {}
    assert not check(calibrated(flat, order), flat)
    assert check(calibrated(flat, None), flat)
    assert not check(calibrated(Block(), order), flat)
    assert not check(calibrated(Block(), order), Block().to("meta"))
    assert not check(calibrated(Block(), order), nn.Linear(2, 2))


def test_an_order_among_equal_channels_cannot_be_told() -> None:
    model = Block()
    with torch.no_grad():
        model.norm.weight[1] = model.norm.weight[0]
    order = torch.arange(D)
    order[:2] = torch.tensor([1, 0])
    assert not check(calibrated(model, order), model)


def test_another_width() -> None:
    with pytest.raises(ValueError, match="'norm.weight' has 32 channels, in the calibration 128"):
        check_channels(calibrated(Block(), None), {"norm.weight": torch.rand(32)})


def test_norms_of_another_width_stay_in_their_order() -> None:
    """The order is that of the residual stream; latent norms are not on it."""
    order = some_order()
    latent: dict[str, Any] = {"latent.weight": torch.linspace(0, 1, 32)}
    made = Calibration(
        {"norm": torch.ones(4), "latent": torch.ones(1)}, order=order, channels=latent
    )
    assert not check_channels(made, latent)
