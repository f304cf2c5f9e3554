"""Which versions trace which recorded graph."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).parent
GRAPHS, INDEX = HERE / "graphs", HERE / "index.json"


@dataclass(frozen=True)
class Recording:
    """What one case traces to under one table of decompositions.

    Attributes:
        text: None where the installed packages have nothing to record; ``missing`` says why.
    """

    case: str
    decompositions: str
    text: str | None
    missing: str = ""

    @property
    def name(self) -> str:
        return f"{self.case}.{self.decompositions}"


def installed() -> str:
    """The versions that decide a spelling, such as "torch 2.13, torchao 0.18"."""
    names = ("torch", "torchao")
    return ", ".join(f"{n} {'.'.join(metadata.version(n).split('.')[:2])}" for n in names)


@dataclass
class Index:
    """The recorded graphs.

    Attributes:
        graphs: file name, "<case>.<decompositions>.<number>.py" -> versions that trace it.
        missing: "<case>.<decompositions>" -> versions that have nothing to trace -> why.
    """

    graphs: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)

    @classmethod
    def load(cls) -> Index:
        return cls(**json.loads(INDEX.read_text())) if INDEX.exists() else cls()

    def save(self) -> None:
        entries = {
            "graphs": {k: sorted(v) for k, v in sorted(self.graphs.items())},
            "missing": {k: dict(sorted(v.items())) for k, v in sorted(self.missing.items())},
        }
        INDEX.write_text(json.dumps(entries, indent=1) + "\n")

    def versions(self) -> set[str]:
        return {version for versions in self.graphs.values() for version in versions}

    def file(self, name: str, versions: str) -> Path | None:
        """The graph that these versions trace for "<case>.<decompositions>"."""
        found = [f for f in self._files(name) if versions in self.graphs[f]]
        return GRAPHS / found[0] if found else None

    def add(self, recordings: Iterable[Recording], versions: str) -> None:
        """Note what these versions trace, in place of what was noted of them before."""
        for recording in recordings:
            self._forget(recording.name, versions)
            if recording.text is None:
                self.missing.setdefault(recording.name, {})[versions] = recording.missing
            else:
                self.graphs.setdefault(self._store(recording), []).append(versions)

    def _files(self, name: str) -> Iterator[str]:
        return (f for f in self.graphs if f.rsplit(".", 2)[0] == name)

    def _forget(self, name: str, versions: str) -> None:
        self.missing.get(name, {}).pop(versions, None)
        for file in list(self._files(name)):
            if versions in self.graphs[file]:
                self.graphs[file].remove(versions)

    def _store(self, recording: Recording) -> str:
        assert recording.text is not None
        for number in range(1, 100):
            file = f"{recording.name}.{number}.py"
            path = GRAPHS / file
            if not path.exists() or not self.graphs.get(file, [""]):
                path.write_text(recording.text)
            if path.read_text() == recording.text:
                return file
        raise AssertionError(f"no free number for {recording.name}")

    def remove_unused(self) -> None:
        for file in [f for f, versions in self.graphs.items() if not versions]:
            del self.graphs[file]
            (GRAPHS / file).unlink()
        self.missing = {k: v for k, v in self.missing.items() if v}
