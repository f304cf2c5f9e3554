"""Options and modes of torch.compile, split into this package's and Inductor's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from torch._inductor import list_mode_options

from mxnorm_pass.options.config import MXNormConfig
from mxnorm_pass.options.parse import parse_options

FIELDS = [f.name for f in dataclasses.fields(MXNormConfig)]


def options_error(options: Any, mode: Any = None) -> str:
    with pytest.raises(ValueError) as caught:
        parse_options(options, mode)
    return str(caught.value)


@pytest.mark.parametrize("options", [None, {}])
def test_no_options(options: Any) -> None:
    parsed = parse_options(options)
    assert parsed.config == MXNormConfig() and parsed.inductor == {}


def test_options_are_split_by_owner() -> None:
    options = {"p": 1, "max_autotune": True, "modules": {"a": False}, "triton.cudagraphs": True}
    parsed = parse_options(options)
    assert parsed.config == MXNormConfig(p=1, modules={"a": False})
    assert parsed.inductor == {"max_autotune": True, "triton.cudagraphs": True}


def test_inductor_keys_are_normalised_to_underscores() -> None:
    assert parse_options({"max-autotune": True}).inductor == {"max_autotune": True}


@pytest.mark.parametrize("freezing", [False, True])
def test_freezing_goes_to_both_only_if_true(freezing: bool) -> None:
    parsed = parse_options({"freezing": freezing})
    assert parsed.config.freezing is freezing
    assert parsed.inductor == ({"freezing": True} if freezing else {})


def test_a_bad_field_value_is_reported_as_the_field() -> None:
    assert "freezing=1" in options_error({"freezing": 1})
    assert "modules['a']['p']=0" in options_error({"modules": {"a": {"p": 0}}})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("estimater", "estimator"),
        ("P", "p"),
        ("quantise", "quantize"),
        ("scale-mode", "scale_mode"),
        ("elem_type", "elem_dtype"),
        ("module", "modules"),
        ("freeze", "freezing"),
        ("inner_compiler", "inner"),
        ("max_autotun", "max_autotune"),
        ("Max-Autotune-Gem", "max_autotune_gemm"),
        ("triton.cudagraph", "triton.cudagraphs"),
    ],
)
def test_an_unknown_key_gets_the_nearest_valid_one(key: str, nearest: str) -> None:
    message = options_error({key: True})
    assert f"{key!r}" in message and f"nearest valid one is {nearest!r}" in message


@pytest.mark.parametrize("key", ["", "zzzzzz", 3, None, ("p",)])
def test_a_hopeless_key_is_still_named_and_answered(key: Any) -> None:
    message = options_error({key: True})
    assert repr(key) in message and "nearest valid one is" in message
    assert all(name in message for name in FIELDS)


@pytest.mark.parametrize(
    ("key", "bad", "expected"),
    [
        ("max_autotune", "yes", "bool"),
        ("max-autotune", 1, "bool"),
        ("max_autotune", None, "bool"),
        ("triton.cudagraphs", "true", "bool"),
        ("max_fusion_size", 1.5, "int"),
        ("max_fusion_size", "64", "int"),
        ("max_autotune_subproc_result_timeout_seconds", "0.1", "float"),
        ("max_autotune_subproc_result_timeout_seconds", True, "float"),
        ("layout_opt_default", 1, "str"),
        ("max_autotune_gemm_search_space", 3, "str"),
        ("shape_padding", [], "bool"),
    ],
)
def test_a_wrongly_typed_inductor_value(key: str, bad: Any, expected: str) -> None:
    message = options_error({key: bad})
    assert f"options[{key!r}]={bad!r}" in message
    assert f"expected {expected}" in message and f"not {type(bad).__name__}" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_fusion_size", 8),
        ("max_autotune_subproc_result_timeout_seconds", 0.5),
        ("max_autotune_subproc_result_timeout_seconds", 1),
        ("post_grad_custom_post_pass", print),
        ("worker_log_path", "/tmp/log"),
        ("aten_distributed_optimizations.max_memory_increase_gb", 1),
        ("aten_distributed_optimizations.max_memory_increase_gb", None),
    ],
)
def test_well_typed_inductor_values_pass(key: str, value: Any) -> None:
    assert parse_options({key: value}).inductor == {key: value}


@pytest.mark.parametrize("mode", list(list_mode_options()))
def test_mode_is_translated_as_torch_does(mode: str) -> None:
    parsed = parse_options(None, mode)
    assert parsed.config == MXNormConfig() and parsed.inductor == list_mode_options(mode)


@pytest.mark.parametrize("key", ["max_autotune", "max-autotune"])
def test_explicit_options_win_over_the_mode(key: str) -> None:
    parsed = parse_options({key: False}, "max-autotune")
    assert parsed.inductor == {**list_mode_options("max-autotune"), "max_autotune": False}
    assert list_mode_options("max-autotune")["max_autotune"] is True


@pytest.mark.parametrize("mode", ["fast", "", 3, ["default"]])
def test_an_unknown_mode_names_the_allowed_ones(mode: Any) -> None:
    message = options_error(None, mode)
    assert f"mode={mode!r}" in message
    assert all(repr(known) in message for known in list_mode_options())


@pytest.mark.parametrize("bad", [[], "p=1", 1, False, [("p", 1)]])
def test_options_must_be_a_mapping(bad: Any) -> None:
    message = options_error(bad)
    assert f"options={bad!r}" in message and "mapping" in message
