"""Tell people what a run of the pass did: records, log, warnings."""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import fx
from torch._dynamo import exc
from torch._logging._internal import trace_structured

from mxnorm_pass.errors import CalibrationWarning, MXNormWarning
from mxnorm_pass.graph.source_line import source_line
from mxnorm_pass.names import UnmatchedPattern
from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.report import recording
from mxnorm_pass.report.linear import LinearCasts
from mxnorm_pass.report.reason import SkipReason
from mxnorm_pass.report.site import Graph, PassResult, Site, site_rows

log = logging.getLogger("mxnorm_pass")

_ORDER_UNKNOWN = MXNormWarning(
    "mxnorm: the calibration was fitted in an order of its own of the residual channels, and the "
    "weights in this graph do not tell which order they are in. If it was not applied, the result "
    "is wrong: mxnorm_pass.permute_channels(model, calibration.order)"
)

_SHOWN_NAMES = 3
_warned: set[tuple[str, ...]] = set()
_warned_lock = threading.Lock()


def announce(
    results: Sequence[PassResult],
    config: MXNormConfig,
    module_paths: Sequence[str],
    order_known: bool = True,
    elsewhere: Collection[str] = (),
    casts_weights: bool = False,
) -> None:
    """Report, log and warn of one compile; the same after a cold and a warm one.

    Args:
        results: one for each graph of the compile.
        order_known: could the channel order be compared with the calibration's?
        casts_weights: does each call cast the weights of which the results say so?
        elsewhere: modules that another graph of what is compiled may have.
    """
    recording.publish(results)
    for result in results:
        _log(result)
    sites = [site for result in results for site in result.sites]
    names = [name for result in results for name in result.matmul_modules]
    owner = (config.fingerprint(), *module_paths)
    is_inference = all(result.graph.name == "inference" for result in results)
    linears = [linear for result in results for linear in result.graph.linears]
    for warning in _warnings_of(sites, linears, names, config, is_inference, elsewhere):
        _warn_once(warning, owner)
    if casts_weights:
        _warn_of_weight_casts(results)
    if not order_known and any(site.calibration == "block weights" for site in sites):
        _warn_once(_ORDER_UNKNOWN, owner)


def _warn_of_weight_casts(results: Sequence[PassResult]) -> None:
    """Once for equal numbers: the layers of a model, or its graphs for several shapes."""
    for casts in {result.weight_casts for result in results if result.weight_casts.count}:
        sizes = (_megabytes(size) for size in (casts.read, casts.written))
        count = f"{casts.count} weight{'s are' if casts.count > 1 else ' is'}"
        warning = MXNormWarning(
            f"mxnorm: {count} cast at every call, which reads {next(sizes)} and writes "
            f"{next(sizes)}. Where weights do not change, cast them once: options={{'freezing': "
            "True}, or mxnorm_pass.convert(model) before it is compiled"
        )
        _warn_once(warning, ())


def _megabytes(size: int | None) -> str:
    return "an unknown number of bytes" if size is None else f"{size / 1e6:,.1f} MB"


def _log(result: PassResult) -> None:
    fused = sum(site.status == "fused" for site in result.sites)
    log.info(
        "%s graph: %d norms, %d fused, %d skipped, pass took %.3f s",
        result.graph.name,
        len(result.sites),
        fused,
        len(result.sites) - fused,
        result.seconds,
    )
    for site in result.sites:
        log.debug("%s", site)
    log.debug("before:\n%s\nafter:\n%s", result.graph.before, result.graph.after)
    _trace(result.graph)


def announce_unfrozen(names: Sequence[str]) -> None:
    """Warn of weights that ``freezing=True`` leaves as they are."""
    if names:
        shown = ", ".join(names[:_SHOWN_NAMES])
        more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
        warning = MXNormWarning(
            f"mxnorm: freezing=True leaves {shown}{more} as they are, so that they are cast at "
            "every call: tensors that were made under torch.inference_mode() do not tell when they "
            "are written to. Load the model outside of it"
        )
        _warn_once(warning, ())


def announce_failure(error: Exception, gm: fx.GraphModule) -> None:
    """Warn of an exception in the backend that Dynamo may swallow and run the code uncompiled.

    To be called where the exception goes on to Dynamo. What Dynamo raises speaks for itself.

    Args:
        gm: the graph that was to be compiled.
    """
    if isinstance(error, exc.RestartAnalysis):
        return
    if isinstance(error, exc.SkipFrame):
        cause, cure = "it asks Dynamo to leave the code alone", "find out who raises it"
    elif isinstance(error, exc.exceptions_allowed_to_be_fallback):
        cause = "Dynamo takes it for an op that cannot be compiled"
        cure = "compile with fullgraph=True, which raises the error with its traceback"
    elif torch._dynamo.config.suppress_errors:
        cause = "torch._dynamo.config.suppress_errors is set"
        cure = "unset that, and the error is raised with its traceback"
    else:
        return
    start = source_line(*gm.graph.nodes) or "an unknown line"
    said = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
    message = MXNormWarning(
        f"mxnorm: the graph that starts at {start} does not compile, and without fullgraph=True "
        "the code now runs as it is, with no norm fused and nothing cast. "
        f"{said}. Cause: {cause}. To do: {cure}"
    )
    warnings.warn(message, stacklevel=3)


def _trace(graph: Graph) -> None:
    """Artifacts of TORCH_TRACE, which tlparse shows beside Inductor's of the same compile."""
    _artifact("mxnorm_sites", "json", lambda: json.dumps(site_rows(graph), indent=1))
    _artifact("mxnorm_graph_before", "string", lambda: graph.before)
    _artifact("mxnorm_graph_after", "string", lambda: graph.after)


def _artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Nothing is computed where tracing is off; exported programs have no compile to belong to."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        expect_trace_id=False,
    )


def _warn_once(warning: MXNormWarning, owner: tuple[str, ...]) -> None:
    key = (str(warning), *owner)
    with _warned_lock:
        if key in _warned:
            return
        _warned.add(key)
    warnings.warn(warning, stacklevel=3)


def _warnings_of(
    sites: Sequence[Site],
    linears: Sequence[LinearCasts],
    matmul_modules: Sequence[str],
    config: MXNormConfig,
    is_inference: bool,
    elsewhere: Collection[str],
) -> Iterator[MXNormWarning]:
    yield from _last_compile(config)
    yield from _unmatched_patterns(sites, matmul_modules, config, elsewhere)
    yield from _unknown_to_calibration(sites)
    yield from _unknown_depth(linears)
    if not any(site.status == "fused" for site in sites):
        yield from _nothing_fused(sites, linears)
    elif is_inference:
        yield from _uncalibrated(sites)


def _last_compile(config: MXNormConfig) -> Iterator[MXNormWarning]:
    """Layers of one class run the same code, whose compiles Dynamo counts against one limit."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    number = compile_id.frame_compile_id if compile_id is not None else None
    limit = torch._dynamo.config.recompile_limit
    if config.prefix and number is not None and number + 1 >= limit and not _is_isolated():
        yield MXNormWarning(
            f"mxnorm: with {config.prefix!r} torch._dynamo.config.recompile_limit ({limit}) is "
            "reached; further modules of this class will run uncompiled. Compile them with "
            "torch.compile(..., isolate_recompiles=True) where torch has it, or raise the limit"
        )


def _is_isolated() -> bool:
    """Does the ``torch.compile`` call at work count its compiles apart from others?"""
    region = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_isolate_recompiles_id", None)
    return region is not None and region() >= 0


def _unmatched_patterns(
    sites: Sequence[Site],
    matmul_modules: Sequence[str],
    config: MXNormConfig,
    elsewhere: Collection[str],
) -> Iterator[MXNormWarning]:
    consumers = [name for site in sites for name in site.consumers]
    names = dict.fromkeys([*(site.norm for site in sites), *consumers, *matmul_modules])
    missing = config.patterns_without(elsewhere)
    for unmatched in config.unmatched_patterns(names):
        if unmatched.pattern not in missing:
            continue
        nearest = ", ".join(unmatched.nearest) or "none"
        yield MXNormWarning(
            f"mxnorm: the pattern {unmatched.pattern!r} in `modules` matches no norm and no "
            f"linear of this graph; nearest names: {nearest}{_prefix_hint(config, unmatched)}"
        )


def _prefix_hint(config: MXNormConfig, unmatched: UnmatchedPattern) -> str:
    first = {name.split(".")[0] for name in unmatched.nearest}
    if config.prefix or unmatched.pattern.split(".")[0] in first:
        return ""
    return (
        ". Names are relative to what is compiled. If that is a layer on its own, give its full "
        "name as options={'prefix': ...} or use mxnorm_pass.compile_layers"
    )


def _unknown_to_calibration(sites: Sequence[Site]) -> Iterator[MXNormWarning]:
    unknown = [site.norm for site in sites if site.calibration == "unknown"]
    if unknown:
        yield MXNormWarning(
            f"mxnorm: the calibration does not know {', '.join(unknown)}; they keep the exact RMS. "
            "Calibrate with the `modules` that you compile with, or say so: "
            "modules={...: {'estimator': 'exact'}}"
        )


def _unknown_depth(linears: Sequence[LinearCasts]) -> Iterator[MXNormWarning]:
    if any(linear.depth == "unknown" for linear in linears):
        yield MXNormWarning(
            "mxnorm: the recipe leaves a share of the first and last layers in high precision, but "
            "what is compiled here does not show how many layers there are, so that all are cast. "
            "Compile the whole model or use mxnorm_pass.compile_layers; or give the layer's full "
            "name and their number, options={'prefix': 'model.layers.3', 'num_layers': "
            "{'model.layers': 32}}. To choose layers by name, turn the shares off, recipe={'base': "
            "..., 'high_precision_first': 0, 'high_precision_last': 0}, and these layers' linears "
            "with `modules`"
        )


def _nothing_fused(
    sites: Sequence[Site], linears: Sequence[LinearCasts]
) -> Iterator[MXNormWarning]:
    reasons = {site.reason for site in sites if site.reason is not None}
    if reasons and reasons <= {SkipReason.DISABLED}:
        return
    if any(linear.depth == "kept" for linear in linears):
        return
    if reasons:
        why = "; ".join(sorted(f"{r.name}: {r.value}" for r in reasons))
    else:
        why = "it contains no RMSNorm"
    yield MXNormWarning(f"mxnorm: nothing to rewrite in this graph: {why}")


def _uncalibrated(sites: Sequence[Site]) -> Iterator[CalibrationWarning]:
    estimated = [s for s in sites if s.estimator == "mxnorm" and s.calibration != "block weights"]
    if not estimated:
        return
    yield CalibrationWarning(
        f"mxnorm: {len(estimated)} norms estimate their RMS without calibration. A checkpoint "
        "trained with RMSNorm has outlier channels that break the estimate and gives wrong "
        "text; use estimator='exact' for it, or mxnorm_pass.calibrate. For a "
        "model trained with MXNorm this is right: silence it with "
        "warnings.simplefilter('ignore', mxnorm_pass.CalibrationWarning)"
    )
