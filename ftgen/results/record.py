"""A record of a run, for the history: its results, plan and environment, and the hash of its log.

In: logs, or lines of JSON. Out: `Record`s (dictionaries), which are read and selected by their keys.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ftgen.documents import get
from ftgen.errors import LogError, Problem
from ftgen.logs.find import Run
from ftgen.logs.log import Log
from ftgen.logs.many import Progress, read_all
from ftgen.results.keys import RUN, row
from ftgen.results.summary import judge

Record = Mapping[str, Any]
FORMAT = 1  # of a record
CHUNK = 1 << 20
RESULT_KEYS = {field.key for field in RUN}


def records(runs: Iterable[Run], *, progress: Progress = lambda _: None) -> list[Record]:
    """A record of each run, in the order of `find_runs`."""
    return read_all(runs, record, progress=progress)


def record(run: Run, log: Log) -> Record:
    """The record of one run."""
    return {
        "format": FORMAT,
        "results": row(judge(run, log)),
        "plan": log.plan,
        "environment": log.environment,
        "log_sha256": hash_of(run.log),
    }


def key(of: Record) -> str:
    """What tells a run from all others: experiment, id and start. The hash of the log, if the log has no time."""
    results = of["results"]
    parts = [results["experiment"], results["run_id"], results["started"] or of["log_sha256"]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def value(of: Record, path: str) -> Any:
    """The value at a key of the results (`gpu`), or at a path (`environment.packages.torch`); None if there is none."""
    return of["results"].get(path) if path in RESULT_KEYS else get(of, tuple(path.split(".")))


def read_conditions(texts: Sequence[str]) -> dict[str, str]:
    """Read `gpu=h100`, `environment.packages.torch=2.11.0`. LogError for a text without `=` and for an unknown key."""
    conditions = {}
    for text in texts:
        path, equals, wanted = text.partition("=")
        if not equals:
            raise LogError(Problem(("history",), f"must be KEY=VALUE, found {text}", "for example gpu=h100"))
        if path not in RESULT_KEYS and path.partition(".")[0] not in {"plan", "environment"}:
            hint = "use a key of the JSON results, or a path such as plan.data.packed or environment.driver"
            raise LogError(Problem(("history",), f"unknown key {path}", hint))
        conditions[path] = wanted
    return conditions


def select(found: Iterable[Record], conditions: Mapping[str, str]) -> list[Record]:
    """The records that fulfil all conditions. A value is compared as JSON writes it, a text without its quotes."""
    return [of for of in found if all(_text(value(of, path)) == wanted for path, wanted in conditions.items())]


def to_lines(found: Iterable[Record]) -> Iterator[str]:
    """One line of JSON for each record."""
    return (json.dumps(of, allow_nan=False, sort_keys=True) + "\n" for of in found)


def from_lines(text: str, file: str) -> list[Record]:
    """The records of a text with one JSON object a line. LogError, with the line, for any that is none."""
    found, problems = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append(_checked(json.loads(line)))
            except (ValueError, RecursionError) as error:
                problems.append(Problem((), f"is no record of ftgen history: {error}", file=file, line=number))
    if problems:
        raise LogError(*problems)
    return found


def _checked(document: Any) -> Record:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f'must be an object with "format": {FORMAT}')
    missing = {"results", "plan", "environment", "log_sha256"} - document.keys()
    if missing:
        raise ValueError(f"has no {', '.join(sorted(missing))}")
    if not isinstance(document["results"], dict) or {"experiment", "run_id", "started"} - document["results"].keys():
        raise ValueError("its results have no experiment, run_id or started")
    return document


def _text(found: Any) -> str:
    return found if isinstance(found, str) else json.dumps(found)


def hash_of(path: str) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
