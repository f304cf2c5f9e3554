"""What people do around a training step, against eager models of functional alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pairwise import some
from reference import (
    Recipe,
    build_llama,
    convert_to_mxfp8_training,
    expected_sites,
    reference_of,
    token_ids,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import (
    IDS,
    Gradients,
    assert_gradients_equal,
    gradients_of,
    repeat_by_hand,
    train,
    train_with_trainer,
    with_lora,
)

import mxnorm_pass
from mxnorm_pass import Report, SkipReason
from mxnorm_pass.ops import norm_casts

F32, BF16 = torch.float32, torch.bfloat16


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="mxnorm", options={"inner": "aot_eager", **options})


@contextmanager
def every_site_fused(layers: int = 2, graphs: int = 1) -> Iterator[Report]:
    """Each of ``graphs`` graphs of a Llama is rewritten at all norms but the last."""
    with mxnorm_pass.record() as report:
        yield report
    assert [(s.norm, s.consumers) for s in report.fused] == graphs * expected_sites(layers)
    assert {(s.norm, s.reason) for s in report.skipped} == {("model.norm", SkipReason.NO_MX_CAST)}
    assert len(report.graphs) == graphs


def assert_step_is_that_of(
    reference: nn.Module, got: Tensor, gradients: Gradients, dtype: torch.dtype
) -> None:
    want, want_gradients = train(reference, reference)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


# Gradient checkpointing


@some(
    ["whole-False"],
    per_layer={"whole": False, "per layer": True},
    use_reentrant=[False, True],
)
def test_gradient_checkpointing(use_reentrant, per_layer, monkeypatch) -> None:
    plain = build_llama()
    want, want_gradients = train(compiled(plain), plain)
    calls = _record_fused_casts(monkeypatch)
    torch._dynamo.reset()
    model = build_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    with mxnorm_pass.record() as report:
        if per_layer:
            mxnorm_pass.compile_layers(model, "model.layers.*", options={"inner": "aot_eager"})
            got, gradients = train(model, model)
        else:
            got, gradients = train(compiled(model), model)
    assert [(s.norm, s.consumers) for s in report.fused] == expected_sites(2)
    assert torch.equal(got, want)
    assert gradients.keys() == want_gradients.keys()
    assert all(torch.equal(gradients[n], want_gradients[n]) for n in want_gradients)
    # Four sites in the forward; the backward repeats each of them on the same input.
    assert len(calls) == 8
    for forward in calls[:4]:
        (again,) = [c for c in calls[4:] if torch.equal(c[0], forward[0])]
        assert all(torch.equal(a.float(), b.float()) for a, b in zip(again, forward, strict=True))


def _record_fused_casts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, ...]]:
    """Input, values, scales and rho of every fused cast that runs on data."""
    calls: list[tuple[Tensor, ...]] = []
    original = norm_casts.mxnorm_cast

    def recorded(x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        outputs = original(x, *args, **kwargs)
        if type(x) is Tensor:
            calls.append((x.detach().clone(), *(t.detach().clone() for t in outputs)))
        return outputs

    monkeypatch.setattr(norm_casts, "mxnorm_cast", recorded)
    return calls


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::mxnorm_pass.MXNormWarning")
def test_the_rewrite_saves_nothing_that_checkpointing_drops() -> None:
    saved = []
    for quantize in ("norm-fed", "existing"):
        torch._dynamo.reset()
        model = build_llama().train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        with mxnorm_pass.record() as report:
            saved.append(_saved_activations(compiled(model, quantize=quantize), model))
        assert len(report.fused) == (4 if quantize == "norm-fed" else 0)
    assert saved[0] == saved[1]


def _saved_activations(run: Callable[..., Any], model: nn.Module) -> int:
    """Bytes that the forward keeps for the backward, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(IDS, labels=IDS, use_cache=False)
    return sum(kept.values())


# Steps


def steps(
    forward: Callable[..., Any], model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any
) -> list[Tensor]:
    """Losses of training with two micro-batches a step, and of an evaluation after each step."""
    losses = []
    for i, (first, second) in enumerate(batches):
        for ids in (first, second):
            loss = forward(ids, labels=ids, use_cache=False).loss / 2
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=i % 2 == 0)
        model.eval()
        with torch.no_grad():
            losses.append(forward(first, labels=first, use_cache=False).loss)
        model.train()
    return losses


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return list(torch.randint(0, 64, (count, 2, 2, 16), generator=generator))


@pytest.mark.full
def test_accumulation_steps_and_evaluation_follow_the_reference() -> None:
    """Bit for bit in bf16, where both sides make the same roundings."""
    model = build_llama(BF16, layers=1)
    reference = reference_of(model, Recipe())
    start = model.lm_head.weight.detach().clone()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (reference, model)]
    want = steps(reference, reference, optimizers[0], batches(3))
    with every_site_fused(layers=1, graphs=2) as report:
        got = steps(compiled(model), model, optimizers[1], batches(3))
    assert [g.name for g in report.graphs] == ["training_0", "inference_1"]
    assert torch.equal(torch.stack(got), torch.stack(want))
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(model.lm_head.weight, start)


@pytest.mark.full
@some(["model.compile"], in_place={"torch.compile": False, "model.compile": True})
def test_a_saved_run_continues_as_if_never_interrupted(in_place) -> None:
    def start() -> tuple[Any, nn.Module, torch.optim.Optimizer]:
        torch._dynamo.reset()
        model = build_llama(layers=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if not in_place:
            run = compiled(model)
            return run, run, optimizer
        model.compile(backend="mxnorm", options={"inner": "aot_eager"})
        return model, model, optimizer

    run, model, optimizer = start()
    steps(run, model, optimizer, batches(4)[:2])
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    want = steps(run, model, optimizer, batches(4)[2:])

    run, model, optimizer = start()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert saved["model"].keys() == model.state_dict().keys()
    plain = {name.removeprefix("_orig_mod."): value for name, value in saved["model"].items()}
    build_llama(layers=1).load_state_dict(plain)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    with every_site_fused(layers=1, graphs=2):
        got = steps(run, model, optimizer, batches(4)[2:])
    assert torch.equal(torch.stack(got), torch.stack(want))


@pytest.mark.full
def test_training_on_changing_batches_compiles_twice() -> None:
    model = build_llama(layers=1)
    reference = reference_of(model, Recipe())
    run = compiled(model)
    with every_site_fused(layers=1, graphs=2):
        for batch in (2, 3, 5):
            ids = token_ids(batch)
            results = []
            for forward, parameters in ((run, model), (reference, reference)):
                parameters.zero_grad()
                output = forward(ids, labels=ids, use_cache=False)
                output.loss.backward()
                results.append((output.logits, gradients_of(parameters)))
            (got, gradients), (want, want_gradients) = results
            assert torch.equal(got, want)
            assert_gradients_equal(gradients, want_gradients)


# Autocast


def test_autocast_around_an_fp32_model() -> None:
    """The cast reads what autocast rounds to bf16; the norm's input stays fp32."""
    model = build_llama()
    reference = reference_of(model, Recipe())
    with torch.autocast("cpu", BF16):
        with every_site_fused():
            got, gradients = train(compiled(model), model)
        assert_step_is_that_of(reference, got, gradients, BF16)
    assert {g.dtype for g in gradients.values()} == {F32}


# Parameters


FROZEN = [
    ("norm",),
    ("_proj",),
    ("q_proj", "up_proj"),
    ("embed_tokens",),
    ("embed_tokens", "layers.0.input_layernorm", "layers.0.self_attn"),
    ("embed_tokens", "lm_head", "_proj", "model.norm"),
]


@pytest.mark.full
@some(["norm", "q_proj+up_proj"], frozen={"+".join(names): names for names in FROZEN})
def test_frozen_parameters(frozen) -> None:
    model = build_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(word in name for word in frozen))
    reference = reference_of(model, Recipe())
    with every_site_fused():
        got, gradients = train(compiled(model), model)
    assert gradients
    assert_step_is_that_of(reference, got, gradients, F32)


@pytest.mark.full
def test_tied_embeddings_with_a_fused_head() -> None:
    model = build_llama(tie_word_embeddings=True)
    reference = reference_of(model, Recipe(head=True))
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model, modules={"lm_head": True}), model)
    sites = [*expected_sites(2), ("model.norm", ("lm_head",))]
    assert [(s.norm, s.consumers) for s in report.sites] == sites
    assert len(report.fused) == 5
    assert_step_is_that_of(reference, got, gradients, F32)


@pytest.mark.full
def test_one_layer_used_twice() -> None:
    model = build_llama()
    model.model.layers[1] = model.model.layers[0]
    reference = reference_of(model, Recipe())
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model), model)
    assert len(report.fused) == 4
    assert_step_is_that_of(reference, got, gradients, F32)


# PEFT


def lora_sites(adapters: bool) -> list[tuple[str, tuple[str, ...]]]:
    sites = []
    for norm, consumers in expected_sites(2):
        names: list[str] = []
        for name in (f"base_model.model.{c}" for c in consumers):
            wrapped = name.endswith(("q_proj", "v_proj", "up_proj"))
            names.append(f"{name}.base_layer" if wrapped else name)
            if wrapped and adapters:
                names.append(f"{name}.lora_A.default")
        sites.append((f"base_model.model.{norm}", tuple(names)))
    return sites


@pytest.mark.full
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora_adapters_that_are_off_read_the_exact_norm(dropout) -> None:
    model = with_lora(8, dropout)
    reference = reference_of(model, Recipe())
    torch.manual_seed(0)
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model, modules={"*.lora_*": False}), model)
    assert [(s.norm, s.consumers) for s in report.fused] == lora_sites(adapters=False)
    assert gradients and all(".lora_" in name for name in gradients)
    torch.manual_seed(0)
    assert_step_is_that_of(reference, got, gradients, F32)


@pytest.mark.full
def test_lora_adapters_that_are_named_are_fused() -> None:
    model = with_lora(32)
    reference = reference_of(model, Recipe(also=("lora_A",)))
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(model, modules={"*.lora_A.*": True}), model)
    assert [(s.norm, s.consumers) for s in report.fused] == lora_sites(adapters=True)
    assert_step_is_that_of(reference, got, gradients, F32)


# Trainers


@pytest.mark.full
def test_huggingface_trainer_on_a_compiled_model(tmp_path) -> None:
    """Bit for bit the loop below, which runs the reference model."""
    model = build_llama(BF16, layers=1, use_cache=False)
    reference = reference_of(model, Recipe())
    model.compile(backend="mxnorm", options={"inner": "aot_eager"})
    with every_site_fused(layers=1):
        seen = train_with_trainer(model, tmp_path)
    losses = repeat_by_hand(reference, seen)
    assert len(seen) == 3
    assert all(torch.equal(step.loss, want) for step, want in zip(seen, losses, strict=True))
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.full
def test_compiled_autograd_leaves_the_backward_as_it_is() -> None:
    """It hands the backward to the backend as a graph of its own, without names.

    The checkpointed layer is in it with its recomputed forward: q_proj must stay plain there too,
    and the matmuls of the backward must not be taken for linears.
    """
    options = {"inner": "aot_eager", "quantize": "all", "modules": {"*.q_proj": False}}
    model = build_llama(layers=1).train()
    reference = reference_of(model, Recipe(every_linear=True, off=("q_proj",)))
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def step(ids: Tensor) -> Tensor:
        output = model(ids, labels=ids, use_cache=False)
        output.loss.backward()
        return output.logits

    counters.clear()
    with torch._dynamo.config.patch(compiled_autograd=True), mxnorm_pass.record() as report:
        got = torch.compile(step, backend="mxnorm", options=options)(IDS).detach()
    assert counters["compiled_autograd"]["captures"] == 1
    assert [g.name for g in report.graphs] == ["training_0"]
    assert len(report.fused) == 2
    assert_step_is_that_of(reference, got, gradients_of(model), F32)


# One process of a distributed run


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.full
@pytest.mark.parametrize("optimize", [True, False], ids=["one bucket", "optimize_ddp off"])
def test_ddp(process_group, monkeypatch, optimize) -> None:
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 2**20 if optimize else 1000)
    model = build_llama(layers=1)
    reference = reference_of(model, Recipe())
    parallel = DistributedDataParallel(model, bucket_cap_mb=25 if optimize else 0.05)
    with torch._dynamo.config.patch(optimize_ddp=optimize), mxnorm_pass.record() as report:
        got, gradients = train(compiled(parallel), model)
    assert [(s.norm, s.consumers) for s in report.fused] == expected_sites(1)
    assert_step_is_that_of(reference, got, gradients, F32)


@pytest.mark.full
def test_ddp_in_buckets_keeps_names_and_bits(process_group, monkeypatch) -> None:
    """Dynamo cuts the graph at DDP's buckets, here between the linears that share a norm."""
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1000)
    model = convert_to_mxfp8_training(build_llama(layers=1))
    want, want_gradients = train(model, model)
    parallel = DistributedDataParallel(model, bucket_cap_mb=0.05)
    with mxnorm_pass.record() as report:
        got, gradients = train(compiled(parallel, estimator="exact"), model)
    sites = dict(expected_sites(1))
    assert len(report.graphs) > 2
    assert sorted(s.norm for s in report.sites) == sorted([*sites, "model.norm"])
    assert report.fused
    assert all(set(s.consumers) < set(sites[s.norm]) for s in report.fused)
    assert torch.equal(got, want)
    assert_gradients_equal(gradients, want_gradients)


@pytest.mark.full
def test_fully_sharded_layers_that_are_compiled_one_by_one(process_group) -> None:
    model = build_llama()
    reference = reference_of(model, Recipe())
    mesh = init_device_mesh("cpu", (1,))
    names = mxnorm_pass.compile_layers(model, "model.layers.*", options={"inner": "aot_eager"})
    for name in names:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)
    with mxnorm_pass.record() as report:
        got, shards = train(model, model)
    assert [(s.norm, s.consumers) for s in report.fused] == expected_sites(2)
    gradients = {name: shard.full_tensor() for name, shard in shards.items()}
    assert_step_is_that_of(reference, got, gradients, F32)
