"""Behaviour of mxnorm_pass.options.config: validation, per-module rules, fingerprints."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import os
import pickle
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from example_counts import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

from mxnorm_pass.options.config import MXNormConfig, UnmatchedPattern

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2

DEFAULTS: dict[str, Any] = {
    "estimator": "mxnorm",
    "p": 2.0,
    "gain": "auto",
    "gradient": "true",
    "quantize": "norm-fed",
    "format": "mxfp8",
    "elem_dtype": E4M3,
    "scale_mode": "rceil",
    "tensor_scale": "bound",
    "recipe": None,
    "num_layers": {},
    "modules": {},
    "calibration": None,
    "inner": "inductor",
    "freezing": False,
    "prefix": "",
    "verify": False,
}
ALLOWED = {
    "estimator": ("mxnorm", "exact"),
    "gain": ("auto", "fold", "activation"),
    "gradient": ("true", "orthogonal", "paper"),
    "quantize": ("norm-fed", "existing", "all"),
    "format": ("mxfp8", "mxfp6", "mxfp6 e2m3", "mxfp6 e3m2", "mxfp4"),
    "scale_mode": ("rceil", "floor", "ceil", "even"),
    "tensor_scale": ("bound", "amax"),
    "inner": ("inductor", "aot_eager", "eager"),
}
OVERRIDABLE = (
    "estimator",
    "p",
    "gain",
    "gradient",
    "format",
    "elem_dtype",
    "scale_mode",
    "tensor_scale",
    "recipe",
)


def config(**values: Any) -> MXNormConfig:
    return MXNormConfig(**values)


def error_of(**values: Any) -> str:
    with pytest.raises(ValueError) as caught:
        config(**values)
    return str(caught.value)


def test_fields_and_defaults_are_those_of_the_contract() -> None:
    names = [f.name for f in dataclasses.fields(MXNormConfig)]
    assert {name: getattr(config(), name) for name in names} == DEFAULTS
    assert names == list(DEFAULTS)


def test_arguments_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        MXNormConfig("mxnorm")  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ALLOWED)
def test_choice_accepts_its_values_and_no_other(name: str) -> None:
    for value in ALLOWED[name]:
        assert getattr(config(**{name: value}), name) == value
    bad: Any
    for bad in ("nope", ALLOWED[name][0].upper(), "", None, True, 1, [], ALLOWED[name]):
        message = error_of(**{name: bad})
        assert f"{name}={bad!r}" in message
        assert all(repr(value) in message for value in ALLOWED[name])


@pytest.mark.parametrize("value", [1, 2, 0.5, 1e-300, 1e300])
def test_p_is_stored_as_float(value: float) -> None:
    p = config(p=value).p
    assert p == value and type(p) is float


@pytest.mark.parametrize(
    "bad", [0, -1, -0.0, float("nan"), float("inf"), True, "2", None, 10**400, 2j]
)
def test_p_rejects(bad: Any) -> None:
    assert f"p={bad!r} is not valid: expected a finite int or float greater than 0" == error_of(
        p=bad
    )


def test_elem_dtype() -> None:
    assert config(elem_dtype=E5M2).elem_dtype is E5M2
    for bad in (torch.float8_e4m3fnuz, torch.bfloat16, "float8_e4m3fn", None):
        message = error_of(elem_dtype=bad)
        assert f"elem_dtype={bad!r}" in message
        assert str(E4M3) in message and str(E5M2) in message


def test_format_of_inserted_casts() -> None:
    assert config().cast_format.name == "mxfp8 e4m3fn rceil block 32"
    assert config(elem_dtype=E5M2).cast_format.name == "mxfp8 e5m2 rceil block 32"
    assert config(format="mxfp4", scale_mode="even").cast_format.name == "mxfp4 e2m1 even block 32"
    assert config(format="mxfp6 e3m2").cast_format.name == "mxfp6 e3m2 rceil block 32"
    assert config(format="nvfp4").cast_format.name == "nvfp4 e2m1 nearest block 16"
    message = error_of(format="nvfp4", scale_mode="even")
    assert "scale_mode='even'" in message and "no powers of two" in message
    message = error_of(modules={"m": {"format": "nvfp4", "scale_mode": "even"}})
    assert "modules['m']['scale_mode']='even'" in message
    floors = config(scale_mode="floor", modules={"m": {"format": "nvfp4"}})
    assert floors.resolve("m").config.cast_format.name == "nvfp4 e2m1 nearest block 16"


def test_format_and_elem_dtype_must_agree() -> None:
    expected = "is not valid: expected none beside format='mxfp4': it is of 'mxfp8' alone"
    assert error_of(format="mxfp4", elem_dtype=E5M2) == f"elem_dtype={E5M2!r} {expected}"
    rule = {"format": "mxfp4", "elem_dtype": E5M2}
    message = error_of(modules={"a": rule})
    assert message == f"modules['a']['elem_dtype']={E5M2!r} {expected}"


def test_of_format_and_elem_dtype_a_rule_replaces_either() -> None:
    base = config(elem_dtype=E5M2, modules={"a": {"format": "mxfp6"}, "b": {"p": 1}})
    assert base.resolve("a").config.cast_format.name == "mxfp6 e2m3 rceil block 32"
    assert base.resolve("b").config.cast_format.name == "mxfp8 e5m2 rceil block 32"
    base = config(format="mxfp4", modules={"a": {"elem_dtype": E5M2}, "b": {"p": 1}})
    assert base.resolve("a").config.cast_format.name == "mxfp8 e5m2 rceil block 32"
    assert base.resolve("b").config.cast_format.name == "mxfp4 e2m1 rceil block 32"


@pytest.mark.parametrize("bad", [0, 1, None, "False"])
def test_freezing_rejects_what_is_not_a_bool(bad: Any) -> None:
    assert error_of(freezing=bad) == f"freezing={bad!r} is not valid: expected True or False"


@pytest.mark.parametrize("bad", [None, [], "a", [("a", True)]])
def test_modules_must_be_a_mapping(bad: Any) -> None:
    message = error_of(modules=bad)
    assert f"modules={bad!r}" in message and "mapping" in message


@pytest.mark.parametrize("bad", ["", 3, None, ("a",)])
def test_module_pattern_must_be_a_non_empty_string(bad: Any) -> None:
    message = error_of(modules={bad: True})
    assert f"modules has the key {bad!r}" in message and "non-empty str" in message


@pytest.mark.parametrize(
    ("pattern", "reason"), [("re:(a", "unterminated subpattern"), ("re:*", "nothing to repeat")]
)
def test_module_regex_must_compile(pattern: str, reason: str) -> None:
    message = error_of(modules={pattern: True})
    assert "modules" in message and repr(pattern) in message and reason in message


def test_a_bad_regex_without_the_prefix_is_a_fine_glob() -> None:
    assert not config(modules={"(a": False}).resolve("(a").enabled


@pytest.mark.parametrize("bad", [None, 1, 0, "no", ["p"]])
def test_module_rule_must_be_a_bool_or_a_dict(bad: Any) -> None:
    message = error_of(modules={"m.*": bad})
    assert f"modules['m.*']={bad!r}" in message
    assert "True, False or a dict" in message


@pytest.mark.parametrize(
    "name", ["quantize", "modules", "calibration", "inner", "freezing", "q", 5]
)
def test_module_rule_overrides_only_what_is_overridable(name: Any) -> None:
    message = error_of(modules={"m.*": {name: DEFAULTS.get(name)}})
    assert "modules['m.*']" in message and repr(name) in message
    assert message.endswith("one of " + ", ".join(OVERRIDABLE))


@pytest.mark.parametrize(
    ("name", "bad", "allowed"),
    [
        ("estimator", "rms", "'exact'"),
        ("p", -1, "greater than 0"),
        ("gain", 1, "'fold'"),
        ("gradient", "fake", "'orthogonal'"),
        ("format", "mxfp5", "'mxfp6 e3m2'"),
        ("elem_dtype", torch.float16, "torch.float8_e5m2"),
        ("scale_mode", "round", "'even'"),
        ("scale_mode", "rceil-log2", "'rceil'"),
    ],
)
def test_module_override_is_validated_like_the_field(name: str, bad: Any, allowed: str) -> None:
    message = error_of(modules={"ok": True, "m.*": {name: bad}})
    assert f"modules['m.*'][{name!r}]={bad!r}" in message and allowed in message


def test_overrides_apply_to_the_base_config() -> None:
    overrides = {
        "estimator": "exact",
        "p": 1,
        "gain": "fold",
        "gradient": "paper",
        "format": "mxfp8",
        "elem_dtype": E5M2,
        "scale_mode": "even",
        "tensor_scale": "amax",
        "recipe": None,
    }
    base = config(quantize="all", modules={"m.*": overrides})
    resolved = base.resolve("m.norm")
    assert resolved.enabled
    assert {name: getattr(resolved.config, name) for name in OVERRIDABLE} == overrides
    assert resolved.config.quantize == "all"
    assert type(resolved.config.p) is float


def test_no_match_true_and_false() -> None:
    base = config(p=3, modules={"a": False, "b": True, "c": {}})
    assert [base.resolve(name).enabled for name in "abcd"] == [False, True, True, True]
    assert all(base.resolve(name).config == base for name in "abcd")


def test_last_match_wins_entirely() -> None:
    base = config(modules={"*": {"p": 1, "gain": "fold"}, "m.*": {"gradient": "paper"}})
    winner = base.resolve("m.norm").config
    assert (winner.p, winner.gain, winner.gradient) == (2.0, "auto", "paper")
    assert base.resolve("n.norm").config.p == 1.0


def test_order_decides() -> None:
    assert config(modules={"*": False, "m.*": True}).resolve("m.n").enabled
    assert not config(modules={"m.*": True, "*": False}).resolve("m.n").enabled


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("layers.?.norm", "layers.1.norm", True),
        ("layers.?.norm", "layers.11.norm", False),
        ("layers.[12].norm", "layers.2.norm", True),
        ("layers", "layers.1", False),
        ("norm", "model.norm", False),
        ("model.*", "Model.norm", False),
        ("re:norm", "model.norm", False),
        ("re:layers", "layers.1", False),
        (r"re:layers\.\d+\.norm", "layers.11.norm", True),
        (r"re:layers\.\d+\.norm", "layersx11.norm", False),
        ("re:a|ab", "ab", True),
        ("re.norm", "re.norm", True),
    ],
)
def test_pattern_matches_the_full_name(pattern: str, name: str, matches: bool) -> None:
    assert config(modules={pattern: False}).resolve(name).enabled is not matches


@pytest.mark.parametrize("head", ["lm_head", "output"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_head_is_disabled_unless_named(head: str, prefix: str) -> None:
    name = prefix + head

    def enabled(**modules: Any) -> bool:
        return config(modules=modules).resolve(name).enabled

    assert not enabled()
    for unnamed in (
        "*",
        "re:.*",
        f"*{head[1:]}",
        f"*{head[:-1]}?",
        f"re:.*{head[:-1]}[{head[-1]}]",
    ):
        assert not enabled(**{unnamed: True})
        assert not enabled(**{unnamed: {"p": 1}})
    for named in (name, f"*{head}", f"re:.*{head}", f"re:.*(norm|{head})"):
        assert enabled(**{named: True})
        assert enabled(**{named: {"p": 1}})
        assert not enabled(**{named: False})


def test_only_the_winning_rule_can_name_the_head() -> None:
    assert not config(modules={"lm_head": True, "*": True}).resolve("lm_head").enabled
    assert config(modules={"*": True, "lm_head": True}).resolve("lm_head").enabled
    assert not config(modules={"output": True}).resolve("lm_head").enabled


@pytest.mark.parametrize("name", ["output.dense", "lm_head.norm", "my_lm_head", "output_norm"])
def test_the_head_rule_is_about_the_last_component_only(name: str) -> None:
    assert config().resolve(name).enabled


NAME_PARTS = st.sampled_from(["a", "b", "0", "1", "norm", "lm_head", "output"])
NAMES = st.lists(NAME_PARTS, min_size=1, max_size=3).map(".".join)
PATTERNS = st.one_of(
    st.lists(st.one_of(NAME_PARTS, st.sampled_from(["*", "?"])), min_size=1, max_size=3).map(
        ".".join
    ),
    st.lists(st.one_of(NAME_PARTS, st.sampled_from([".*", r"\d", "(a|b)"])), min_size=1, max_size=3)
    .map(r"\.".join)
    .map("re:".__add__),
)
RULES = st.one_of(st.booleans(), st.fixed_dictionaries({"p": st.integers(1, 9)}))


def reference_resolve(modules: dict[str, Any], name: str) -> tuple[bool, float]:
    enabled, p, named = True, 2.0, False
    for pattern, rule in modules.items():
        if pattern.startswith("re:"):
            hit = re.fullmatch(pattern[3:], name) is not None
        else:
            hit = fnmatch.fnmatchcase(name, pattern)
        if hit:
            enabled = rule is not False
            p = rule["p"] if isinstance(rule, dict) else 2.0
            named = name.split(".")[-1] in pattern
    if name.split(".")[-1] in ("lm_head", "output") and not named:
        enabled = False
    return enabled, p


@settings(max_examples=examples(200), deadline=None)
@given(modules=st.dictionaries(PATTERNS, RULES, max_size=5), names=st.lists(NAMES, max_size=6))
def test_resolve_agrees_with_the_naive_reference(modules: dict[str, Any], names: list[str]) -> None:
    base = config(modules=modules)
    for name in [*names, *names]:
        resolved = base.resolve(name)
        assert (resolved.enabled, resolved.config.p) == reference_resolve(modules, name)


def test_resolve_answers_a_repeated_name_from_its_cache() -> None:
    base = config(modules={"m.*": {"p": 1}})
    assert base.resolve("m.a") is base.resolve("m.a")
    assert base.resolve("m.a").config is base.resolve("m.b").config


def test_unmatched_patterns_offer_near_names() -> None:
    names = ["model.layers.0.input_layernorm", "model.layers.0.mlp.up_proj", "model.norm"]
    base = config(
        modules={
            "model.norm": True,
            "model.layer.0.input_layernorm": False,
            "*": True,
            r"re:model\.layers\.0\.mlp\.up_prj": False,
            "zzz": False,
        }
    )
    glob, regex, hopeless = base.unmatched_patterns(iter(names))
    assert glob.pattern == "model.layer.0.input_layernorm" and glob.nearest[0] == names[0]
    assert regex.pattern.startswith("re:") and regex.nearest[0] == names[1]
    assert hopeless.pattern == "zzz" and len(hopeless.nearest) == 1
    assert hopeless.nearest[0] in names


def test_unmatched_patterns_offer_at_most_three_distinct_names() -> None:
    names = [f"layers.{i}.norm" for i in range(9)] * 2
    (unmatched,) = config(modules={"layer.0.norm": False}).unmatched_patterns(names)
    assert len(set(unmatched.nearest)) == len(unmatched.nearest) == 3


def test_escapes_of_a_regex_do_not_count_against_a_near_name() -> None:
    names = ["a.x.c.e", "a.y.c.e"]
    (unmatched,) = config(modules={r"re:a\.b\.c\.d": False}).unmatched_patterns(names)
    assert sorted(unmatched.nearest) == names


def test_a_shadowed_pattern_is_not_unmatched() -> None:
    assert config(modules={"norm": True, "*": False}).unmatched_patterns(["norm"]) == []


def test_without_names_every_pattern_is_unmatched() -> None:
    unmatched = config(modules={"*": True}).unmatched_patterns([])
    assert unmatched == [UnmatchedPattern("*", ())]


DISTINCT: list[dict[str, Any]] = [
    {},
    {"estimator": "exact"},
    {"p": 1},
    {"p": 2.0000000000000004},
    {"gain": "fold"},
    {"gradient": "paper"},
    {"quantize": "all"},
    {"elem_dtype": E5M2},
    {"scale_mode": "even"},
    {"inner": "eager"},
    {"freezing": True},
    {"modules": {"a": True}},
    {"modules": {"a": False}},
    {"modules": {"re:a": False}},
    {"modules": {"a": {"p": 1}}},
    {"modules": {"a": {"elem_dtype": E5M2}}},
    {"modules": {"a": True, "b": False}},
    {"modules": {"b": False, "a": True}},
]


def test_fingerprint_tells_every_field_apart() -> None:
    configs = [config(**values) for values in DISTINCT]
    assert all(re.fullmatch(r"[0-9a-f]{64}", c.fingerprint()) for c in configs)
    assert len({c.fingerprint() for c in configs}) == len(set(configs)) == len(DISTINCT)


def test_equal_configs_share_fingerprint_equality_and_hash() -> None:
    for values in DISTINCT:
        one, two = config(**values), config(**copy.deepcopy(values))
        assert one.fingerprint() == two.fingerprint()
        assert one == two and hash(one) == hash(two)
    assert config(p=2) == config(p=2.0)
    assert config(modules={"a": {"p": 1, "gain": "fold"}}) == config(
        modules={"a": {"gain": "fold", "p": 1.0}}
    )
    assert config() != "config"


@pytest.mark.full
def test_fingerprint_does_not_depend_on_the_process() -> None:
    program = (
        "import torch; from mxnorm_pass.options.config import MXNormConfig as C; "
        "print(C(p=3, elem_dtype=torch.float8_e5m2, "
        "modules={'a': {'p': 1, 'gain': 'fold'}, 'b': False}).fingerprint())"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    printed = [process.communicate()[0].strip() for process in processes]
    here = config(p=3, elem_dtype=E5M2, modules={"a": {"p": 1, "gain": "fold"}, "b": False})
    assert printed == [here.fingerprint()] * 2


def test_config_is_immutable_and_detached_from_the_callers_dicts() -> None:
    modules: dict[str, Any] = {"a": {"p": 1}}
    base = config(modules=modules)
    before = base.fingerprint()
    modules["a"]["p"] = 7
    modules["b"] = False
    assert base.resolve("a").config.p == 1.0 and base.resolve("b").enabled
    assert base.fingerprint() == before == config(modules={"a": {"p": 1}}).fingerprint()
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.p = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        base.modules["b"] = False  # type: ignore[index]
    with pytest.raises(TypeError):
        base.modules["a"]["p"] = 3  # type: ignore[index]


def test_config_survives_pickle_deepcopy_and_replace() -> None:
    base = config(modules={"a": {"p": 1}, "b": False}, elem_dtype=E5M2)
    base.resolve("a")
    for clone in (pickle.loads(pickle.dumps(base)), copy.deepcopy(base)):
        assert clone == base and clone.resolve("a") == base.resolve("a")
    assert dataclasses.replace(base, p=5).resolve("b").config.p == 5.0


def test_importing_the_module_leaves_inductor_alone() -> None:
    program = (
        "import sys, torch; before = set(sys.modules); "
        "import mxnorm_pass.options.config as c; from mxnorm_pass.options import parse; "
        "c.MXNormConfig(modules={'a': {'p': 1}}).resolve('a'); parse.parse_options({'p': 1}); "
        "new = set(sys.modules) - before; "
        "assert not [m for m in new if m.startswith('torch')], new; "
        "ours = {m for m in new if m.startswith('mxnorm_pass.')}; "
        "folders = {m.split('.')[1] for m in ours}; "
        "assert folders == {'options', 'numerics', 'names', 'files', 'extras'}, ours"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
