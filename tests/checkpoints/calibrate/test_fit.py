"""The parts of ``calibrate`` that need no model: weights, orders, batches, fallback."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import Tensor

from mxnorm_pass.checkpoints.batches import Loss, has_tokens, loss_of, split_batches, token_rows
from mxnorm_pass.checkpoints.calibrate.emulation import Estimate
from mxnorm_pass.checkpoints.calibrate.fallback import (
    divergence,
    exact_norms,
    few_rows,
    rank_by_cost,
)
from mxnorm_pass.checkpoints.calibrate.fit import Moments, block_weights
from mxnorm_pass.checkpoints.calibrate.moments import BlockMoments, ChannelPower
from mxnorm_pass.checkpoints.calibrate.orders import candidate_orders
from mxnorm_pass.functional import rms_estimate

BLOCK = 32


def heavy_tailed(rows: int, width: int, seed: int) -> Tensor:
    """Student's t with 5 degrees of freedom, uneven channels, and four outlier channels."""
    of_channels = torch.Generator().manual_seed(99)
    scales = torch.exp(0.5 * torch.randn(width, generator=of_channels))
    outliers = torch.randperm(width, generator=of_channels)[:4]
    scales[outliers] *= 0.5 * width**0.5
    random = torch.Generator().manual_seed(seed)
    chi_square = sum(torch.randn(rows, width, generator=random).square() for _ in range(5))
    tails = torch.randn(rows, width, generator=random) / (chi_square / 5).sqrt()
    return tails * scales * torch.exp(0.3 * torch.randn(rows, 1, generator=random))


def observed(observer: Any, x: Tensor) -> Any:
    observer.batch = {}
    for part in x.chunk(3):
        observer("norm", part[None])
    return observer


@settings(max_examples=examples(60), deadline=None)
@given(
    seed=st.integers(0, 2**16),
    blocks=st.integers(1, 20),
    rank=st.integers(1, 20),
    zeros=st.integers(0, 3),
)
def test_block_weights_are_those_of_scipy(seed: int, blocks: int, rank: int, zeros: int) -> None:
    """Also where blocks are empty, or follow from one another."""
    random = torch.Generator().manual_seed(seed)
    sources = torch.rand(200, min(rank, blocks), generator=random, dtype=torch.float64).exp()
    mixed = sources @ torch.rand(sources.shape[1], blocks, generator=random, dtype=torch.float64)
    mixed *= torch.exp(3 * torch.randn(blocks, generator=random, dtype=torch.float64))
    mixed[:, : min(zeros, blocks - 1)] = 0.0
    found = block_weights(Moments.of(mixed[:100]) + Moments.of(mixed[100:]))
    _, residual = nnls(mixed.numpy(), torch.ones(200).numpy())
    assert (found >= 0).all() and found.dtype == torch.float32
    # The minimum is unique, the weights that reach it need not be; float32 rounds them.
    achieved = float((mixed @ found.double() - 1).norm())
    rounding = 2.0**-24 * math.sqrt(200) * float((mixed @ found.double()).abs().max())
    assert achieved <= residual * (1 + 1e-6) + 2 * rounding


def test_moments_tell_the_error() -> None:
    random = torch.Generator().manual_seed(0)
    relative = torch.rand(50, 4, generator=random)
    weights = torch.rand(4, generator=random)
    expected = float((relative.double() @ weights.double() - 1).square().mean())
    assert Moments.of(relative).error(weights) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0])
def test_weights_of_iid_blocks_add_up_to_the_constant(p: float) -> None:
    """For Gaussian data the best weights are the constant's, 1 / (K c^p) each, but for noise."""
    from mxnorm_pass.functional import rms_constant

    x = torch.randn(20000, 4 * BLOCK, generator=torch.Generator().manual_seed(0))
    moments = observed(BlockMoments(p), x).of("norm", 0)
    constant = rms_constant(p, BLOCK) ** -p
    # Shrunk by the variance of the estimate, which is below 2% of its square for K = 4.
    assert float(block_weights(moments).sum()) == pytest.approx(constant, rel=0.03)


def test_noise_falls_with_the_root_of_the_number_of_blocks() -> None:
    noise = {}
    for width in (576, 2048, 4096):
        fitted, unseen = heavy_tailed(1500, width, 0), heavy_tailed(800, width, 1)
        weights = block_weights(observed(BlockMoments(2.0), fitted).of("norm", 0))
        estimate = rms_estimate(unseen, block_weights=weights)
        ratio = estimate / unseen.square().mean(-1, keepdim=True).sqrt()
        noise[width] = float(ratio.log().std())
    scaled = [std * (width / BLOCK) ** 0.5 for width, std in noise.items()]
    # Measured 0.31, 0.32, 0.31: K grows by 7, so noise that did not fall would grow by 2.7.
    assert max(scaled) < 1.25 * min(scaled), noise


def test_outliers_get_blocks_of_their_own() -> None:
    power = torch.ones(8 * BLOCK)
    power[[3, 7, 100]] = torch.tensor([50.0, 90.0, 70.0])
    natural, *others = candidate_orders(power, BLOCK)
    assert natural.tolist() == list(range(8 * BLOCK))
    for order in others:
        assert sorted(order.tolist()) == natural.tolist()
    three = next(o for o in others if {int(o[0]), int(o[32]), int(o[64])} == {7, 100, 3})
    assert not {3, 7, 100} & set(three[[*range(1, 32), *range(33, 64), *range(65, 256)]].tolist())


def test_an_outlier_alone_in_its_block_is_told_exactly() -> None:
    """Two outliers in one natural block hide one another; the chosen order's error is smaller."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 8 * BLOCK, generator=random)
    x[:, [3, 7]] *= 300 * torch.rand(4000, 2, generator=random)
    power = observed(ChannelPower(), x).mean(["norm"])
    orders = candidate_orders(power, BLOCK)
    moments = observed(BlockMoments(2.0, orders=orders, stream={"norm"}), x)
    errors = [moments.mean_error(["norm"], i) for i in range(len(orders))]
    best = orders[min(range(len(orders)), key=errors.__getitem__)]
    blocks_of = {int(c): int(i) // BLOCK for i, c in enumerate(best)}
    assert blocks_of[3] != blocks_of[7]
    assert min(errors) < errors[0] / 10


def test_padding_and_zero_rows_do_not_count() -> None:
    x = heavy_tailed(24, 64, 0).reshape(2, 12, 64)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    x[0, 3] = 0.0
    kept = [row for row, m in zip(x.reshape(-1, 64), mask.flatten(), strict=True) if m]
    rows = torch.stack([row for row in kept if row.any()])
    padded, plain = BlockMoments(2.0), BlockMoments(2.0)
    padded.batch, plain.batch = {"attention_mask": mask}, {}
    padded("norm", x)
    plain("norm", rows)
    a, b = padded.of("norm", 0), plain.of("norm", 0)
    assert a.count == b.count == 19
    torch.testing.assert_close(a.gram, b.gram)
    assert token_rows({"attention_mask": mask}, x).shape == (20, 64)
    flat = token_rows({"attention_mask": mask}, x.flatten(0, 1))
    assert torch.equal(flat, token_rows({"attention_mask": mask}, x))


def test_a_norm_without_tokens_has_no_moments() -> None:
    moments = BlockMoments(2.0)
    moments.batch = {"attention_mask": torch.zeros(1, 3)}
    moments("norm", torch.ones(1, 3, 64))
    assert moments.of("norm", 0) is None


IDS = torch.tensor([[1, 2, 3, 0]])


def test_the_loss_is_that_of_the_next_token() -> None:
    logits = torch.randn(1, 4, 5, generator=torch.Generator().manual_seed(0))
    terms = -logits.log_softmax(-1)[0, range(3), [2, 3, 0]]
    loss = loss_of(SimpleNamespace(logits=logits), {"input_ids": IDS})
    assert (loss.mean, loss.tokens) == (pytest.approx(float(terms.mean())), 3)
    masked = {"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    loss = loss_of((logits,), masked)
    assert (loss.mean, loss.tokens) == (pytest.approx(float(terms[:2].mean())), 2)
    assert loss_of(logits, IDS).tokens == 3


def test_labels_make_the_models_own_loss_count() -> None:
    labels = torch.tensor([[-100, 1, 2, -100]])
    output = SimpleNamespace(loss=torch.tensor(1.5), logits=torch.zeros(1, 4, 5))
    assert loss_of(output, {"input_ids": IDS, "labels": labels}) == Loss(3.0, 2)
    assert (Loss(3.0, 2) + Loss(1.0, 2)).mean == 1.0


def test_labels_that_are_all_ignored_add_nothing() -> None:
    labels = torch.full((1, 4), -100)
    output = SimpleNamespace(loss=torch.tensor(math.nan), logits=torch.zeros(1, 4, 5))
    batch = {"input_ids": IDS, "labels": labels}
    assert loss_of(output, batch) == Loss() and not has_tokens(batch)
    labels[0, 1] = 2
    assert has_tokens(batch) and has_tokens(IDS)
    assert not has_tokens({"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)})


def test_a_loss_that_is_not_defined() -> None:
    with pytest.raises(ValueError, match="Give each batch `labels`"):
        loss_of(torch.zeros(2, 10), {"pixels": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="returns a str without logits"):
        loss_of("text", IDS)


@pytest.mark.parametrize(("given_", "fitted"), [(2, 1), (3, 2), (8, 6), (9, 7)])
def test_the_last_quarter_is_held_out(given_: int, fitted: int) -> None:
    batches = [IDS + i for i in range(given_)]
    split = split_batches(iter(batches))
    assert len(split.fitted) == fitted
    assert all(a is b for a, b in zip([*split.fitted, *split.held_out], batches, strict=True))


NAN = torch.tensor([[float("nan")]])
WRONG_BATCHES = {
    "none": ([], "0 batches were given; calibration needs at least 2"),
    "one": ([IDS], "1 batches were given"),
    "a single batch": ({"input_ids": IDS}, "batches is a dict; it must be a list"),
    "a tensor": (IDS, "batches is a Tensor; it must be a list"),
    "a number": (3, "batches is a int"),
    "strings": (["text", "text"], "batch 0 is a str"),
    "no tokens": ([IDS, {"input_ids": IDS[:, :0]}], r"batch 1: input_ids has shape \(1, 0\)"),
    "NaN": ([IDS, {"inputs_embeds": NAN}], "batch 1: inputs_embeds holds NaN"),
}


@pytest.mark.parametrize("case", WRONG_BATCHES)
def test_wrong_batches(case: str) -> None:
    batches, message = WRONG_BATCHES[case]
    with pytest.raises(ValueError, match=message):
        split_batches(batches)


ESTIMATES = {name: Estimate(torch.ones(1), 2.0) for name in "abcdefg"}


@pytest.mark.parametrize("needed", range(8))
def test_no_more_norms_fall_back_than_the_budget_asks_for(needed: int) -> None:
    """A loss that each estimate adds to: the costliest return first, and only as many."""
    costs = {name: 2.0**-i for i, name in enumerate("gfedcba")}
    sums = [sum(sorted(costs.values())[: 7 - n]) for n in range(8)]
    calls = []

    def rank() -> list[str]:
        calls.append("rank")
        return list("gfedcba")

    def loss(estimates: Any) -> float:
        return 1 + sum(costs[name] for name in estimates)

    found = exact_norms(ESTIMATES, loss, rank, budget=1 + sums[needed])
    assert found == tuple("gfedcba"[:needed])
    assert len(calls) == (needed > 0)


def test_norms_are_ranked_by_their_divergence() -> None:
    base = torch.zeros(3, 4)
    strength = {"a": 0.1, "b": 3.0, "c": 1.0}

    def logits(estimates: Any) -> Tensor:
        return base + sum((strength[n] for n in estimates), 0.0) * torch.eye(3, 4)

    estimates = {name: ESTIMATES[name] for name in strength}
    assert rank_by_cost(estimates, logits) == ["b", "c", "a"]


def test_the_divergence_is_that_of_the_distributions() -> None:
    p, q = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    of = torch.distributions.Categorical
    expected = torch.distributions.kl_divergence(of(logits=p), of(logits=q)).mean()
    assert divergence(p, q) == pytest.approx(float(expected), rel=1e-5)


def test_a_ranking_takes_the_first_rows() -> None:
    ids = torch.arange(4 * 300).reshape(4, 300)
    batch = {"input_ids": ids, "attention_mask": ids > 3, "use_cache": False}
    few = few_rows(batch)
    assert few["input_ids"].shape == few["attention_mask"].shape == (1, 300)
    assert few["use_cache"] is False
    assert few_rows(ids[:, :100]).shape == (4, 100)


def test_no_tokens_have_no_mean_loss() -> None:
    assert math.isnan(Loss().mean)
