"""Defines errors as data: what is wrong, where it is, and a hint.

In: problems found anywhere in ftgen. Out: one exception with all of them. Only `cli` prints it.
"""

import difflib
import json
import re
from collections.abc import Iterable
from typing import NamedTuple

KeyPath = tuple[str | int, ...]  # ("parallelism", "tensor_model_parallel_size"); () is the file itself


class Problem(NamedTuple):
    """One thing that the user must change."""

    where: KeyPath  # the key to change
    what: str  # the rule, then the values found
    hint: str = ""
    also: tuple[KeyPath, ...] = ()  # other keys that the rule reads
    file: str = ""  # set when the key is located
    line: int = 0  # 1-based; 0: not known

    def __str__(self) -> str:
        file = self.file if self.file.isprintable() else quoted(self.file)
        place = f"{file}:{self.line}" if file and self.line else file
        text = ": ".join(part for part in (place, dotted(self.where), self.what) if part)
        return f"{text}\n  hint: {self.hint}" if self.hint else text


def dotted(path: KeyPath) -> str:
    """The key path in the syntax of TOML and of --set."""
    return ".".join(key if re.fullmatch("[A-Za-z0-9_-]+", key) else quoted(key) for key in map(str, path))


def quoted(text: str) -> str:
    """The text as a basic string of TOML, with non-printing characters escaped."""
    shown = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}" for c in shown)


def closest(word: str, known: Iterable[str]) -> str:
    """A hint with the most similar known word, or with all known words if none is similar."""
    words = sorted(known)
    near = difflib.get_close_matches(word, words, n=1)
    return f"did you mean {near[0]}?" if near else f"use one of {', '.join(words)}"


class UserError(Exception):
    """Things that the user must change: all problems, not only the first."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


class SpecError(UserError):
    """Problems in a spec, a site profile or a user catalogue."""


class LogError(UserError):
    """Problems with logs, or with the options that read them."""
