"""``python -m mxnorm_pass``: reports from a config alone, and what it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import models
from paths import EXAMPLES
from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
from torchao.quantization import quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig

import mxnorm_pass
from mxnorm_pass import Report
from mxnorm_pass.cli import main
from mxnorm_pass.cli.errors import UsageError
from mxnorm_pass.cli.text import read_rows
from mxnorm_pass.options.calibration import Calibration

CONFIGS = EXAMPLES / "configs"
TOKENS = 32


@pytest.fixture
def tiny(tmp_path) -> str:
    """A Llama's config.json."""
    return save_config(models.build("Llama").config, tmp_path, "LlamaForCausalLM")


def save_config(config: Any, folder: Path, architecture: str | None) -> str:
    config.architectures = [architecture] if architecture else None
    config.save_pretrained(folder)
    return str(folder / "config.json")


def explain(model: str, *args: str) -> int:
    return main(["explain", "--model", model, "--tokens", str(TOKENS), *args])


def report_of(path: Path) -> Report:
    return Report.from_json(path.read_text())


def explained(model: torch.nn.Module, train: bool = False) -> Report:
    """The reference: the same class with weights, on a CPU."""
    torch._dynamo.reset()
    ids = torch.zeros((1, TOKENS), dtype=torch.long)
    with torch.set_grad_enabled(train):
        return mxnorm_pass.explain(model.train(train), input_ids=ids, use_cache=False)


def assert_same(got: Report, want: Report) -> None:
    assert got.sites == want.sites
    assert [g.name for g in got.graphs] == [g.name for g in want.graphs]
    for a, b in zip(got.graphs, want.graphs, strict=True):
        assert (a.ops_before, a.ops_after) == (b.ops_before, b.ops_after)


@pytest.mark.full
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Mixtral"])
def test_report_is_that_of_the_model_with_weights(name, tmp_path, capsys) -> None:
    model = models.build(name)
    path = save_config(model.config, tmp_path, type(model).__name__)
    out = tmp_path / "report.json"
    assert explain(path, "--dtype", "float32", "--json", str(out)) == 0
    want = explained(model)
    assert len(want.fused) > 0
    assert_same(report_of(out), want)
    assert capsys.readouterr().out == f"{want}\n"


@pytest.mark.full
def test_training_report_is_that_of_the_model_with_weights(tiny, tmp_path) -> None:
    out = tmp_path / "report.json"
    assert explain(tiny, "--train", "--dtype", "float32", "--json", str(out)) == 0
    want = explained(models.build("Llama"), train=True)
    assert want.graphs[0].name.startswith("training")
    assert_same(report_of(out), want)


@pytest.mark.full
def test_quantised_config_is_explained_with_its_casts(tmp_path) -> None:
    config = models.build("Llama").config
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    how = MXDynamicActivationMXWeightConfig()
    model.config.quantization_config = TorchAoConfig(how)
    path = save_config(model.config, tmp_path, "LlamaForCausalLM")
    out = tmp_path / "report.json"
    assert explain(path, "--dtype", "bfloat16", "--json", str(out)) == 0
    # transformers leaves the head alone.
    quantize_(model.model, how)
    want = explained(model)
    assert {site.gain for site in want.fused} == {"activation"}
    assert_same(report_of(out), want)
    torch._dynamo.reset()
    assert explain(path, "--unquantized", "--json", str(out)) == 0
    assert {site.gain for site in report_of(out).fused} == {"fold"}


def test_options_layers_and_dtypes_reach_the_trace(tiny, tmp_path) -> None:
    options = tmp_path / "options.json"
    options.write_text('{"modules": {"*.mlp.*": {"elem_dtype": "float8_e5m2"}}}')
    out, page = tmp_path / "report.json", tmp_path / "report.html"
    outputs = ["--json", str(out), "--html", str(page)]
    assert explain(tiny, "--layers", "1", "--options", f"@{options}", *outputs) == 0
    formats = {site.norm: site.format for site in report_of(out).sites}
    assert formats == {
        "model.layers.0.input_layernorm": "mxfp8 e4m3fn rceil block 32",
        "model.layers.0.post_attention_layernorm": "mxfp8 e5m2 rceil block 32",
        "model.norm": None,
    }
    assert "bf16[" in report_of(out).graphs[0].before
    assert page.read_text().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == [
        "config.json", "options.json", "report.html", "report.json"
    ]  # fmt: skip


def test_layers_cut_lists_of_layers_and_nested_configs(tmp_path) -> None:
    from transformers import Gemma3Config

    from mxnorm_pass.cli.config_model import load_config

    config = Gemma3Config(text_config={"num_hidden_layers": 7})
    path = save_config(config, tmp_path, None)
    text = load_config(path, layers=3, unquantized=False).get_text_config()
    assert text.num_hidden_layers == 3
    assert text.layer_types == config.text_config.layer_types[:3]


WRONG = {
    "no such path": (["--model", "./nowhere"], "'./nowhere' does not exist; give a config.json"),
    "not in the cache": (["--model", "some-owner/no-model"], "nor in the local cache; give a"),
    "not JSON": (["--options", "{"], "--options '{' is not JSON: Expecting property name"),
    "no object": (["--options", "[1]"], "--options '[1]' is not a JSON object"),
    "a key twice": (["--options", '{"p": 1, "p": 2}'], "the key 'p' is there twice"),
    "no file": (["--options", "@nowhere.json"], "cannot read 'nowhere.json': No such file"),
    "unknown option": (["--options", '{"pp": 1}'], "options has the key 'pp', which is neither"),
    "wrong value": (["--options", '{"p": -1}'], "p=-1 is not valid: expected a finite"),
    "no such dtype": (
        ["--options", '{"elem_dtype": "float9"}'],
        "elem_dtype='float9' is not valid: expected one of torch.float8_e4m3fn",
    ),
    "no such folder": (["--html", "nowhere/a.html"], "cannot write into 'nowhere': No such file"),
    "a folder": (["--json", "."], "--json '.' is there and is no file"),
    "no folder": (["--json", f"{__file__}/a.json"], "Not a directory"),
    "same file": (["--json", "a", "--html", "./a"], "--html and --json name the same file"),
    "more layers": (["--layers", "9"], "--layers 9: the model has only 2"),
    "more tokens": (["--tokens", "999999"], "--tokens 999999: the model has only"),
}


@pytest.mark.parametrize("args, message", WRONG.values(), ids=WRONG)
def test_wrong_arguments(args, message, tiny, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert explain(tiny, *args) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("python -m mxnorm_pass explain: error: ")
    assert message in error and len(error.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


BAD_CONFIGS: dict[str, tuple[dict[str, Any] | list[int], str]] = {
    "no model": ({}, "is not a JSON object"),
    "a list": ([1], "is not a JSON object"),
    "no type": ({"hidden_size": 64}, "has model_type None, which transformers"),
    "own code": (
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}},
        "does not have; it needs code from its repository, which is not run here",
    ),
    "own class": ({"model_type": "llama", "architectures": ["MyLlama"]}, "names 'MyLlama', which"),
    "wrong type": ({"model_type": "llama", "hidden_size": "wide"}, "is no valid llama config"),
    "wrong sizes": ({"model_type": "llama", "vocab_size": -1}, "cannot build LlamaForCausalLM"),
    "no language model": ({"model_type": "pixtral"}, "the config names no `architectures`"),
    "other inputs": (
        {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]},
        "takes input_features; only models of input_ids or pixel_values",
    ),
    "quantised": (
        {"model_type": "llama", "num_hidden_layers": 1, "quantization_config": {}}
        | {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quantized by 'gptq' cannot be explained; --unquantized explains",
    ),
}


@pytest.mark.parametrize("values, message", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_configs_that_cannot_be_explained(values, message, tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert explain(str(tmp_path)) == 2
    assert message in capsys.readouterr().err


def test_architectures_decide_the_class(tmp_path, capsys) -> None:
    path = save_config(models.build("Llama").config, tmp_path, "LlamaForSequenceClassification")
    assert explain(path, "--layers", "1") == 0
    assert "found score, a linear" in capsys.readouterr().out


@pytest.mark.full
def test_vision_and_encoder_decoder_models(tmp_path, capsys) -> None:
    for name, norms in (("Pixtral (vision)", 3), ("T5", 10)):
        torch._dynamo.reset()
        model = models.build(name)
        path = save_config(model.config, tmp_path, type(model).__name__)
        assert explain(path, "--layers", "1") == 0
        # A graph for each piece where Dynamo breaks (2.11 in T5); no linear reads its last norm.
        counts = re.findall(r": ([1-9]\d*) norms, (\d+) fused", capsys.readouterr().out)
        assert len(counts) == 1 or torch.__version__ < "2.13"
        assert sum(int(n) for n, _ in counts) == norms
        assert sum(int(fused) for _, fused in counts) == norms - len(counts)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mxnorm_pass", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_help_version_and_bad_syntax_without_torch() -> None:
    alone, helped, version, unknown = (
        run(), run("explain", "--help"), run("--version"), run("explain", "--layers", "0")
    )  # fmt: skip
    assert alone.returncode == helped.returncode == version.returncode == 0
    assert "explain" in alone.stdout and "exit codes:" in helped.stdout
    assert version.stdout == f"mxnorm_pass {mxnorm_pass.__version__}\n"
    assert unknown.returncode == 2
    assert "Traceback" not in unknown.stderr and "0 is not positive" in unknown.stderr


@pytest.mark.full
def test_process_refuses_without_traceback(tmp_path) -> None:
    done = run("explain", "--model", str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "has no config.json" in done.stderr


@pytest.mark.full
def test_llama_3_8b_fits_a_laptop() -> None:
    """All layers at full width; the weights alone would take 16 GB."""
    command = [sys.executable, "-m", "mxnorm_pass", "explain", "--model"]
    with subprocess.Popen(
        [*command, str(CONFIGS / "llama-3-8b.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        out = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert out.startswith("mxnorm: inference_0: 65 norms, 64 fused, 1 skipped\n")
    # ru_maxrss is in KiB on Linux, in bytes on macOS.
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert peak < 4e9
    assert usage.ru_utime + usage.ru_stime < 120


def test_llama_3_70b_config(capsys) -> None:
    assert main(["explain", "--model", str(CONFIGS / "llama-3-70b.json"), "--layers", "1"]) == 0
    assert " 3 norms, 2 fused, 1 skipped" in capsys.readouterr().out


def characters(text: str) -> list[int]:
    return [ord(c) for c in text]


def test_rows_are_cut_in_order_and_without_overlap(tmp_path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("abcde")
    second.write_text("fghijk")
    rows = read_rows([first, second], characters, tokens=3, rows=2, skip=1)
    assert rows.dtype == torch.int64
    assert ["".join(map(chr, row)) for row in rows.tolist()] == ["def", "ghi"]


@pytest.mark.parametrize("skip", [0, 1])
def test_text_that_is_too_short(skip, tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a" * (3 * (2 + skip) - 1))
    with pytest.raises(UsageError, match=f"{3 * (2 + skip) - 1} tokens, 2 rows of 3.*need"):
        read_rows([path], characters, tokens=3, rows=2, skip=skip)
    path.write_text("a" * 3 * (2 + skip))
    assert read_rows([path], characters, tokens=3, rows=2, skip=skip).shape == (2, 3)


def test_text_that_cannot_be_read(tmp_path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(UsageError, match="No such file"):
        read_rows([path], characters, tokens=1, rows=1)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UsageError, match="is not UTF-8"):
        read_rows([path], characters, tokens=1, rows=1)


WORDS = "abcdefgh"
# 80 words, no two rows alike.
TEXT = [WORDS[(i * i // 3 + i) % len(WORDS)] for i in range(80)]


def ids_of(words: list[str]) -> list[int]:
    return [WORDS.index(word) for word in words]


@pytest.fixture
def checkpoint(tmp_path) -> list[str]:
    """The arguments that name a small checkpoint with a tokenizer of words, and a text."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(tokenizer_models.WordLevel({w: i for i, w in enumerate(WORDS)}, WORDS[0]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "checkpoint"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token=WORDS[0]).save_pretrained(folder)
    models.build("Llama").save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(TEXT))
    sizes = ["--tokens", str(TOKENS), "--batches", "2"]
    return ["--model", str(folder), "--text", str(text), *sizes]


@pytest.mark.full
def test_calibrate_and_compare(checkpoint, tmp_path, capsys) -> None:
    """They say what the functions say that they stand for, given the same rows."""
    out, table, plot = (tmp_path / name for name in ("c.safetensors", "c.json", "c.png"))
    assert main(["calibrate", *checkpoint, "--out", str(out), "--max-loss-increase", "9"]) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 4 norms on block weights, 0 exact\n")
    options = json.dumps({"calibration": str(out)})
    outputs = ["--json", str(table), "--plot", str(plot), "--options", options]
    assert main(["compare", *checkpoint, *outputs]) == 0
    model = AutoModelForCausalLM.from_pretrained(checkpoint[1])
    rows = torch.tensor([ids_of(TEXT[i : i + TOKENS]) for i in (0, TOKENS)])
    batches = [{"input_ids": row, "labels": row} for row in rows.split(1)]
    calibration = mxnorm_pass.calibrate(model, batches, None, 9)
    assert Calibration.load(out) == calibration
    if calibration.order is not None:
        mxnorm_pass.permute_channels(model, calibration.order)
    batch = {"input_ids": rows, "labels": rows}
    want = mxnorm_pass.compare(model, batch, {"calibration": calibration})
    assert capsys.readouterr().out.endswith(f"{want}\n")
    assert table.read_text() == want.to_json()
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.full
def test_what_compare_and_calibrate_refuse(checkpoint, tmp_path, capsys) -> None:
    wrong = (
        (["--batches", "9"], "--text has 80 tokens, 9 rows of 32 need 288"),
        (["--model", str(tmp_path)], "cannot load"),
        (["--model", "./nowhere"], "is no folder"),
        (["--out", "nowhere/c"], "cannot write into 'nowhere'"),
        (["--batches", "1"], "needs at least 2"),
    )
    for args, message in wrong:
        assert main(["calibrate", *checkpoint, "--out", str(tmp_path / "c"), *args]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "c").exists()
    assert main(["compare", *checkpoint, "--options", '{"modules": {"*": false}}']) == 2
    assert "compare: error: " in capsys.readouterr().err
