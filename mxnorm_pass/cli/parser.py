"""The arguments of each command; imports nothing heavy, so that help comes at once."""

from __future__ import annotations

import argparse
from pathlib import Path

import mxnorm_pass

_EXIT_CODES = """\
exit codes:
  0  done, whether norms were fused or skipped
  1  the model could not be traced or run; Python's traceback says where
  2  wrong arguments, or a package that is not installed: the last line on stderr says which,
     and no file was written
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mxnorm_pass",
        description="What MXNorm does to a model, without a script of your own.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"mxnorm_pass {mxnorm_pass.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (summary, add_arguments) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add_arguments(command)
    return parser


def _explain(parser: argparse.ArgumentParser) -> None:
    known = "config.json, checkpoint folder, or hub id in the local cache"
    parser.add_argument(
        "--model", required=True, metavar="CONFIG_OR_PATH", help=f"{known}; weights are not read"
    )
    parser.add_argument("--train", action="store_true", help="trace the backward, too")
    _options(parser)
    parser.add_argument("--tokens", type=_positive, default=128, help="row length (%(default)s)")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the weights; by default the config's, else bfloat16",
    )
    parser.add_argument(
        "--layers",
        type=_positive,
        metavar="N",
        help="only the first N layers (of the encoder, where there is a decoder, too)",
    )
    parser.add_argument(
        "--unquantized", action="store_true", help="leave out the config's quantization_config"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the report as one page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")


def _compare(parser: argparse.ArgumentParser) -> None:
    _checkpoint_and_text(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the comparison as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the plot of the ratios")


def _calibrate(parser: argparse.ArgumentParser) -> None:
    _checkpoint_and_text(parser)
    parser.add_argument(
        "--max-loss-increase",
        type=float,
        default=0.02,
        metavar="X",
        help="relative to the loss with the exact RMS (%(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="calibration.safetensors"
    )


def _reasons(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("reason", nargs="*", metavar="REASON", help="only these; all by default")


def _checkpoint_and_text(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="PATH",
        help="checkpoint folder with its tokenizer, or hub id in the local cache",
    )
    parser.add_argument("--gguf-file", metavar="F", help="GGUF file inside the checkpoint folder")
    parser.add_argument(
        "--text", required=True, nargs="+", type=Path, metavar="FILE", help="UTF-8 text"
    )
    parser.add_argument("--tokens", type=_positive, default=512, help="row length (%(default)s)")
    parser.add_argument("--batches", type=_positive, default=8, help="rows used (%(default)s)")
    parser.add_argument(
        "--skip",
        type=_not_negative,
        default=0,
        metavar="N",
        help="rows left out at the start of the text, such as those of a calibration",
    )
    _options(parser)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--options",
        default="{}",
        metavar="JSON",
        help="options of torch.compile(backend='mxnorm') as a JSON object, or @FILE that holds "
        'one; dtypes by name: {"elem_dtype": "float8_e5m2"}',
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


# argparse names the converter in "invalid int value".
_positive.__name__ = _not_negative.__name__ = "int"

_COMMANDS = {
    "explain": ("report what would be fused, from a model's config alone", _explain),
    "compare": ("compare a checkpoint's loss with and without the estimate", _compare),
    "calibrate": ("fit the estimate to a checkpoint and save the result", _calibrate),
    "reasons": ("say why norms are skipped: each reason with its cause and cure", _reasons),
}
