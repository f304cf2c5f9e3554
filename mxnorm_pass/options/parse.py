"""``torch.compile``'s options, split into this package's and Inductor's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.options.inductor import check_inductor_value, inductor_key, invalid, mode_options
from mxnorm_pass.options.validate import VALIDATORS


@dataclass(frozen=True)
class ParsedOptions:
    """``torch.compile``'s options, split by owner.

    Attributes:
        config: the fields of this package.
        inductor: overrides for ``torch._inductor.config``, under Inductor's own spelling
            ("max_autotune", "triton.cudagraphs"); pass them on as ``config_patches``.
    """

    config: MXNormConfig
    inductor: dict[str, Any]


def parse_options(options: Mapping[str, Any] | None, mode: str | None = None) -> ParsedOptions:
    """Split ``torch.compile``'s flat options into this package's and Inductor's.

    Args:
        options: any field of ``MXNormConfig``, and any key of ``torch._inductor.config`` (nested
            ones as "triton.cudagraphs"; "-" and "_" are the same, as in torch). None is {}.
        mode: a name of ``torch._inductor.list_mode_options()``, or None. Explicit options win
            over the mode's.

    Returns:
        The config and Inductor's overrides. ``freezing`` belongs to both; it is among Inductor's
        only when True.

    Raises:
        ValueError: ``options`` is not a mapping; a key belongs to neither (the message names the
            nearest valid one); a value is wrong for its field or Inductor key; unknown ``mode``.
    """
    own: dict[str, Any] = {}
    inductor: dict[str, Any] = {}
    for key, value in [*mode_options(mode).items(), *_as_mapping(options).items()]:
        if isinstance(key, str) and key in VALIDATORS:
            own[key] = value
        else:
            spelled = inductor_key(key, VALIDATORS)
            check_inductor_value(key, spelled, value)
            inductor[spelled] = value
    config = MXNormConfig(**own)
    if config.freezing:
        inductor["freezing"] = True
    return ParsedOptions(config, inductor)


def _as_mapping(options: object) -> Mapping[Any, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise invalid("options", options, "a mapping from option name to value, or None")
    return options


def parse(options: Mapping[str, Any] | None, mode: str | None = None) -> ParsedOptions:
    """`parse_options` with errors that torch.compile hands to its caller as they are."""
    # Which imports Dynamo.
    from mxnorm_pass.errors import InvalidOptionsError

    try:
        parsed = parse_options(options, mode)
    except ValueError as error:
        raise InvalidOptionsError(str(error)) from None
    if parsed.config.inner == "inductor" and not inductor_setting(parsed, _JOINT_PASSES):
        raise InvalidOptionsError(
            f"mode {mode!r}, options or torch._inductor.config set {_JOINT_PASSES}=False, which "
            "turns off the Inductor stage that backend='mxnorm' works in; use another mode, or "
            "inner='aot_eager'"
        )
    return parsed


_JOINT_PASSES = "use_joint_graph_passes"


def inductor_setting(options: ParsedOptions, name: str) -> Any:
    """What holds during the compile: the options' value, else the global one."""
    from torch._inductor import config as inductor_config

    return options.inductor.get(name, getattr(inductor_config, name))
