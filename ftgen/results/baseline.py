"""Read a baseline. In: `published`, or a file that `ftgen tabulate --format json` wrote. Out: a `Baseline`."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ftgen.errors import LogError, Problem
from ftgen.results.compare import PUBLISHED, TOLERANCE, Baseline, measured, published
from ftgen.validation import validate


class Result(BaseModel):
    """A run in a file of results: the keys that a comparison needs."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    status: str
    experiment: str = ""
    model: str | None
    scheme: str | None
    precision: str | None
    gpu: str | None
    gpus: int | None
    global_batch_size: int | None
    seq_length: int | None
    options: list[str] = []
    step_time_s: float | None = Field(gt=0, allow_inf_nan=False)
    tokens_per_s: float | None = Field(gt=0, allow_inf_nan=False)
    mfu: float | None = Field(gt=0, allow_inf_nan=False)
    days_per_1t_tokens: float | None = Field(gt=0, allow_inf_nan=False)


class Results(BaseModel):
    """A file that `ftgen tabulate --format json` wrote."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    format: Literal[1]
    runs: list[Result]


def read_baseline(name: str, tolerance: float = TOLERANCE, *, across_engines: bool = False) -> Baseline:
    """The published figures, or those of a file of results. LogError for a file that has no such results."""
    if name == PUBLISHED:
        return published(tolerance)
    complete = [run for run in _read(Path(name)).runs if run.status == "complete" and run.step_time_s]
    if not complete:
        raise LogError(
            Problem(("runs",), "no run is complete with a step time, so there is nothing to compare with", file=name)
        )
    return measured(Path(name).name, complete, tolerance, across_engines=across_engines)


def _read(path: Path) -> Results:
    hint = f"write it with `ftgen tabulate LOGS --format json --output FILE.json`, or use --baseline {PUBLISHED}"
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise LogError(Problem((), f"cannot be read: {error.strerror}", hint, file=str(path))) from None
    except (ValueError, RecursionError) as error:
        raise LogError(Problem((), f"is not JSON: {error}", hint, file=str(path))) from None
    if not isinstance(document, dict):
        raise LogError(Problem((), "must be a JSON object", hint, file=str(path)))
    results, problems = validate(Results, document)
    if results is None:
        raise LogError(*(problem._replace(file=str(path)) for problem in problems))
    return results
