"""Print, as pip requirements, the lowest versions that pyproject.toml allows.

torch is left out: only one of its releases has a CPU build here, and the caller installs that.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

# For the lint of the main job, and for tests that the short job does not run.
NOT_RUN = {"ruff", "mypy", "selenium", "tlparse", "hypothesis", "expecttest"}


def lowest(requirement: str) -> str | None:
    """``name>=1.2; marker`` as ``name==1.2; marker``; None where it is not wanted.

    Extras of the project itself are not: all extras are read.

    Raises:
        ValueError: the requirement has another form than the one above.
    """
    if requirement.startswith("mxnorm_pass["):
        return None
    match = re.fullmatch(r"([\w.-]+)>=([\w.]+)(;.*)?", requirement)
    if match is None:
        raise ValueError(f"{requirement!r} in pyproject.toml is not of the form 'name>=version'")
    name, version, marker = match.groups()
    return None if name == "torch" or name in NOT_RUN else f"{name}=={version}{marker or ''}"


def main() -> None:
    path = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(path.read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    found = dict.fromkeys(lowest(requirement) for group in groups for requirement in group)
    print("\n".join(requirement for requirement in found if requirement is not None))


if __name__ == "__main__":
    main()
