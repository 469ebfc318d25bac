"""Writes files atomically, compares them, and finds the files of ftgen.

In: texts by file name (`Mapping[str, str]`), or a name. Out: `Path`s, a diff (`str`), or a text (`str`).
"""

import difflib
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

HERE = Path(__file__).parent


def write(folder: Path, texts: Mapping[str, str | Iterable[str]]) -> list[Path]:
    """Write each file completely or not at all, from a text or its pieces. Scripts are executable. Returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(folder / name, text) for name, text in texts.items()]


def _write(path: Path, text: str | Iterable[str]) -> Path:
    mode = 0o755 if path.suffix == ".sh" else 0o644
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.writelines([text] if isinstance(text, str) else text)
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def differences(folder: Path, texts: Mapping[str, str]) -> str:
    """A unified diff from the existing files to the texts; empty if they are equal."""
    return "".join(_difference(folder / name, text) for name, text in texts.items())


def _difference(path: Path, text: str) -> str:
    there = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = difflib.unified_diff(
        there.splitlines(keepends=True), text.splitlines(keepends=True), str(path), f"{path} (compiled now)", n=1
    )
    return "".join(line if line.endswith("\n") else line + "\n" for line in lines)


def is_folder(path: Path) -> bool:
    """Whether the path is a folder. False if the path is not possible, for example too long."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def exists(path: Path) -> bool:
    """Whether the path is a file or folder. False if the path is not possible, for example too long."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def source_folder(name: str) -> Path:
    """The folder `templates` or `runtime`: in the installed package, or beside it in a checkout."""
    installed = HERE / f"_{name}"
    return installed if installed.is_dir() else HERE.parent / name


def source_file(name: str) -> str:
    """The text of a file such as `constraints.txt`, which the installed package has as `_constraints.txt`."""
    installed = HERE / f"_{name}"
    return (installed if installed.is_file() else HERE.parent / name).read_text(encoding="utf-8")
