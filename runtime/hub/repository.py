"""A repository of the Hugging Face hub, and which of its files a job reads.

In: a name, patterns of files, a folder. Out: a `Repository`, and the files that the folder lacks.
"""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple


class Repository(NamedTuple):
    """One revision of a repository. A pattern matches the path of a file; `*` matches no slash."""

    name: str  # org/name
    kind: str  # "model" or "dataset"
    revision: str  # branch, tag or commit
    wanted: tuple[str, ...]  # patterns of the files to download
    needed: tuple[str, ...]  # patterns that match at least one file of a complete download

    def __str__(self) -> str:
        """Its name, with its revision if that is not main."""
        return self.name if self.revision == "main" else f"{self.name} at {self.revision}"

    def wants(self, file: str) -> bool:
        """Whether the file at this path in the repository is downloaded."""
        return ".." not in file.split("/") and any(_matches(file, pattern) for pattern in self.wanted)

    def missing(self, folder: Path) -> list[str]:
        """Patterns of `needed` that no file in the folder matches, and shards of the weights that their index names."""
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        lacking = [pattern for pattern in self.needed if not any(_matches(file, pattern) for file in files)]
        return lacking + sorted(_shards(folder) - set(files))


def _matches(file: str, pattern: str) -> bool:
    return file.count("/") == pattern.count("/") and fnmatch(file, pattern)


def _shards(folder: Path) -> set[str]:
    shards: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards |= set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError):
            shards.add(index.name)  # it cannot be read
    return shards
