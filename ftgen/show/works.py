"""Works and their runs by name. In: `Summary`s and their variants. Out: a `Work` each, with its fastest run.

A work is what makes runs comparable: model, scheme, precision, GPU and how many, global batch size, sequence length.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from ftgen.logs.identity import RECIPE_SEQ_LENGTH
from ftgen.results.compare import Baseline, mean
from ftgen.results.options import is_optimization
from ftgen.results.repeats import Group, kind, size
from ftgen.results.summary import Summary
from ftgen.results.variants import STOCK, numbered
from ftgen.results.verdict import STATUSES
from ftgen.show.tables import model_and_training
from ftgen.units import UNKNOWN


class NamedRun(NamedTuple):
    """A run, what it is called among those of its work, and where the page tells of it."""

    anchor: str
    name: str
    variant: str
    run: Summary

    @property
    def words(self) -> str:
        """Why the run ended as it did, and its warnings, in one line."""
        return "; ".join(filter(None, (self.run.reason, *self.run.warnings)))


class Work(NamedTuple):
    """Runs of the same work on the same GPUs."""

    model: str  # Llama-3 8B; empty where the work is known by its experiment's name alone
    title: str  # LoRA FP8, 1x H200, GBS 4
    runs: list[NamedRun]

    @property
    def full_title(self) -> str:
        """Llama-3 8B LoRA FP8, 1x H200, GBS 4."""
        return " ".join(filter(None, (self.model, self.title)))

    @property
    def fastest(self) -> NamedRun | None:
        """The complete run with the shortest step; None where none has one."""
        return min(self._timed(), key=lambda each: each.run.step_time_s or 0.0, default=None)

    @property
    def not_complete(self) -> list[NamedRun]:
        """Runs that are invalid, failed, ended badly or have not all their steps, the worst first."""
        found = [each for each in self.runs if each.run.status != "complete"]
        return sorted(found, key=lambda each: -STATUSES.index(each.run.status))

    def compared(self, baseline: Baseline | None) -> str:
        """The fastest run's speed by the baseline's, or by the stock runs': 1.53x as fast as stock."""
        fastest = self.fastest
        if fastest is None:
            return UNKNOWN
        if baseline and (ratio := baseline.ratio(fastest.run)):
            return f"{1 / ratio:.2f}x as fast as {baseline.name}"
        stock = self._stock(fastest)
        time_s = mean([each.run for each in stock]).step_time_s if stock else None
        if not time_s or not fastest.run.step_time_s:
            return UNKNOWN
        if fastest in stock:
            return "stock is the fastest" if len(self._timed()) > len(stock) else "only stock was run"
        of = f" (mean of {len(stock)})" if len(stock) > 1 else ""
        return f"{time_s / fastest.run.step_time_s:.2f}x as fast as {stock[0].variant}{of}"

    def _timed(self) -> list[NamedRun]:
        return [each for each in self.runs if each.run.status == "complete" and each.run.step_time_s]

    def _stock(self, fastest: NamedRun) -> list[NamedRun]:
        """The stock runs that are split as the fastest is; else those that are not split."""
        large = [word for word in fastest.run.options if not is_optimization(word)]
        for name in (", ".join([*large, STOCK]), STOCK):
            if found := [each for each in self._timed() if each.variant == name]:
                return found
        return []


def works(runs: Sequence[Summary], variants: Sequence[str]) -> list[Work]:
    """The works in the recipe's order, which is that of the runs."""
    named = [
        NamedRun(f"run-{position}", name, variant, run)
        for position, (name, variant, run) in enumerate(zip(numbered(runs, variants), variants, runs, strict=True), 1)
    ]
    return [_work(list(same)) for _, same in groupby(named, lambda each: (kind(each.run), size(each.run)))]


def _work(runs: list[NamedRun]) -> Work:
    run = runs[0].run
    model, training = model_and_training(run)
    return Work(model, f"{training or run.experiment}, {on_gpus(run)}", runs)


def on_gpus(run: Summary | Group) -> str:
    """1x H200, GBS 4; with the sequence length where it is not the recipe's."""
    gpu = "CPU" if run.gpu == "cpu" else (run.gpu or "GPU").upper()
    batch = "" if run.global_batch_size is None else f"GBS {run.global_batch_size:,}"
    length = "" if run.seq_length in (RECIPE_SEQ_LENGTH, None) else f"{run.seq_length:,} tokens"
    return ", ".join(filter(None, (f"{UNKNOWN if run.gpus is None else run.gpus}x {gpu}", batch, length)))
