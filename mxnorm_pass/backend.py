"""``torch.compile(model, backend="mxnorm")``: options in, a compiled callable out."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, cast

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import ShortenTraceback, TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mxnorm_pass import recording
from mxnorm_pass.announce import announce
from mxnorm_pass.config import MXNormConfig, ParsedOptions, parse_options
from mxnorm_pass.graph_pass import (
    DecomposeOps,
    LeaveAlone,
    MXNormPass,
    PassResult,
    foreign_subclass,
    source_digest,
)
from mxnorm_pass.graph_utils import aten, module_names, qualify_modules
from mxnorm_pass.inductor_e8m0 import cpu_e8m0_support

log = logging.getLogger("mxnorm_pass")

CompiledFunction = Callable[..., Any]


class InvalidOptionsError(ValueError, ShortenTraceback):
    """A ValueError that torch.compile hands to its caller as it is."""

    def __init__(self, message: str) -> None:
        ShortenTraceback.__init__(self, message, first_useful_frame=None)


def mxnorm(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledFunction:
    """The backend behind the entry point ``torch_dynamo_backends``.

    Args:
        gm: the graph that Dynamo captured.
        example_inputs: its inputs, as fake tensors.
        mode: Inductor's mode.
        options: fields of :class:`MXNormConfig` and Inductor config keys, in one flat dict.

    Raises:
        ValueError: an option is unknown or has a wrong value; the message names it.
    """
    job = CompileJob.of(gm, example_inputs, parse(options, mode))
    key = job.report_key()
    compiled = _INNER[job.config.inner](job)
    if job.is_backward:
        return compiled
    result = job.results[-1] if job.results else None
    if result is not None:
        recording.store(key, result)
    else:
        result = recording.load(key) or _retrace(job)
    if result is not None:
        announce(result, job.config, job.module_names)
    return compiled


def parse(options: Mapping[str, Any] | None, mode: str | None = None) -> ParsedOptions:
    """`parse_options` with errors that torch.compile hands to its caller as they are."""
    try:
        parsed = parse_options(options, mode)
    except ValueError as error:
        raise InvalidOptionsError(str(error)) from None
    if parsed.inductor.get("use_joint_graph_passes", True) is False:
        raise InvalidOptionsError(
            f"mode {mode!r} or options set use_joint_graph_passes=False, which turns off the "
            "Inductor stage that backend='mxnorm' works in; use another mode, or inner='aot_eager'"
        )
    return parsed


@dataclass
class CompileJob:
    """One call of the backend.

    Attributes:
        module_names: dotted names of the modules in the graph; ``modules`` selects by them.
        tensor_subclass: name of a subclass that the inputs have, torchao's aside.
        is_backward: compiled autograd captured the graph. The forward's compile has rewritten
            what is in it, which knows no module names and no forward from backward; it stays.
        results: what each run of the pass did; empty after a warm cache.
    """

    gm: fx.GraphModule
    example_inputs: Sequence[Any]
    options: ParsedOptions
    module_names: tuple[str, ...]
    tensor_subclass: str | None
    is_backward: bool
    results: list[PassResult] = field(default_factory=list)

    @classmethod
    def of(
        cls, gm: fx.GraphModule, example_inputs: Sequence[Any], options: ParsedOptions
    ) -> CompileJob:
        if options.config.prefix:
            qualify_modules(gm, options.config.prefix)
        subclass = foreign_subclass(example_inputs)
        return cls(gm, example_inputs, options, module_names(gm), subclass, _is_backward())

    @property
    def config(self) -> MXNormConfig:
        return self.options.config

    def graph_pass(self, decompositions: dict[Any, Any]) -> CustomGraphPass:
        if self.is_backward:
            return LeaveAlone()
        return MXNormPass(
            self.config,
            module_names=self.module_names,
            tensor_subclass=self.tensor_subclass,
            parameters=_parameter_positions(self.gm),
            on_result=self._accept,
            decompositions=decompositions,
        )

    def _accept(self, result: PassResult) -> None:
        _specialize(self.gm, result.eps_inputs)
        self.results.append(result)

    def report_key(self) -> str:
        """Hash of all that decides the result of the pass, computed before gm is consumed."""
        parts = (
            source_digest(),
            self.config.fingerprint(),
            sorted((k, repr(v)) for k, v in self.options.inductor.items()),
            self.module_names,
            self.tensor_subclass,
            self.gm.print_readable(print_output=False),
            [_describe(x) for x in self.example_inputs],
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES],
            _torchao_version(),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()


_DEVICES = ("cpu", "cuda")


def _torchao_version() -> str:
    try:
        return metadata.version("torchao")
    except metadata.PackageNotFoundError:
        return ""


def _is_backward() -> bool:
    compile_id = torch._guards.CompileContext.current_compile_id()
    return compile_id is not None and compile_id.compiled_autograd_id is not None


def _placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def _parameter_positions(gm: fx.GraphModule) -> frozenset[int]:
    """Which inputs of Dynamo's graph are parameters or buffers of a module."""
    static = "_dynamo_static_input_type"
    nodes = enumerate(_placeholders(gm))
    return frozenset(i for i, node in nodes if static in (node.meta.get("tensor_dict") or {}))


def _specialize(gm: fx.GraphModule, positions: Sequence[int]) -> None:
    """Have Dynamo start over with these Python floats as constants.

    Under ``dynamic=True`` Dynamo turns a norm's eps into a graph input. Inductor restarts Dynamo
    in this way for floats that it cannot hold in tensors
    (``torch/fx/passes/_tensorify_python_scalars.py``).
    """
    placeholders = _placeholders(gm)
    symbols = [name for i in positions for name in _float_symbols(placeholders[i])]
    new = [name for name in symbols if not TensorifyState.should_specialize(name)]
    for name in new:
        TensorifyState.specialize(name)
    if new:
        raise TensorifyScalarRestartAnalysis


def _float_symbols(placeholder: fx.Node) -> list[str]:
    values = [placeholder.meta.get("example_value")]
    values += [user.meta.get("example_value") for user in placeholder.users]
    return [str(v.node.expr) for v in values if isinstance(v, torch.SymFloat)]


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        layout = "" if is_traceable_wrapper_subclass(value) else tuple(value.stride())
        kind = type(value).__name__
        return f"{kind}{tuple(value.shape)}{layout}{value.dtype}{value.device}{value.requires_grad}"
    return repr(value)


def _compile_with_inductor(job: CompileJob) -> CompiledFunction:
    from torch._inductor import config as inductor_config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    ours = {
        "joint_custom_pre_pass": job.graph_pass(select_decomp_table()),
        "post_grad_custom_pre_pass": DecomposeOps(),
    }
    patches = dict(job.options.inductor)
    for name, graph_pass in ours.items():
        users = patches.get(name, getattr(inductor_config, name))
        patches[name] = PassSequence.of(users, graph_pass)
    compiled: Any = compile_fx(
        job.gm,
        job.example_inputs,
        inner_compile=cpu_e8m0_support()(compile_fx_inner),
        config_patches=patches,
    )
    return cast(CompiledFunction, compiled)


class PassSequence(CustomGraphPass):
    """A user's passes in an Inductor slot, then ours."""

    def __init__(self, passes: Sequence[Callable[[fx.Graph], None]]) -> None:
        self._passes = tuple(passes)

    @classmethod
    def of(cls, users: Any, ours: CustomGraphPass) -> CustomGraphPass:
        if users is None:
            return ours
        passes = users if isinstance(users, (list, tuple)) else (users,)
        return cls([*passes, ours])

    def __call__(self, graph: fx.Graph) -> None:
        for graph_pass in self._passes:
            graph_pass(graph)

    def uuid(self) -> Any:
        """None, which turns Inductor's cache off, if a user's pass cannot name itself."""
        uuids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self._passes]
        return None if None in uuids else tuple(uuids)


def _norm_decompositions() -> dict[Any, Any]:
    """Fused norm ops, which the matcher reads in their parts."""
    from torch._decomp import get_decompositions

    names = ("_fused_rms_norm", "_fused_rms_norm_backward")
    return get_decompositions([getattr(aten, n) for n in names if hasattr(aten, n)])


def _compile_with_aot(
    job: CompileJob, compiler: Callable[..., Any], decompositions: dict[Any, Any]
) -> CompiledFunction:
    graph_pass = job.graph_pass(decompositions)

    def rewritten(gm: fx.GraphModule) -> fx.GraphModule:
        graph_pass(gm.graph)
        gm.recompile()
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
    from torch._dynamo.backends.debugging import boxed_nop

    return _compile_with_aot(job, boxed_nop, _norm_decompositions())


def _compile_with_interpreter(job: CompileJob) -> CompiledFunction:
    return _compile_with_aot(job, _interpreted, _norm_decompositions())


def _interpreted(gm: fx.GraphModule, inputs: Any) -> CompiledFunction:
    """Run node by node, so that an error names the node and the model's source line."""
    interpreter = fx.Interpreter(gm)

    def run(args: list[Any]) -> Any:
        values = list(args)
        args.clear()
        return interpreter.run(*values)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


_INNER: dict[str, Callable[[CompileJob], CompiledFunction]] = {
    "inductor": _compile_with_inductor,
    "aot_eager": _compile_with_aot_eager,
    "eager": _compile_with_interpreter,
}


def trace_only(job: CompileJob) -> None:
    """Run AOTAutograd and the pass, with nothing compiled and no kernel run."""
    if job.config.inner == "inductor":
        from torch._inductor.decomposition import select_decomp_table

        decompositions = select_decomp_table()
    else:
        decompositions = _norm_decompositions()
    _compile_with_aot(job, lambda gm, inputs: _never_run, decompositions)


def _never_run(*args: Any) -> Any:
    raise AssertionError("a graph that was only traced must not run")


def _retrace(job: CompileJob) -> PassResult | None:
    """Recover the report of a compile that came from a cache that outlived it."""
    log.debug("warm compile cache without a stored report: tracing again")
    trace_only(job)
    return job.results[-1] if job.results else None
