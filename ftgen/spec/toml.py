"""TOML text to a document, and a key path back to its line. In: a file. Out: plain dicts; line numbers on demand."""

import datetime
import re
from pathlib import Path
from typing import Any

import tomli

from ftgen.documents import Document, has
from ftgen.errors import KeyPath, Problem, SpecError

DEEPEST = 8  # keys in the path of an override: deeper than any vocabulary


def read_toml(path: Path) -> tuple[str, Document]:
    """The file's text and what it says; SpecError with the line if it cannot be read as TOML."""
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise SpecError(Problem((), f"is not UTF-8: {error.reason} at byte {error.start}", file=str(path))) from None
    except OSError as error:
        raise SpecError(Problem((), error.strerror or str(error), "check the path", file=str(path))) from None
    except ValueError:  # a NUL byte, or a character that no file name can have
        raise SpecError(Problem((), "is not a possible path of a file", "check the path", file=str(path))) from None
    try:
        document = tomli.loads(text)
        repr(document)  # what is nested too deeply to be shown shows here
        return text, document
    except (ValueError, RecursionError) as error:  # beside what is no TOML, a number or a nesting without end
        line = re.search(r"at line (\d+)", str(error))
        number = int(line[1]) if line else text.count("\n") + 1
        raise SpecError(Problem((), f"is not TOML: {error}", file=str(path), line=number)) from None


def line_of(text: str, path: KeyPath) -> int:
    """1-based line where the key, or the nearest table around it, is first said; 0 if nowhere.

    Asks the parser itself: the shortest run of whole lines that parses and has the key ends where the key's value ends,
    and the key starts after the longest shorter run that parses.
    """
    for length in range(len(path), 0, -1):
        line = _first_line_with(text, path[:length])
        if line:
            return line
    return 0


def _first_line_with(text: str, path: KeyPath) -> int:
    lines = [f"{line}\n" for line in text.split("\n")]  # TOML's lines: splitlines() would also cut inside strings
    start = 0  # lines that are known to parse without the key
    for end in range(1, len(lines) + 1):
        try:
            document = tomli.loads("".join(lines[:end]))
        except ValueError:
            continue  # inside a value of several lines
        if has(document, path):
            blank = (n for n in range(start, end) if lines[n].strip() and not lines[n].lstrip().startswith("#"))
            return next(blank, end - 1) + 1
        start = end
    return 0


def parse_override(text: str) -> tuple[KeyPath, Any]:
    """`key.path=value` to a key path and a TOML value; what is no TOML value is a string, and so is a time."""
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
