"""Print what pyproject.toml requires, for `pip install --requirement`, so that an image installs it before the sources.

    python requirements.py pyproject.toml all|torch|EXTRA

`all` are the dependencies, `torch` is that one alone, anything else an extra.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def requirements(pyproject: Path, selection: str) -> list[str]:
    """Requirement lines of the project.

    Raises:
        KeyError: there is no such extra.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    dependencies: list[str] = project["dependencies"]
    if selection == "all":
        return dependencies
    if selection == "torch":
        return [line for line in dependencies if line.startswith("torch=")]
    extra: list[str] = project["optional-dependencies"][selection]
    return extra


if __name__ == "__main__":
    print(*requirements(Path(sys.argv[1]), sys.argv[2]), sep="\n")
