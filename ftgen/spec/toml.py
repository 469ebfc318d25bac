"""Reads TOML, and finds the line of a key.

In: a `Path`, or the text of --set. Out: the text and its document (`dict[str, Any]`); a line (`int`) for a key path.
"""

import datetime
import re
from pathlib import Path
from typing import Any

import tomli

from ftgen.documents import Document, has
from ftgen.errors import KeyPath, Problem, SpecError

DEEPEST = 8  # keys in the path of an override; no table of ftgen is deeper


def read_toml(path: Path) -> tuple[str, Document]:
    """The text of the file and its document; SpecError, with the line if there is one, if the file is not TOML."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise SpecError(Problem((), f"is not UTF-8: {error.reason} at byte {error.start}", file=str(path))) from None
    except OSError as error:
        raise SpecError(Problem((), error.strerror or str(error), "check the path", file=str(path))) from None
    except ValueError:  # the path has a NUL byte or a character that no file name can have
        raise SpecError(Problem((), "is not a valid path", "check the path", file=str(path))) from None
    try:
        document = tomli.loads(text)
        repr(document)  # RecursionError if the document is nested too deeply to print
        return text, document
    except (ValueError, RecursionError) as error:  # not TOML, a number that is too long, or nesting that is too deep
        line = re.search(r"at line (\d+)", str(error))
        number = int(line[1]) if line else text.count("\n") + 1
        raise SpecError(Problem((), f"is not TOML: {error}", file=str(path), line=number)) from None


def line_of(text: str, path: KeyPath) -> int:
    """The 1-based line that first sets the key or the nearest table around it; 0 if there is none.

    The parser finds it. The shortest beginning of the text that parses and has the key ends where the value of the key
    ends. The key starts after the longest beginning that parses without the key.
    """
    for length in range(len(path), 0, -1):
        line = _first_line_with(text, path[:length])
        if line:
            return line
    return 0


def _first_line_with(text: str, path: KeyPath) -> int:
    lines = [f"{line}\n" for line in text.split("\n")]  # splitlines() would also split at characters inside strings
    start = 0  # the lines before this one parse and do not have the key
    for end in range(1, len(lines) + 1):
        try:
            document = tomli.loads("".join(lines[:end]))
        except ValueError:
            continue  # this line is inside a value of several lines
        if has(document, path):
            blank = (n for n in range(start, end) if lines[n].strip() and not lines[n].lstrip().startswith("#"))
            return next(blank, end - 1) + 1
        start = end
    return 0


def parse_override(text: str) -> tuple[KeyPath, Any]:
    """The key path and the value of `key.path=value`. A date, a time or text that is not a TOML value becomes a string."""
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path) or len(path) > DEEPEST or not text.isprintable():
        raise SpecError(Problem((), f"must be key.path=value, found {text!r}", file="--set"))
    try:
        parsed = tomli.loads(f"value = {value}")["value"]
        repr(parsed)
    except (ValueError, RecursionError):
        return path, value
    return path, value if isinstance(parsed, datetime.date | datetime.time) else parsed
