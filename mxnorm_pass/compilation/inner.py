"""What compiles the graph that the passes rewrite: Inductor, AOTAutograd, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from mxnorm_pass.compilation.decompositions import norm_decompositions, trace_decompositions
from mxnorm_pass.compilation.e8m0_on_cpu import cpu_e8m0_support
from mxnorm_pass.compilation.freezing import FrozenGraph, attribute_of
from mxnorm_pass.compilation.frozen_weights import FrozenWeights, ShareCasts
from mxnorm_pass.compilation.inductor_passes import LowerOps
from mxnorm_pass.compilation.job import CompileJob
from mxnorm_pass.compilation.run_graph import Interpreter, run_graph
from mxnorm_pass.options.parse import ParsedOptions, inductor_setting
from mxnorm_pass.report.announce import announce_unfrozen

CompiledFunction = Callable[..., Any]
# Slots for passes: behind the joint graph's own, in front of the post-grad graph's own.
_LAST_JOINT, _FIRST_POST_GRAD = "joint_custom_post_pass", "post_grad_custom_pre_pass"


def is_frozen(options: ParsedOptions) -> bool:
    """Are weights part of the code that Inductor makes?"""
    return bool(inductor_setting(options, "freezing")) and not torch.is_grad_enabled()


def _compile_with_inductor(job: CompileJob) -> CompiledFunction:
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    frozen = FrozenGraph.of(job.gm, job.example_inputs) if is_frozen(job.options) else None
    read, share = FrozenWeights(), dict[str, Any]()
    if frozen is not None:
        unfrozen = (i for i in frozen.without_version if i in job.weights)
        announce_unfrozen([job.weights[i].names[0] for i in unfrozen])
        inputs = frozen.select(job.example_inputs)
        weights = {attribute_of(i): weight for i, weight in job.weights.items()}
        job = replace(job, gm=frozen.gm, example_inputs=inputs, weights=weights)
        names = {attribute: weight.names[0] for attribute, weight in weights.items()}
        casts = ShareCasts(frozen.gm, names, read)
        share = {
            _LAST_JOINT: job.with_users_passes(_LAST_JOINT, casts),
            # Else a tensor's scale is a number in the code, which no write reaches, and which
            # Inductor's cache gives to every model of the same graph.
            "always_keep_tensor_constants": True,
        }
    patches = {
        **job.options.inductor,
        **share,
        "joint_custom_pre_pass": job.joint_pass(select_decomp_table()),
        _FIRST_POST_GRAD: job.with_users_passes(_FIRST_POST_GRAD, LowerOps()),
    }
    compiled: Any = compile_fx(
        job.gm,
        job.example_inputs,
        inner_compile=cpu_e8m0_support()(compile_fx_inner),
        config_patches=patches,
    )
    return cast(CompiledFunction, compiled if frozen is None else frozen.wrap(compiled, read))


def _compile_with_aot(
    job: CompileJob, compiler: Callable[..., Any], decompositions: dict[Any, Any]
) -> CompiledFunction:
    graph_pass = job.joint_pass(decompositions)

    def rewritten(gm: fx.GraphModule) -> fx.GraphModule:
        for module in [m for m in gm.modules() if isinstance(m, fx.GraphModule)]:
            graph_pass(module.graph)
            module.recompile()
        return gm

    def partition(gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
        return min_cut_rematerialization_partition(rewritten(gm), joint_inputs, **kwargs)

    def inference(gm: fx.GraphModule, inputs: Any) -> Any:
        return compiler(rewritten(gm), inputs)

    compiled: CompiledFunction = aot_autograd(
        fw_compiler=compiler,
        bw_compiler=compiler,
        inference_compiler=inference,
        partition_fn=partition,
        decompositions=decompositions,
        keep_inference_input_mutations=True,
    )(job.gm, job.example_inputs)
    return compiled


def _compile_with_aot_eager(job: CompileJob) -> CompiledFunction:
    return _compile_with_aot(job, run_graph, norm_decompositions())


def compile_with_interpreter(
    job: CompileJob, interpreter: Interpreter = fx.Interpreter
) -> CompiledFunction:
    """Run node by node, so that an error names the node and the model's source line."""
    run = partial(run_graph, interpreter=interpreter)
    return _compile_with_aot(job, run, norm_decompositions())


INNER: dict[str, Callable[[CompileJob], CompiledFunction]] = {
    "inductor": _compile_with_inductor,
    "aot_eager": _compile_with_aot_eager,
    "eager": compile_with_interpreter,
}


def trace_only(job: CompileJob) -> None:
    """Run AOTAutograd and the pass, with nothing compiled and no kernel run."""
    _compile_with_aot(job, lambda gm, inputs: _never_run, trace_decompositions(job.config))


def _never_run(*args: Any) -> Any:
    raise AssertionError("a graph that was only traced must not run")
