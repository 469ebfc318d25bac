"""What the report draws. In: `Summary`s, `Group`s and curves. Out: charts as Vega-Lite specifications.

Each point carries a sentence, which the page says when the point is reached by pointer or keyboard.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from ftgen import catalogue
from ftgen.results.compare import recomputed
from ftgen.results.options import shortly
from ftgen.results.repeats import Group
from ftgen.results.summary import Summary
from ftgen.show.chart_parts import LABEL, POINT, Values, bars, colour_by, curve, layered, legend, off_scale, window
from ftgen.show.curves import OFF_SCALE, Curve
from ftgen.show.tables import accelerators, experiment_title
from ftgen.units import clean, number, percent, significant, whole

MEASURED, PUBLISHED, IDEAL = "measured", "published (H100)", "ideal, at the dense peak"


class Chart(NamedTuple):
    """A chart, and what it shows in a sentence."""

    title: str
    sentence: str
    spec: dict[str, Any]


def step_times(run: Summary, times: Curve) -> Chart | None:
    """The time of every step, with the window shaded and its mean as a line."""
    if not times.middle:
        return None
    most = OFF_SCALE * times.middle
    values = [
        {"step": step, "value": min(time_s, most), "off": time_s > most, "label": f"step {step}: {significant(time_s, 4)} s"}
        for step, time_s in times.points
    ]
    layers = [*window(run), *curve(values, "seconds", zero=True)]
    if times.beyond:
        layers.append(off_scale(values))
    told = f"mean {significant(run.step_time_s, 4)} s over steps {run.window_first} to {run.window_last}"
    above = f"; {times.beyond} off the scale" if times.beyond else ""
    return Chart(
        "Step time",
        f"{times.known} steps, {told if run.step_time_s else 'no step time is reported'}{above}",
        layered(layers),
    )


def losses(of: Curve) -> Chart | None:
    """The loss of every step."""
    if of.known < 2:
        return None
    values = [{"step": step, "value": loss, "label": f"step {step}: loss {loss:.4g}"} for step, loss in of.points]
    sentence = f"from {of.first:.4g} to {of.last:.4g} in {of.known} steps"
    return Chart("Loss", sentence, layered(curve(values, "loss", zero=False)))


def losses_together(runs: Sequence[tuple[Summary, Curve]]) -> Chart:
    """The losses of at most MOST_RUNS runs of a kind in one chart."""
    named = [(f"{run.experiment} {run.run_id}".strip(), of) for run, of in runs]
    values = [
        {"step": step, "value": loss, "run": clean(name), "label": clean(f"{name}, step {step}: loss {loss:.4g}")}
        for name, of in named
        for step, loss in of.points
    ]
    layers = curve(values, "loss", zero=False, by="run")
    return Chart(experiment_title(runs[0][0]), f"the loss of {len(runs)} runs", layered(layers))


def throughput(groups: Sequence[Group]) -> Chart | None:
    """Tokens per second and GPU, beside what was published and what the dense peak would give."""
    values: Values = []
    for group in groups:
        if not (group.tokens_per_s and group.gpus):
            continue
        name = _name(group)
        of_each = f"tokens per second and {_one(group)}"
        found: dict[str, float | None] = {
            MEASURED: group.tokens_per_s,
            PUBLISHED: recomputed(group.published).tokens_per_s if group.published else None,
            IDEAL: group.tokens_per_s / group.mfu if group.mfu else None,
        }
        for source, tokens in found.items():
            if tokens:
                label = f"{name}: {source}: {whole(tokens / group.gpus)} {of_each}"
                values.append({"name": name, "source": source, "value": tokens / group.gpus, "label": label})
    if not values:
        return None
    ideal = f", {percent(groups[0].mfu, 2)} of the ideal" if groups[0].mfu else ""
    sentence = values[0]["label"].replace(f": {MEASURED}", "") + ideal
    return Chart(experiment_title(groups[0]), sentence, bars(values, of_each, (MEASURED, PUBLISHED, IDEAL)))


def _name(group: Group) -> str:
    parts = (accelerators(group), f"GBS {group.global_batch_size}", shortly(group.options))
    return clean(", ".join(filter(None, parts)))


def _one(group: Group) -> str:
    return "process" if group.gpu == "cpu" else "GPU"


def memory(groups: Sequence[Group]) -> Chart | None:
    """The peak memory of each experiment, beside the GPU's."""
    used, there = "peak", "the GPU's"
    values: Values = []
    for group in groups:
        if not group.peak_memory_gib:
            continue
        name = _name(group)
        gpu = catalogue.gpus().get(group.gpu or "")
        found = {used: group.peak_memory_gib, there: gpu.memory_gib if gpu else None}
        for source, gib in found.items():
            if gib:
                values.append(
                    {"name": name, "source": source, "value": gib, "label": f"{name}: {source}: {number(gib, 2)} GiB"}
                )
    if not values:
        return None
    return Chart(experiment_title(groups[0]), values[0]["label"], bars(values, "GiB a GPU", (used, there)))


def scaling(groups: Sequence[Group]) -> Chart | None:
    """Throughput per GPU by that of the fewest GPUs with as much work for each: measured, and published."""
    values: Values = []
    for (title, *_, done), same in groupby(sorted(groups, key=_scaled_from), _scaled_from):
        sizes = [g for g in same if g.gpus and g.tokens_per_s and g.gpu != "cpu"]  # processes that share one machine
        measured = [(g.gpus, g.tokens_per_s) for g in sizes]
        published = [(g.gpus, recomputed(g.published).tokens_per_s) for g in sizes if g.published]
        for source, found in ((MEASURED, measured), (PUBLISHED, published)):
            values += _efficiencies(
                clean(", ".join(filter(None, (title, shortly(done))))),
                source,
                [(gpus, tokens) for gpus, tokens in found if gpus and tokens],
            )
    if not values:
        return None
    worst = min(values, key=lambda value: float(value["value"]))
    sizes_seen = sorted({value["gpus"] for value in values})
    x = {
        "field": "gpus",
        "type": "quantitative",
        "title": "GPUs",
        "scale": {"type": "log", "base": 2, "domain": [sizes_seen[0], sizes_seen[-1]]},
        "axis": {"values": sizes_seen, "format": "d"},
    }
    least, most = min(0.8, worst["value"]), max(1.0, *(value["value"] for value in values))
    scale = {"domain": [least, most], "nice": True}
    y = {"field": "value", "type": "quantitative", "title": "efficiency", "axis": {"format": "%"}, "scale": scale}
    colour = colour_by("name", sorted({value["name"] for value in values}))
    sources = [source for source in (MEASURED, PUBLISHED) if any(value["source"] == source for value in values)]
    dash = {"field": "source", "scale": {"domain": sources, "range": [[1, 0], [4, 4]]}, "legend": legend(sources)}
    base = {"x": x, "y": y, "color": colour}
    line = {"mark": {"type": "line", "aria": False}, "encoding": base | {"strokeDash": dash}}
    points = {"mark": POINT | {"opacity": 1}, "encoding": base | LABEL}
    spec = layered([line, points]) | {"data": {"values": values}}
    return Chart("Scaling efficiency", f"the least: {worst['label']}", spec)


def _efficiencies(name: str, source: str, sizes: Sequence[tuple[int, float]]) -> Values:
    if len({gpus for gpus, _ in sizes}) < 2:
        return []
    fewest, tokens = min(sizes)
    values = []
    for gpus, there in sorted(sizes):
        efficiency = there / gpus / (tokens / fewest)
        label = f"{name}, {source}: {gpus} GPUs: {percent(efficiency, 1)} of {fewest}"
        values.append({"name": name, "source": source, "gpus": gpus, "value": efficiency, "label": label})
    return values


def _scaled_from(group: Group) -> tuple[str, str, int, float, tuple[str, ...]]:
    """What is the same in a series of sizes: as much work for each GPU, done in the same way."""
    work = (group.global_batch_size or 0) / (group.gpus or 1)
    return (experiment_title(group), group.gpu or "", group.seq_length or 0, work, group.options)
