"""examples/prepare_text.py: tokens hold the files, the same wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import prepare_text
import pytest
from checkpointlib import BadInput
from pretraining import damage, prepare, prepared, write_sources
from tokenizers import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A prepared text."""
    return prepared(tmp_path_factory.mktemp("text"))


def test_tokens_hold_the_files_and_the_hash_is_theirs(tmp_path) -> None:
    contents = write_sources(tmp_path / "a")
    (tmp_path / "a" / "again.py").write_bytes(contents[0])
    (tmp_path / "a" / "latin.py").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "a" / "left.txt").write_text("no program")
    facts = prepare(tmp_path / "a", tmp_path / "out", "--licence", "data=MIT")
    text = prepare_text.load_text(tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    found = []
    for part in (text.train, text.val):
        assert part.dtype == np.uint16
        decoded = tokenizer.decode(part.tolist(), skip_special_tokens=False)
        found.append(decoded.split(prepare_text.END)[:-1])
    digests = sorted(hashlib.sha256(content).digest() for content in contents)
    assert text.sha256 == facts.sha256 == hashlib.sha256(b"".join(digests)).hexdigest()
    assert sorted([*found[0], *found[1]]) == sorted(c.decode() for c in contents)
    assert found[0] and found[1]
    assert (facts.duplicates, facts.not_text) == (1, 1)
    assert facts.tokens == {"train": len(text.train), "val": len(text.val)}
    (source,) = facts.sources
    assert (source.licence, source.files, source.bytes) == ("MIT", 40, sum(map(len, contents)))
    assert str(tmp_path) not in (tmp_path / "out" / "provenance.json").read_text()


def test_the_same_files_give_the_same_tokens_wherever_they_lie(tmp_path, folder) -> None:
    for i, content in enumerate(reversed(write_sources(tmp_path / "a"))):
        (tmp_path / "b" / str(i)).mkdir(parents=True)
        (tmp_path / "b" / str(i) / "moved.py").write_bytes(content)
    prepare(tmp_path / "b", tmp_path / "out")
    files = [path.name for path in folder.iterdir()]
    assert len(files) == 4
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes(), name


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nowhere"], "no such folder: 'nowhere'"),
        (["--package", "no-such-package"], "no package 'no-such-package' is installed"),
        (["--package", "python", "--licence", "b=MIT"], "no such source; there are python"),
    ],
)
def test_sources_that_cannot_be(arguments: list[str], said: str, tmp_path, capsys) -> None:
    assert prepare_text.main([*arguments, "--pattern", "this.py", "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_too_little_text_says_which_vocabulary_it_gives(tmp_path, capsys) -> None:
    write_sources(tmp_path / "a", files=20)
    command = [str(tmp_path / "a"), "--vocab-size", "8192", "--held-out", "0.2"]
    assert prepare_text.main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "give more text or --vocab-size" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_missing_cut_or_damaged(tmp_path) -> None:
    with pytest.raises(BadInput, match="no prepared text in .*prepare_text.py"):
        prepare_text.load_text(tmp_path)
    write_sources(tmp_path / "a")
    prepare(tmp_path / "a", tmp_path / "out")
    train = tmp_path / "out" / "train.npy.xz"
    damage(train)
    with pytest.raises(BadInput, match="is damaged .*prepare_text.py anew"):
        prepare_text.load_text(tmp_path / "out")
    prepare_text.save_tokens(train, np.zeros(5, dtype=np.uint16))
    with pytest.raises(BadInput, match="are of two texts"):
        prepare_text.load_text(tmp_path / "out")
