"""Runs of a history, as text. In: `Record`s, or `Series`. Out: lines."""

import json
from collections.abc import Sequence

from ftgen.results.record import Record, value
from ftgen.results.trend import Series
from ftgen.units import UNKNOWN, percent, ratio, significant

COLUMNS = (
    ("Experiment", "experiment"),
    ("Run", "run_id"),
    ("Started", "started"),
    ("Status", "status"),
    ("GPU", "gpu"),
    ("GPUs", "gpus"),
    ("Step time (s)", "step_time_s"),
    ("NeMo", "environment.packages.nemo_toolkit"),
    ("Partition", "environment.partition"),
)


def table(records: Sequence[Record]) -> list[str]:
    """A line for each run, after a line of titles; grouped by experiment, software and partition, each by time."""
    ordered = sorted(records, key=lambda of: [str(value(of, key)) for key in ("experiment", COLUMNS[7][1], COLUMNS[8][1])])
    rows = [[title for title, _ in COLUMNS], *([_cell(of, key) for _, key in COLUMNS] for of in ordered)]
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{text:{width}}" for text, width in zip(row, wide, strict=True)).rstrip() for row in rows]


def trends(found: Sequence[Series]) -> list[str]:
    """Of each work its runs, its level and its changes."""
    lines = []
    for each in found:
        work = each.work
        options = f" ({', '.join(work['options'])})" if work["options"] else ""
        lines.append(
            f"{work['model']} {work['scheme']} {work['precision']}, {work['gpus']}x {str(work['gpu']).upper()}, "
            f"GBS {work['global_batch_size']}, {work['seq_length']} tokens{options}: "
            f"{len(each.runs)} run{'' if len(each.runs) == 1 else 's'}, last {significant(each.times_s[-1], 4)} s"
        )
        for change, told in zip(each.changes, change_lines(each), strict=True):
            lines.append(f"  {told}")
            lines += [f"    changed there: {version}" for version in change.versions]
            lines += [] if change.versions else ["    the environments that the two logs tell of are equal"]
        lines += [] if each.changes else ["  no change found"]
    return lines


def change_lines(of: Series) -> list[str]:
    """Each change of a series in a sentence."""
    lines = []
    for change in of.changes:
        word = f"{'slower' if change.ratio > 1 else 'faster'} by {percent(abs(change.ratio - 1), 1)}"
        times = f"{significant(change.before_s, 4)} s -> {significant(change.after_s, 4)} s, {ratio(change.ratio)}"
        lines.append(f"{word} from run {change.run_id} on ({change.started or UNKNOWN}): {times}")
    return lines


def details(record: Record) -> str:
    """All of a record, as JSON."""
    return json.dumps(record, indent=2, ensure_ascii=False)


def _cell(of: Record, key: str) -> str:
    found = value(of, key)
    if isinstance(found, float):
        return significant(found, 4)
    return UNKNOWN if found is None else str(found)
