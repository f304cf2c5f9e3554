"""``calibrate`` on small models: what it finds, that a compile computes it, and wrong use."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from reference import build_llama, expected_sites, quantize_with_torchao
from torch import Tensor, nn

import mxnorm_pass
from mxnorm_pass.checkpoints.calibrate.emulation import Emulation, Estimate
from mxnorm_pass.checkpoints.calibrate.norms import fused_norms
from mxnorm_pass.checkpoints.calibrate.probe import probe
from mxnorm_pass.functional import rms_estimate

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
HIDDEN, LAYERS = 256, 1
# Both in the first block of the natural order.
OUTLIERS = (3, 7)
NORMS = [norm for norm, _ in expected_sites(LAYERS)]


def outlier_llama(dtype: torch.dtype = FP32, **overrides: Any) -> Any:
    """A random Llama with two outlier channels, whose embeddings tell what the next token is."""
    model = build_llama(dtype, layers=LAYERS, hidden=HIDDEN, **overrides)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings[:, list(OUTLIERS)] *= 30
        model.lm_head.weight.copy_(20 * embeddings.roll(-1, 0))
        model.lm_head.weight[:, list(OUTLIERS)] = 0
    return model.eval()


def batches(count: int = 4, seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows in which each token is followed by the next one."""
    starts = torch.randint(0, 64, (count, 2, 1), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": (start + torch.arange(32)) % 64} for start in starts]


def compiled_logits(model: nn.Module, ids: Tensor, **options: Any) -> Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="mxnorm", options={"inner": "aot_eager", **options})
        return compiled(ids, use_cache=False).logits


def emulated_logits(model: nn.Module, emulation: Emulation, ids: Tensor) -> Tensor:
    with emulation.entered(model) as call:
        return call(ids, use_cache=False).logits


@pytest.mark.full
@pytest.mark.parametrize(
    "dtype, gain",
    [(FP32, "activation"), pytest.param(BF16, "fold", marks=pytest.mark.full)],
    ids=str,
)
def test_the_emulation_has_the_bits_of_a_compile(dtype: torch.dtype, gain: str) -> None:
    """Under the exact RMS and under block weights, channels in another order included."""
    model = outlier_llama(dtype, rms_norm_eps=1e-3)
    ids = batches()[0]["input_ids"]
    options = {"gain": gain}
    sites = fused_norms(model, {"input_ids": ids}, options, CPU)
    exact = emulated_logits(model, Emulation(sites), ids)
    assert torch.equal(exact, compiled_logits(model, ids, estimator="exact", **options))

    calibration = mxnorm_pass.calibrate(model, batches(), options)
    assert calibration.order is not None and not calibration.exact
    estimates = {name: Estimate(w, 2.0) for name, w in calibration.weights.items()}
    orders = dict.fromkeys(NORMS, calibration.order)
    emulated = emulated_logits(model, Emulation(sites, orders, estimates), ids)
    permuted = copy.deepcopy(model)
    mxnorm_pass.permute_channels(permuted, calibration.order)
    compiled = compiled_logits(permuted, ids, calibration=calibration, **options)
    # The permuted residual stream is summed up in another order by the linears that stay plain.
    error = (emulated - compiled).float().norm() / compiled.float().norm()
    assert error < (1e-6 if dtype == FP32 else 1e-2)
    assert (emulated - exact).float().norm() / exact.float().norm() > 1e-3


@pytest.mark.full
def test_linears_that_cast_by_themselves_read_scaled_inputs() -> None:
    """torchao casts what the norm hands over, rounded; the backend does not round in between."""
    model = quantize_with_torchao(outlier_llama(BF16))
    ids = batches()[0]["input_ids"]
    options = {"quantize": "existing", "p": 1}
    with pytest.warns(mxnorm_pass.MXNormWarning, match="channels keep their order"):
        calibration = mxnorm_pass.calibrate(model, batches(), options)
    assert calibration.order is None and calibration.p == 1
    sites = fused_norms(model, {"input_ids": ids}, options, CPU)
    exact = emulated_logits(model, Emulation(sites), ids)
    assert torch.equal(exact, model(ids, use_cache=False).logits)
    estimates = {name: Estimate(w, 1.0) for name, w in calibration.weights.items()}
    emulated = emulated_logits(model, Emulation(sites, {}, estimates), ids)
    compiled = compiled_logits(model, ids, calibration=calibration, quantize="existing")
    moved = (compiled - exact).float().norm()
    assert (emulated - compiled).float().norm() < 0.5 * moved


@pytest.mark.parametrize("p, gain", [pytest.param(1.0, 1.5, marks=pytest.mark.full), (2.0, 3.0)])
def test_block_weights_estimate_what_the_constant_misses(p: float, gain: float) -> None:
    """With p = 1 an outlier's own block is no exact part of the sum, so that less is gained."""
    model = outlier_llama()
    calibration = mxnorm_pass.calibrate(model, batches(), {"p": p})
    assert set(calibration.weights) == set(NORMS) and calibration.p == p
    order = calibration.order
    blocks = {int(c): i // 32 for i, c in enumerate(order)}
    assert blocks[OUTLIERS[0]] != blocks[OUTLIERS[1]]
    seen: dict[str, Tensor] = {}
    for name in NORMS:
        norm = model.get_submodule(name)
        norm.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        model(**batches(1, seed=1)[0])
    for name, x in seen.items():
        rms = x.square().mean(-1, keepdim=True).sqrt()
        weights = calibration.weights[name]
        calibrated = rms_estimate(x[..., order], p=p, block_weights=weights) / rms
        gaussian = rms_estimate(x, p=p) / rms
        assert calibrated.log().abs().mean() < gaussian.log().abs().mean() / gain


@pytest.mark.full
def test_the_model_is_left_as_it_was_and_gives_the_same_again() -> None:
    model = outlier_llama().train()
    model.model.layers[0].eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    calibration = mxnorm_pass.calibrate(model, batches())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert mxnorm_pass.calibrate(torch.compile(model, backend="mxnorm"), batches()) == calibration


@pytest.mark.full
def test_a_model_that_fails_is_left_as_it_was_too() -> None:
    model = outlier_llama()
    wrong = [*batches(3), {"input_ids": torch.full((1, 4), 64)}]
    with pytest.raises(IndexError):
        mxnorm_pass.calibrate(model, wrong)
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in model.modules())


@pytest.mark.full
def test_norms_fall_back_until_the_loss_is_within_its_budget() -> None:
    model = outlier_llama()
    free = mxnorm_pass.calibrate(model, batches(), max_loss_increase=1e6)
    assert free.exact == ()
    strict = mxnorm_pass.calibrate(model, batches(), max_loss_increase=0.0)
    assert set(strict.exact) <= set(NORMS)
    assert all(torch.equal(w, free.weights[name]) for name, w in strict.weights.items())
    mxnorm_pass.permute_channels(model, strict.order)
    ids = batches()[-1]["input_ids"]
    losses = []
    for options in ({"estimator": "exact"}, {"calibration": strict}):
        logits = compiled_logits(model, ids, **options)[:, :-1].flatten(0, 1)
        losses.append(float(nn.functional.cross_entropy(logits, ids[:, 1:].flatten())))
    assert losses[1] <= losses[0] * (1 + 1e-5)


@pytest.mark.full
def test_modules_and_formats_are_those_of_the_options() -> None:
    model = outlier_llama()
    options = {
        "modules": {"*.input_layernorm": False, "*.gate_proj": {"scale_mode": "floor"}},
        "elem_dtype": torch.float8_e5m2,
    }
    sites = fused_norms(model, batches()[0], options, CPU)
    assert [site.name for site in sites] == NORMS[1:]
    formats = {linear.name: str(linear.format) for site in sites for linear in site.linears}
    assert formats["model.layers.0.mlp.gate_proj"] == "mxfp8 e5m2 floor block 32"
    assert formats["model.layers.0.mlp.up_proj"] == "mxfp8 e5m2 rceil block 32"
    assert set(mxnorm_pass.calibrate(model, batches(), options).weights) == set(NORMS[1:])


class OnePlus(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.weight, self.hidden_eps = nn.Parameter(torch.linspace(-0.9, 2, 64)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, True) + self.hidden_eps) * (1 + self.weight)


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-6, 1e-5, 1e-2])
def test_gain_and_eps_are_read_off_any_norm(eps: float) -> None:
    norm = OnePlus(eps)
    constants = probe(norm, 64, CPU)
    # A small probe's mean square is 1e-6, in float32.
    assert constants.eps == pytest.approx(eps, rel=1e-5, abs=1e-12)
    torch.testing.assert_close(constants.gain, (1 + norm.weight).detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 64)], ids=str)
def test_gain_and_eps_of_a_gain_with_leading_ones(shape: tuple[int, ...]) -> None:
    norm = OnePlus(1e-6)
    flat = probe(norm, 64, CPU)
    norm.weight = nn.Parameter(norm.weight.detach().reshape(shape))
    found = probe(norm, 64, CPU)
    assert torch.equal(found.gain, flat.gain) and found.eps == flat.eps


WRONG_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "exact": ({"estimator": "exact"}, "estimator='exact', which needs no calibration"),
    "p": ({"modules": {"*.input_*": {"p": 1}}}, "p = 1, the options' p is 2"),
    "nothing fused": ({"modules": {"*": False}}, "fuses no norm of this model"),
    "prefix": ({"prefix": "model"}, "calibrate the whole model"),
    "unknown": ({"estimater": "mxnorm"}, "estimater"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options(case: str) -> None:
    options, message = WRONG_OPTIONS[case]
    with pytest.raises(ValueError, match=message):
        mxnorm_pass.calibrate(outlier_llama(), batches(), options)


@pytest.mark.parametrize("increase", [-0.1, float("nan"), float("inf")])
def test_a_wrong_budget(increase: float) -> None:
    with pytest.raises(ValueError, match="max_loss_increase is"):
        mxnorm_pass.calibrate(outlier_llama(), batches(), max_loss_increase=increase)


@pytest.mark.full
def test_a_loss_that_is_not_finite() -> None:
    model = outlier_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match="the model's loss on batch 0 is nan"):
        mxnorm_pass.calibrate(model, batches())


def test_a_calibration_in_the_options() -> None:
    calibration = mxnorm_pass.Calibration({NORMS[0]: torch.ones(8)})
    with pytest.raises(ValueError, match="options has a calibration"):
        mxnorm_pass.calibrate(outlier_llama(), batches(), {"calibration": calibration})
