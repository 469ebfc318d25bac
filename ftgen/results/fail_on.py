"""The words of `--fail-on`. In: a `View` and words. Out: a line for each run that one of the words describes."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from ftgen.errors import LogError, Problem, closest
from ftgen.results.compare import Baseline
from ftgen.results.keys import View
from ftgen.results.summary import Summary
from ftgen.units import clean, ratio, significant

BY_STATUS: Mapping[str, Callable[[Summary], bool]] = {
    "incomplete": lambda run: run.status in {"incomplete", "failed"},  # steps are missing, for whatever reason
    "failed": lambda run: run.status in {"failed", "ended-badly"},
    "invalid": lambda run: run.status == "invalid",
    "warning": lambda run: bool(run.warnings),
}
REGRESSION = "regression"
WORDS = (REGRESSION, *BY_STATUS)


def read_words(text: str, *, compared: bool) -> tuple[str, ...]:
    """Read `regression,invalid`. LogError for an unknown word, and for `regression` without a baseline."""
    words = tuple(filter(None, (word.strip() for word in text.split(","))))
    wrong = [word for word in words if word not in WORDS]
    if wrong:
        raise LogError(*(Problem(("fail-on",), f"unknown word {word}", closest(word, WORDS)) for word in wrong))
    if REGRESSION in words and not compared:
        raise LogError(Problem(("fail-on",), f"{REGRESSION} needs a baseline", "add --baseline published"))
    return words


def failures(view: View, words: Sequence[str]) -> list[str]:
    """A line for each run that one of the words describes, with the reason."""
    found = [clean(line) for run in view.runs for line in _failures(run, words, view.baseline)]
    return [*found, *nothing_compared(view)] if REGRESSION in words else found


def nothing_compared(view: View) -> list[str]:
    """A line that says so, if there is a baseline and no run could be compared with it."""
    if not view.baseline or any(view.baseline.ratio(run) is not None for run in view.runs):
        return []
    return [f"no run with a step time did work that {view.baseline.name} has a figure for: nothing could be compared"]


def _failures(run: Summary, words: Sequence[str], baseline: Baseline | None) -> Iterator[str]:
    name = f"{run.experiment} {run.run_id}".strip()
    for word in words:
        if word in BY_STATUS and BY_STATUS[word](run):
            yield f"{name}: {word}: {run.reason or '; '.join(run.warnings)}"
    if REGRESSION in words and baseline and baseline.regressed(run):
        there = baseline.of(run)
        before = significant(there.step_time_s if there else None, 4)
        times = f"{significant(run.step_time_s, 4)} s, {before} s in {baseline.name}"
        yield f"{name}: {REGRESSION}: {times}: {ratio(baseline.ratio(run))}, {1 + baseline.allowed(run):.4g}x is allowed"
