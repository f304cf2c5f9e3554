"""A real checkpoint, with its tokenizer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mxnorm_pass.cli.config_model import looks_like_path
from mxnorm_pass.cli.errors import UsageError, reason
from mxnorm_pass.cli.text import read_rows
from mxnorm_pass.extras import needs_extra

with needs_extra("hf", "a checkpoint"):
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
    from transformers.utils.logging import disable_progress_bar


def load(args: argparse.Namespace) -> tuple[PreTrainedModel, Tensor]:
    """The checkpoint in eval mode, and the text as rows of token ids, int64 [batches, tokens].

    Raises:
        UsageError: the checkpoint or its tokenizer cannot be loaded, or the text is too short.
    """
    if not sys.stderr.isatty():
        disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = _load(AutoTokenizer, args)
    rows = read_rows(
        args.text, _ids_of(tokenizer), tokens=args.tokens, rows=args.batches, skip=args.skip
    )
    model: PreTrainedModel = _load(AutoModelForCausalLM, args, dtype="auto")
    return model.train(False), rows


def _ids_of(tokenizer: Any) -> Callable[[str], Sequence[int]]:
    def tokenize(text: str) -> Sequence[int]:
        # Not verbose: the text is longer than the model's context and will be cut.
        ids: Sequence[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    return tokenize


def _load(auto_class: Any, args: argparse.Namespace, **kwargs: Any) -> Any:
    given = args.model
    path = Path(given).expanduser()
    if looks_like_path(given) and not path.is_dir():
        raise UsageError(f"--model {given!r} is no folder")
    gguf = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    try:
        return auto_class.from_pretrained(
            str(path) if path.is_dir() else given, local_files_only=True, **gguf, **kwargs
        )
    except Exception as error:  # whatever the loaders make of incomplete or foreign files
        raise UsageError(f"cannot load {given!r}: {reason(error)}") from None
