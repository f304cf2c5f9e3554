"""A Calibration as a value and as a file."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mxnorm_pass.options.calibration import Calibration, architecture_hash

NAN, INFINITY = float("nan"), float("inf")


def weights(blocks: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(blocks, generator=torch.Generator().manual_seed(seed))


def calibration(**values: Any) -> Calibration:
    default: dict[str, Any] = {
        "weights": {"norm": weights(), "b.norm": weights(seed=1)},
        "exact": ("c.norm",),
        "p": 1.5,
        "order": torch.arange(63, -1, -1),
        "channels": {"norm.weight": torch.linspace(0, 1, 64)},
        "architecture": "abc",
    }
    return Calibration(**{**default, **values})


CHANGES: dict[str, dict[str, Any]] = {
    "weights": {"weights": {"norm": weights(), "b.norm": weights(seed=2)}},
    "names": {"weights": {"norm": weights(), "d.norm": weights(seed=1)}},
    "exact": {"exact": ()},
    "p": {"p": 2},
    "order": {"order": torch.arange(64)},
    "no order": {"order": None},
    "channels": {"channels": {}},
    "architecture": {"architecture": "abd"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_equality_is_by_content(change: str) -> None:
    one, same, other = calibration(), calibration(), calibration(**CHANGES[change])
    assert one == same and hash(one) == hash(same) and one.fingerprint() == same.fingerprint()
    assert one != other and one.fingerprint() != other.fingerprint()
    # torch.compile compares option dicts so.
    assert {"calibration": one} == {"calibration": same} != {"calibration": other}


def test_a_calibration_keeps_its_values() -> None:
    given = {"norm": weights(), "b.norm": weights(seed=1)}
    made = calibration(weights=given)
    fingerprint = made.fingerprint()
    given["norm"].zero_()
    given.clear()
    assert torch.equal(made.weights["norm"], weights()) and len(made.weights) == 2
    with pytest.raises(TypeError):
        made.weights["norm"] = weights()  # type: ignore[index]
    assert made.fingerprint() == calibration().fingerprint() == fingerprint


@pytest.mark.parametrize("again", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), replace])
def test_copies_are_equal(again: Any) -> None:
    assert again(calibration()) == calibration()


def test_what_one_site_depends_on() -> None:
    made = calibration()
    assert made.site_fingerprint("norm") == calibration(order=None).site_fingerprint("norm") != ""
    assert made.site_fingerprint("norm") != made.site_fingerprint("b.norm")
    assert made.site_fingerprint("norm") != calibration(p=2).site_fingerprint("norm")
    assert made.site_fingerprint("norm") != calibration(exact=("norm",)).site_fingerprint("norm")
    assert made.site_fingerprint("c.norm") != "" == made.site_fingerprint("other")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"weights": {"n": torch.tensor([1.0, -0.1])}}, r"weights\['n'\].*negative"),
    "NaN": ({"weights": {"n": torch.tensor([1.0, NAN])}}, r"weights\['n'\].*NaN"),
    "infinite": ({"weights": {"n": torch.tensor([1.0, INFINITY])}}, r"weights\['n'\].*infinite"),
    "all zero": ({"weights": {"n": torch.zeros(2)}}, r"weights\['n'\] are all 0"),
    "shape": ({"weights": {"n": torch.ones(1, 2)}}, r"weights\['n'\] has shape \(1, 2\)"),
    "no blocks": ({"weights": {"n": torch.ones(0)}}, r"weights\['n'\] has shape \(0,\)"),
    "integers": ({"weights": {"n": torch.ones(2, dtype=torch.long)}}, r"weights\['n'\].*float32"),
    "a list": ({"weights": {"n": [1.0, 2.0]}}, r"weights\['n'\].*float32 tensor"),
    "no mapping": ({"weights": torch.ones(2)}, "weights is .*mapping"),
    "a key": ({"weights": {1: torch.ones(2)}}, "the key 1"),
    "empty": ({"weights": {}, "exact": (), "order": None}, "empty"),
    "exact": ({"exact": "norm"}, "exact is 'norm'"),
    "exact number": ({"exact": (1,)}, r"exact is \(1,\)"),
    "p": ({"p": 0}, "p is 0"),
    "p NaN": ({"p": NAN}, "p is nan"),
    "block size": ({"block_size": 0}, "block_size is 0"),
    "duplicate": ({"order": torch.zeros(64, dtype=torch.long)}, "no permutation"),
    "out of range": ({"order": torch.arange(1, 65)}, "no permutation"),
    "order's dtype": ({"order": torch.arange(64.0)}, "int64"),
    "order's width": ({"order": torch.arange(96)}, "96 channels.*64"),
    "statistic": ({"channels": {"n": torch.tensor([NAN])}}, r"channels\['n'\].*NaN"),
    "architecture": ({"architecture": None}, "architecture is None"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_values_are_refused(name: str) -> None:
    values, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        calibration(**values)


def test_only_exact_norms() -> None:
    made = calibration(weights={}, order=None)
    assert made.exact == ("c.norm",) and not made.weights


def test_under_another_module() -> None:
    made = calibration().under("base_model.model")
    assert list(made.weights) == ["base_model.model.norm", "base_model.model.b.norm"]
    assert made.exact == ("base_model.model.c.norm",)
    assert list(made.channels) == ["base_model.model.norm.weight"]


# Files


@pytest.mark.parametrize("values", [{}, *CHANGES.values()], ids=["as it is", *CHANGES])
def test_a_file_gives_back_the_same(values: dict[str, Any], tmp_path: Path) -> None:
    made = calibration(**values)
    made.save(tmp_path / "c.safetensors")
    assert Calibration.load(tmp_path / "c.safetensors") == made
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    calibration().save(tmp_path / "c")
    assert torch.equal(load_file(tmp_path / "c")["weights/norm"], weights())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "c"
    calibration().save(path)

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        calibration(p=2).save(path)
    assert Calibration.load(path) == calibration()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_files_that_are_no_calibration(tmp_path: Path) -> None:
    path = tmp_path / "c"
    with pytest.raises(FileNotFoundError, match=str(path)):
        Calibration.load(path)
    calibration().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="is no calibration file"):
        Calibration.load(path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="without a calibration's header"):
        Calibration.load(path)
    header = {"version": 2}
    save_file({"a": torch.ones(1)}, path, {"mxnorm_pass.calibration": json.dumps(header)})
    with pytest.raises(ValueError, match="version 2, this program reads 1"):
        Calibration.load(path)


def test_loading_onto_a_model(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self, width: int = 64, hidden: int = 128) -> None:
            super().__init__()
            self.norm, self.linear = nn.RMSNorm(width), nn.Linear(width, hidden)

    path = tmp_path / "c"
    made = Calibration({"norm": weights()}, architecture=architecture_hash(Model()))
    made.save(path)
    assert Calibration.load(path, Model()) == made
    with pytest.raises(ValueError, match="'norm' has width 96 in the model, 64 in the calibration"):
        Calibration.load(path, Model(96))
    with pytest.raises(ValueError, match="the model has no 'norm'"):
        Calibration.load(path, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="its norms agree, but other parameters do not"):
        Calibration.load(path, Model(hidden=32))
