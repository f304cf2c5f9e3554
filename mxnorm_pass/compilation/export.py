"""The pass as a function on an exported program, for graphs that torch.compile does not see."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.utils import _pytree as pytree

from mxnorm_pass.compilation.decompositions import export_decompositions
from mxnorm_pass.compilation.exported_autocast import as_exported
from mxnorm_pass.compilation.job import foreign_subclass
from mxnorm_pass.graph.build import CONSTANT_PREFIX, unwrap_constants
from mxnorm_pass.graph.inputs import mark_inputs
from mxnorm_pass.graph.modules import module_paths
from mxnorm_pass.graph.nodes import aten, prims
from mxnorm_pass.graph.weights import Weight, named_weights
from mxnorm_pass.names import clean_module_path
from mxnorm_pass.options.channel_order import check_channels
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.options.parse import parse_options
from mxnorm_pass.passes import lower
from mxnorm_pass.passes.joint import GraphFacts, run_pass
from mxnorm_pass.report.announce import announce

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def apply(
    exported_program: ExportedProgram,
    config: MXNormConfig | Mapping[str, Any] | None = None,
    *,
    decompose: bool = False,
) -> ExportedProgram:
    """Rewrite the RMSNorms of an exported program, as ``backend="mxnorm"`` does in torch.compile.

    ``torch.export.export(model, args)`` -> ``apply`` -> ``.module()``, ``torch.export.save``,
    ``torch.compile``, AOTInductor. Reports and warnings are those of the backend: open
    :func:`mxnorm_pass.record` around the call.

    The result is functional ATen, for inference: its parameters take no gradient. Composite ops
    are decomposed (``rms_norm`` must be seen in its parts) other than ``linear``, ``matmul`` and
    ``scaled_dot_product_attention``. The bodies of ``torch.cond`` and its like stay as they are.
    The dtypes are those that the program notes: of one that was exported under an autocast, the
    result holds the casts, and runs without it.
    The result shares weights and constants with the given program, which is not changed. Where
    nothing is rewritten it is a copy of the given program, with nothing decomposed.

    Args:
        exported_program: of ``torch.export``, before or after ``run_decompositions``.
        config: options of the rewrite, or a mapping of them; None for the defaults.
        decompose: write the ATen ops of this package's ops, ``mxnorm_pass::*``,
            into the program in their place, with the same bits. AOTInductor and other runtimes
            need it; a program with the ops loads only after ``import mxnorm_pass.ops``.

    Raises:
        TypeError: the program is no ExportedProgram, or ``config`` is none of the above.
        ValueError: an option is unknown, wrong or one for a compiler; the program has a backward
            or holds tensor subclasses other than torchao's.
    """
    _check_program(exported_program)
    options = _config(config)
    program = functional_program(exported_program)
    options = options.with_layers_of(_module_kinds(program))
    graph = program.graph
    mark_inputs(graph, _weight_names(program))
    order_known = True
    if options.calibration is not None:
        order_known = check_channels(options.calibration, program.state_dict)
    result = run_pass(graph, options, facts=GraphFacts(weights=_weights(program)))
    announce([result], options, module_paths(program.graph_module), order_known)
    decomposed = lower.decompose(graph, {}) if decompose else 0
    if not decomposed and result.graph.before == result.graph.after:
        copied = _copied(exported_program.graph_module)
        return _rebuilt(exported_program, copied, dict(exported_program.state_dict))
    _use_aten_casts(graph)
    program.constants.update(_lift_constants(program))
    graph.lint()
    _forget_broken_calls(program)
    return _rebuilt(program, program.graph_module, _without_grad(program.state_dict))


def _check_program(program: object) -> None:
    if not isinstance(program, ExportedProgram):
        raise TypeError(
            "mxnorm_pass.apply takes a torch.export.ExportedProgram, not "
            f"{type(program).__name__}: export the model first with "
            "torch.export.export(model, args), or compile it with "
            "torch.compile(model, backend='mxnorm')"
        )
    if program.graph_signature.backward_signature is not None:
        raise ValueError(
            "mxnorm_pass.apply takes a program for inference, and this one holds a backward: "
            "export the forward alone, or train with torch.compile(model, backend='mxnorm')"
        )
    subclass = foreign_subclass((*program.state_dict.values(), *program.constants.values()))
    if subclass is not None:
        raise ValueError(
            f"mxnorm_pass.apply takes a program of plain or torchao tensors, and this one holds "
            f"{subclass}s: export the model of one rank with its local tensors"
        )


def _config(config: MXNormConfig | Mapping[str, Any] | None) -> MXNormConfig:
    if isinstance(config, MXNormConfig):
        parsed, for_compilers = config, []
    elif config is None or isinstance(config, Mapping):
        options = parse_options(config)
        parsed, for_compilers = options.config, sorted(options.inductor)
    else:
        raise TypeError(
            f"config={config!r} is not valid: expected an MXNormConfig, a mapping of its fields "
            "or None"
        )
    own = ("inner", "freezing", "prefix")
    for_compilers += [n for n in own if getattr(parsed, n) != getattr(MXNormConfig, n)]
    if for_compilers:
        names = ", ".join(map(repr, dict.fromkeys(for_compilers)))
        raise ValueError(
            f"config sets {names}, and mxnorm_pass.apply compiles nothing: leave that out and give "
            "it to what compiles the returned program"
        )
    return parsed


def functional_program(program: ExportedProgram) -> ExportedProgram:
    """The program traced anew into functional ATen; module names and signature stay."""
    traceable = _rebuilt(program, _copied(program.graph_module), program.state_dict)
    for module in traceable.graph_module.modules():
        if isinstance(module, fx.GraphModule) and module is not traceable.graph_module:
            # The body of an autocast or no_grad region: run node by node, it keeps its names.
            module.forward = partial(_interpret, module)
    # To rebuild a structure such as a DynamicCache may take ops, which would be traced along.
    call, original = _call_signature(traceable), _call_signature(program)
    call.out_spec = pytree.tree_structure((0,) * original.out_spec.num_leaves)
    with as_exported(program.graph_module):
        functional: ExportedProgram = traceable.run_decompositions(export_decompositions())
    _call_signature(functional).out_spec = original.out_spec
    _drop_metadata_checks(functional.graph)
    return functional


def _interpret(module: fx.GraphModule, *args: Any) -> Any:
    return fx.Interpreter(module).run(*args)


def _call_signature(program: ExportedProgram) -> Any:
    return program.module_call_graph[0].signature


def _drop_metadata_checks(graph: fx.Graph) -> None:
    """Export notes the dtype in front of each ``to``: a reader to the matcher, and known here."""
    target = aten._assert_tensor_metadata.default
    for node in graph.find_nodes(op="call_function", target=target):
        graph.erase_node(node)


def _weight_names(program: ExportedProgram) -> frozenset[str]:
    specs = program.graph_signature.input_specs
    return frozenset(spec.arg.name for spec in specs if spec.kind in _WEIGHTS)


def _weights(program: ExportedProgram) -> dict[str, Weight]:
    """What the weights are called, by the name of the graph input."""
    tensors = {**program.constants, **program.state_dict}
    named = named_weights({n: t for n, t in tensors.items() if isinstance(t, torch.Tensor)})
    specs = program.graph_signature.input_specs
    return {spec.arg.name: named[spec.target] for spec in specs if spec.target in named}


def _module_kinds(program: ExportedProgram) -> dict[str, str]:
    """The class names of the modules that are called; "" of others that hold weights."""
    kinds = {clean_module_path(name.rpartition(".")[0]): "" for name in program.state_dict}
    for node in program.graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            name = getattr(kind, "__name__", str(kind))
            kinds[clean_module_path(path)] = name.rpartition(".")[2]
    return kinds


def _use_aten_casts(graph: fx.Graph) -> None:
    """The rewrite writes a prim, as Inductor's graphs do; exported programs hold ATen."""
    for node in graph.find_nodes(op="call_function", target=prims.convert_element_type.default):
        source, dtype = node.args
        node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": dtype}


def _lift_constants(program: ExportedProgram) -> dict[str, Any]:
    """A calibration's weights become inputs: an exported graph holds no constants."""
    from torch._export.passes.lift_constants_pass import ConstantAttrMap, lift_constants_pass

    module = program.graph_module
    unwrap_constants(program.graph)
    lifted: dict[str, Any] = lift_constants_pass(module, program.graph_signature, ConstantAttrMap())
    for name in [n for n, _ in module.named_buffers() if n.startswith(CONSTANT_PREFIX)]:
        delattr(module, name)
    return lifted


def _forget_broken_calls(program: ExportedProgram) -> None:
    """``preserve_module_call_signature`` ends for a module whose inputs or outputs are gone."""
    names = {node.name for node in program.graph.nodes}
    for entry in program.module_call_graph:
        call = entry.signature
        arguments = [*call.inputs, *call.outputs] if call is not None else []
        tensors = [a.name for a in arguments if isinstance(a, TensorArgument)]
        if entry.fqn and not names.issuperset(tensors):
            entry.signature = None


def _copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    copied = copy.deepcopy(graph_module)
    # fx gives another name to a node that is called as a builtin is, such as `input`.
    for node, original in zip(copied.graph.nodes, graph_module.graph.nodes, strict=True):
        node.name = original.name
    return copied


def _rebuilt(
    program: ExportedProgram, graph_module: fx.GraphModule, state_dict: dict[str, Any]
) -> ExportedProgram:
    return ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=state_dict,
        range_constraints=dict(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=dict(program.constants),
        verifiers=program.verifiers,
    )


def _without_grad(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The same storages, in parameters that autograd leaves alone; what is tied stays tied."""
    frozen = {
        id(value): nn.Parameter(value.detach(), requires_grad=False)
        for value in state_dict.values()
        if isinstance(value, nn.Parameter)
    }
    return {name: frozen.get(id(value), value) for name, value in state_dict.items()}
