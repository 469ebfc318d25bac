"""Charts of groups of runs side by side. In: `Group`s and the names of their variants. Out: charts, in Vega-Lite.

Each bar and point carries a sentence, which the page says when it is reached by pointer or keyboard.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from ftgen import catalogue
from ftgen.catalogue import Published
from ftgen.results.compare import recomputed
from ftgen.results.repeats import Group, way
from ftgen.show.chart_parts import LABEL, POINT, Chart, Values, bars, colour_by, layered, legend, shortened, thousands
from ftgen.show.tables import experiment_title
from ftgen.show.works import on_gpus
from ftgen.units import clean, number, percent

MEASURED, PUBLISHED, IDEAL = "measured", "published", "ideal, at the dense peak"

Variants = Mapping[tuple[object, ...], str]  # the name of the variant by what makes runs repeats of each other


def throughput(groups: Sequence[Group], variants: Variants) -> Chart | None:
    """Tokens per second and GPU, beside what was published and what the dense peak would give."""
    timed = [group for group in groups if group.tokens_per_s and group.gpus]
    if not timed:
        return None
    values: Values = []
    published: dict[str, None] = {}
    for group in timed:
        gpus, tokens = group.gpus or 1, group.tokens_per_s or 0.0
        name = f"{_name(group, variants)}: {thousands(tokens / gpus)}"
        found = {MEASURED: tokens / gpus}
        if row := _published(group):
            source = f"published, per GPU, on {row.gpus} {row.gpu.upper()}"
            found[source] = (recomputed(row).tokens_per_s or 0.0) / row.gpus
            published[source] = None
        if group.mfu:
            found[IDEAL] = tokens / gpus / group.mfu
        for source, each in found.items():
            label = f"{_name(group, variants)}: {source}: {thousands(each)} {_unit(group)}"
            values.append({"name": name, "source": source, "value": each, "label": clean(label)})
    measured = [value["value"] for value in values if value["source"] == MEASURED]
    sentence = f"measured {_range(measured, thousands)} {_unit(timed[0])}"
    if shares := [group.mfu for group in timed if group.mfu]:
        sentence += f", {_range(shares, lambda share: percent(share, 1))} of the ideal"
    return Chart(
        experiment_title(timed[0]), sentence, bars(values, _unit(timed[0]), (MEASURED, *(published or ("",)), IDEAL))
    )


def memory(groups: Sequence[Group], variants: Variants) -> Chart | None:
    """The peak memory of each variant, beside the GPU's."""
    used, there = "peak", "memory of the GPU"
    values: Values = []
    for group in groups:
        if not group.peak_memory_gib:
            continue
        name = _name(group, variants, "highest")
        gpu = catalogue.gpus().get(group.gpu or "")
        found = {used: group.peak_memory_gib} | ({there: float(gpu.memory_gib)} if gpu else {})
        for source, gib in found.items():
            label = f"{name}: {source}: {number(gib, 2)} GiB"
            shown = f"{name}: {number(group.peak_memory_gib, 1)}"
            values.append({"name": shown, "source": source, "value": gib, "label": label})
    if not values:
        return None
    peaks = [value["value"] for value in values if value["source"] == used]
    sentence = f"peak {_range(peaks, lambda gib: number(gib, 1))} GiB a GPU"
    return Chart(experiment_title(groups[0]), sentence, bars(values, "GiB a GPU", (used, there)))


def scaling(groups: Sequence[Group], variants: Variants) -> Chart | None:
    """Throughput per GPU by that of the fewest GPUs with as much work for each: measured, and published."""
    values: Values = []
    for (title, *_), same in groupby(sorted(groups, key=_scaled_from), _scaled_from):
        sizes = [g for g in same if g.gpus and g.tokens_per_s and g.gpu != "cpu"]  # processes that share one machine
        if not sizes:
            continue
        measured = [(g.gpus, g.tokens_per_s) for g in sizes]
        published = [(g.gpus, recomputed(g.published).tokens_per_s) for g in sizes if g.published]
        name = ", ".join(filter(None, (title.replace(" finetuning", ""), variants.get(way(sizes[0])))))
        for source, found in ((MEASURED, measured), (PUBLISHED, published)):
            known = [(gpus, tokens) for gpus, tokens in found if gpus and tokens]
            values += _efficiencies(shortened(name), source, known)
    if not values:
        return None
    most_gpus = max(value["gpus"] for value in values)
    least, most = (pick(value["value"] for value in values) for pick in (min, max))
    lines = len({(value["name"], value["source"]) for value in values})
    beyond = [v["value"] for v in values if v["source"] == MEASURED and not v["first"]]
    sentence = f"{lines} lines, up to {most_gpus} GPUs: measured {_range(beyond, lambda share: percent(share, 1))}"
    return Chart("Scaling efficiency", sentence, _scaling_spec(values, min(0.8, least), max(1.0, most)))


def _scaling_spec(values: Values, least: float, most: float) -> dict[str, Any]:
    sizes = sorted({value["gpus"] for value in values})
    x = {
        "field": "gpus",
        "type": "quantitative",
        "title": "GPUs",
        "scale": {"type": "log", "base": 2, "domain": [sizes[0], sizes[-1]]},
        "axis": {"values": sizes, "format": ",d"},
    }
    scale = {"domain": [least, most], "nice": True}
    y = {"field": "value", "type": "quantitative", "title": "efficiency", "axis": {"format": "%"}, "scale": scale}
    colour = colour_by("name", sorted({value["name"] for value in values}))
    sources = [source for source in (MEASURED, PUBLISHED) if any(value["source"] == source for value in values)]
    dash = {"field": "source", "scale": {"domain": sources, "range": [[1, 0], [4, 4]]}, "legend": legend(sources)}
    base = {"x": x, "y": y, "color": colour}
    line = {"mark": {"type": "line", "aria": False}, "encoding": base | {"strokeDash": dash}}
    points = {"mark": POINT | {"opacity": 1}, "encoding": base | LABEL}
    return layered([line, points]) | {"data": {"values": values}}


def _efficiencies(name: str, source: str, sizes: Sequence[tuple[int, float]]) -> Values:
    if len({gpus for gpus, _ in sizes}) < 2:
        return []
    fewest, tokens = min(sizes)
    values = []
    for gpus, there in sorted(sizes):
        efficiency = there / gpus / (tokens / fewest)
        label = f"{name}, {source}: {gpus} GPUs: {percent(efficiency, 1)} of {fewest}"
        point = {"name": name, "source": source, "gpus": gpus, "value": efficiency, "label": label, "first": gpus == fewest}
        values.append(point)
    return values


def _scaled_from(group: Group) -> tuple[str, str, int, float, tuple[str, ...]]:
    """What is the same in a series of sizes: as much work for each GPU, done in the same way."""
    work = (group.global_batch_size or 0) / (group.gpus or 1)
    return (experiment_title(group), group.gpu or "", group.seq_length or 0, work, group.options)


def _name(group: Group, variants: Variants, figure: str = "mean") -> str:
    """1x H200, GBS 4: default, mean of 2."""
    mean = f"{figure} of {group.counted}" if group.counted > 1 else ""
    return clean(": ".join(filter(None, (on_gpus(group), ", ".join(filter(None, (variants.get(way(group)), mean)))))))


def _published(group: Group) -> Published | None:
    """What was published for the same work on each GPU, for the count of GPUs that is nearest to the group's."""
    gpus = group.gpus or 1
    same = [
        row
        for row in catalogue.published()
        if (row.model, row.scheme, row.precision) == (group.model, group.scheme, group.precision)
        and row.seq_length == group.seq_length
        and row.global_batch_size * gpus == (group.global_batch_size or 0) * row.gpus
    ]
    return min(same, key=lambda row: abs(row.gpus - gpus), default=None)


def _unit(group: Group) -> str:
    return f"tokens per second and {'process' if group.gpu == 'cpu' else 'GPU'}"


def _range(values: Sequence[float], how: Callable[[float], str]) -> str:
    least, most = how(min(values)), how(max(values))
    return least if least == most else f"{least} to {most}"
