"""Make a pre-training text of folders of files, offline: a tokenizer of its own, and its tokens.

    python examples/prepare_text.py path/to/sources book=path/to/book --pattern '*.py' '*.txt' \\
        --licence book=CC-BY-4.0 --out build/text
    python examples/prepare_text.py --package python torch sympy --out build/text

Trains a byte-level BPE tokenizer, encodes every file, an end token behind each, and writes
``tokenizer.json``, ``train.npy.xz`` and ``val.npy.xz`` (uint16) and ``provenance.json``. Files of
equal content count once. A file's content decides alone where it goes: whether it is held out, and
its place in the order, so that the same files give the same tokens, wherever they lie.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import platform
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from benchlib import save_json
from checkpointlib import BadInput
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm

from mxnorm_pass.files import write_bytes, write_text

END = "<|end|>"
STANDARD_LIBRARY = "python"
TOKENIZER, PROVENANCE = "tokenizer.json", "provenance.json"
PARTS = ("train", "val")
# All bytes and the end token; ids must fit uint16.
_VOCAB_SIZES = range(257, 2**16 + 1)
_BATCH = 128


@dataclass(frozen=True)
class Source:
    """Files that belong together: a folder, or an installed package.

    Attributes:
        name: as provenance.json calls it; no path of this machine.
        licence: None: nobody said.
        files: relative name of each, and where it is.
    """

    name: str
    licence: str | None
    files: tuple[tuple[str, Path], ...]


@dataclass(frozen=True)
class Document:
    """A file that is used. ``digest`` is the SHA-256 of its bytes."""

    source: str
    name: str
    digest: bytes
    text: str

    def is_held_out(self, share: float) -> bool:
        return int.from_bytes(self.digest[:8], "big") < share * 2**64


@dataclass(frozen=True)
class Collected:
    """What the sources hold, in the order of the digests, and how many files were left out."""

    documents: tuple[Document, ...]
    duplicates: int
    too_large: int
    not_text: int

    @property
    def sha256(self) -> str:
        """Over the SHA-256 of each document, in their order."""
        return hashlib.sha256(b"".join(d.digest for d in self.documents)).hexdigest()


@dataclass(frozen=True)
class Used:
    """Of one source: the files that are in the text, and their bytes."""

    name: str
    licence: str | None
    files: int
    bytes: int


@dataclass(frozen=True)
class Provenance:
    """What provenance.json holds.

    Attributes:
        tokens: of each part.
        documents: of each part.
        duplicates: files left out, as are those that are too large and those that are no UTF-8.
        sha256: of the documents' contents, see :class:`Collected`.
    """

    sources: tuple[Used, ...]
    patterns: tuple[str, ...]
    vocab_size: int
    tokens: dict[str, int]
    documents: dict[str, int]
    duplicates: int
    too_large: int
    not_text: int
    sha256: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Text:
    """A prepared folder.

    Attributes:
        train: [tokens], uint16.
        val: [tokens], uint16, of documents that are not in ``train``.
        sha256: of the documents.
    """

    train: np.ndarray
    val: np.ndarray
    vocab_size: int
    sha256: str


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tokenize files for pre-training, offline.")
    parser.add_argument("folders", nargs="*", metavar="[NAME=]FOLDER")
    parser.add_argument(
        "--package",
        nargs="+",
        default=[],
        help=f"installed packages, with their licences; {STANDARD_LIBRARY}: its standard library",
    )
    parser.add_argument("--pattern", nargs="+", default=["*.py"], help="of file names")
    parser.add_argument("--licence", nargs="+", default=[], metavar="NAME=LICENCE")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--held-out", type=float, default=0.01, help="share of the documents")
    parser.add_argument("--largest-file", type=int, default=1_000_000, help="bytes")
    parser.add_argument(
        "--tokenizer-bytes",
        type=int,
        default=64_000_000,
        help="of how much text the tokenizer is trained",
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if not args.folders and not args.package:
        parser.error("give folders, or installed packages after --package")
    if args.vocab_size not in _VOCAB_SIZES:
        allowed = f"{_VOCAB_SIZES[0]} to {_VOCAB_SIZES[-1]}"
        parser.error(f"--vocab-size {args.vocab_size}: ids are uint16, so it can be {allowed}")
    if not 0 < args.held_out < 1:
        parser.error(f"--held-out {args.held_out}: give a share between 0 and 1, such as 0.01")
    return args


def find_sources(args: argparse.Namespace) -> list[Source]:
    """What the command line names, in its order.

    Raises:
        BadInput: no such folder or package, or a licence of none of them.
    """
    said = dict(named(entry, "--licence") for entry in args.licence)
    matches = matcher(args.pattern)
    sources = [folder_source(entry, matches) for entry in args.folders]
    sources += [package_source(name, matches) for name in args.package]
    names = [source.name for source in sources]
    for name in said:
        if name not in names:
            raise BadInput(f"--licence {name}=…: no such source; there are {', '.join(names)}")
    if len(set(names)) < len(names):
        raise BadInput(f"two sources have one name ({', '.join(names)}): give NAME=FOLDER")
    return [Source(s.name, said.get(s.name, s.licence), s.files) for s in sources]


def named(entry: str, option: str) -> tuple[str, str]:
    name, equals, value = entry.partition("=")
    if not (name and equals and value):
        raise BadInput(f"{option} {entry!r}: give NAME=VALUE")
    return name, value


def matcher(patterns: Sequence[str]) -> Callable[[str], bool]:
    return lambda name: any(fnmatch(name, pattern) for pattern in patterns)


def folder_source(entry: str, matches: Callable[[str], bool]) -> Source:
    name, folder = named(entry, "folder") if "=" in entry else ("", entry)
    root = Path(folder)
    if not root.is_dir():
        raise BadInput(f"no such folder: {folder!r}")
    files = tuple(files_below(root, matches))
    return Source(name or root.resolve().name, None, files)


def files_below(root: Path, matches: Callable[[str], bool]) -> Iterator[tuple[str, Path]]:
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if matches(path.name) and "site-packages" not in relative.parts and path.is_file():
            yield relative.as_posix(), path


def package_source(name: str, matches: Callable[[str], bool]) -> Source:
    """An installed distribution, or the standard library."""
    if name == STANDARD_LIBRARY:
        root = Path(sysconfig.get_path("stdlib"))
        version = sysconfig.get_python_version()
        return Source(f"{name} {version}", "PSF-2.0", tuple(files_below(root, matches)))
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise BadInput(
            f"no package {name!r} is installed: pip install it, or leave it out"
        ) from None
    files = [(f.as_posix(), Path(str(found.locate_file(f)))) for f in found.files or ()]
    kept = sorted((relative, path) for relative, path in files if matches(path.name))
    return Source(f"{name} {found.version}", licence_of(found.metadata), tuple(kept))


def licence_of(facts: Any) -> str | None:
    """Of a package's metadata; older packages have the whole text in one field."""
    expression, field = facts.get("License-Expression"), facts.get("License") or ""
    kinds = [c.rpartition(" :: ")[2] for c in facts.get_all("Classifier") or () if "License" in c]
    short = field if 0 < len(field) < 60 else None
    return expression or ", ".join(kinds) or short


def collect(sources: Iterable[Source], largest: int) -> Collected:
    """Every file once; the first source that holds a content has it.

    Raises:
        BadInput: a file cannot be read.
    """
    documents: dict[bytes, Document] = {}
    duplicates = too_large = not_text = 0
    for source in sources:
        for name, path in source.files:
            try:
                content = path.read_bytes()
            except OSError as error:
                raise BadInput(f"cannot read {name} of {source.name}: {error.strerror}") from None
            digest = hashlib.sha256(content).digest()
            if digest in documents:
                duplicates += 1
            elif len(content) > largest:
                too_large += 1
            elif (text := as_text(content)) is None:
                not_text += 1
            elif text:
                documents[digest] = Document(source.name, name, digest, text)
    ordered = tuple(documents[digest] for digest in sorted(documents))
    return Collected(ordered, duplicates, too_large, not_text)


def as_text(content: bytes) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def train_tokenizer(documents: Iterable[Document], vocab_size: int, limit: int) -> Tokenizer:
    """Byte-level BPE on the first ``limit`` bytes or so, so that no text is unknown to it.

    Raises:
        BadInput: the text has too few different words for so many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(first_bytes(documents, limit), trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise BadInput(
            f"the text gives {found} tokens, fewer than --vocab-size {vocab_size}: "
            f"give more text or --vocab-size {found}"
        )
    return tokenizer


def first_bytes(documents: Iterable[Document], limit: int) -> Iterator[str]:
    taken = 0
    for document in documents:
        if taken >= limit:
            return
        taken += len(document.text)
        yield document.text


def encode(tokenizer: Tokenizer, documents: Sequence[Document], title: str) -> np.ndarray:
    """[tokens], uint16: the documents one after another, an end token behind each."""
    end = tokenizer.token_to_id(END)
    parts: list[np.ndarray] = []
    with tqdm(total=len(documents), desc=title, unit="files", disable=None) as bar:
        for batch in batches(documents):
            for encoded in tokenizer.encode_batch_fast([d.text for d in batch]):
                parts.append(np.array([*encoded.ids, end], dtype=np.uint16))
            bar.update(len(batch))
    return np.concatenate(parts)


def batches(documents: Sequence[Document]) -> Iterator[Sequence[Document]]:
    return (documents[i : i + _BATCH] for i in range(0, len(documents), _BATCH))


def split(documents: Sequence[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Those to train on, and those held out.

    Raises:
        BadInput: one of the two is empty.
    """
    kept = [d for d in documents if not d.is_held_out(share)]
    held_out = [d for d in documents if d.is_held_out(share)]
    if not kept or not held_out:
        raise BadInput(
            f"of {len(documents)} different files {len(held_out)} would be held out "
            f"(--held-out {share}): both parts need one; give more files or another share"
        )
    return kept, held_out


def tokens_file(folder: Path, part: str) -> Path:
    return folder / f"{part}.npy.xz"


def save_tokens(path: Path, tokens: np.ndarray) -> None:
    """An .npy file in xz, which is smaller than what np.savez_compressed makes."""
    raw = io.BytesIO()
    np.lib.format.write_array(raw, tokens, allow_pickle=False)
    write_bytes(path, lzma.compress(raw.getvalue()))


def load_tokens(path: Path) -> np.ndarray:
    with lzma.open(path) as file:
        return np.lib.format.read_array(file)


def load_text(folder: Path) -> Text:
    """Read a folder that this script wrote.

    Raises:
        BadInput: there is none, or it is incomplete or damaged.
    """
    advice = "make it with examples/prepare_text.py"
    try:
        facts = json.loads((folder / PROVENANCE).read_text())
        train, val = (load_tokens(tokens_file(folder, part)) for part in PARTS)
        text = Text(train, val, facts["vocab_size"], facts["sha256"])
        expected = [facts["tokens"][part] for part in PARTS]
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise BadInput(
            f"no prepared text in {str(folder)!r} ({missing} is missing): {advice}"
        ) from None
    except (OSError, ValueError, KeyError, EOFError, lzma.LZMAError) as error:
        raise BadInput(f"the text in {str(folder)!r} is damaged ({error}): {advice} anew") from None
    if expected != [len(train), len(val)]:
        raise BadInput(f"the files in {str(folder)!r} are of two texts: {advice} anew")
    return text


def prepare(args: argparse.Namespace) -> Provenance:
    """Write the folder; provenance.json comes last and says that the others are complete.

    Raises:
        BadInput: the sources hold nothing to train on.
        OSError: the folder cannot be written.
    """
    sources = find_sources(args)
    collected = collect(sources, args.largest_file)
    documents = dict(zip(PARTS, split(collected.documents, args.held_out), strict=True))
    tokenizer = train_tokenizer(documents["train"], args.vocab_size, args.tokenizer_bytes)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / PROVENANCE).unlink(missing_ok=True)
    write_text(args.out / TOKENIZER, tokenizer.to_str())
    counts: dict[str, int] = {}
    for part in PARTS:
        tokens = encode(tokenizer, documents[part], part)
        save_tokens(tokens_file(args.out, part), tokens)
        counts[part] = len(tokens)
    facts = Provenance(
        sources=tuple(used(source, collected.documents) for source in sources),
        patterns=tuple(args.pattern),
        vocab_size=args.vocab_size,
        tokens=counts,
        documents={part: len(documents[part]) for part in PARTS},
        duplicates=collected.duplicates,
        too_large=collected.too_large,
        not_text=collected.not_text,
        sha256=collected.sha256,
        versions={
            "python": platform.python_version(),
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
    )
    save_json(args.out / PROVENANCE, asdict(facts))
    return facts


def used(source: Source, documents: Iterable[Document]) -> Used:
    own = [len(d.text.encode()) for d in documents if d.source == source.name]
    return Used(source.name, source.licence, len(own), sum(own))


def summary(facts: Provenance) -> str:
    lines = [f"{'':<28}{'files':>8}{'MB':>9}  licence"]
    lines += [
        f"{s.name:<28}{s.files:>8}{s.bytes / 1e6:>9.2f}  {s.licence or 'unknown'}"
        for s in facts.sources
    ]
    left_out = (
        f"{facts.duplicates} duplicates, {facts.too_large} too large, {facts.not_text} no text"
    )
    total = sum(s.bytes for s in facts.sources) / sum(facts.tokens.values())
    lines.append(f"left out: {left_out}")
    lines.append(
        f"tokens: {facts.tokens['train']:,} to train on, {facts.tokens['val']:,} held out; "
        f"{total:.2f} bytes each"
    )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    try:
        facts = prepare(args)
    except (BadInput, OSError) as error:
        print(f"prepare_text.py: {error}", file=sys.stderr)
        return 2
    print(summary(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
