"""Charts of curves over steps. In: `Summary`s and curves. Out: charts as Vega-Lite specifications.

Each point carries a sentence, which the page says when the point is reached by pointer or keyboard.
"""

from collections.abc import Sequence
from typing import Any

from ftgen.results.summary import Summary
from ftgen.show.chart_parts import Chart, curve, layered, off_scale, shortened, window
from ftgen.show.curves import OFF_SCALE, Curve, Point
from ftgen.units import clean, significant


def step_times(run: Summary, times: Curve) -> Chart | None:
    """The time of every step, with the window shaded and its mean as a line."""
    if not times.middle:
        return None
    most = OFF_SCALE * times.middle
    values = [
        {
            "step": step,
            "value": min(time_s, most),
            "off": time_s > most,
            "label": f"step {step:,}: {significant(time_s, 4)} s",
        }
        for step, time_s in times.points
    ]
    layers = [*window(run), *curve(values, "seconds", zero=True)]
    if times.beyond:
        layers.append(off_scale(values))
    told = "no step time is reported"
    if run.step_time_s and run.window_first is not None and run.window_last is not None:
        told = f"mean {significant(run.step_time_s, 4)} s over steps {run.window_first:,} to {run.window_last:,}"
    above = f"; {times.beyond} off the scale" if times.beyond else ""
    return Chart(
        "Step time",
        f"{times.known:,} steps, {told}{above}",
        layered(layers),
    )


def losses(of: Curve) -> Chart | None:
    """The loss of every step."""
    if of.known < 2:
        return None
    values = [{"step": step, "value": loss, "label": f"step {step:,}: loss {loss:.4g}"} for step, loss in of.points]
    sentence = f"from {of.first:.4g} to {of.last:.4g} in {of.known:,} steps"
    return Chart("Loss", sentence, layered(curve(values, "loss", zero=False)))


def validation(of: Curve) -> Chart | None:
    """The loss of each validation."""
    if of.known < 2:
        return None
    labels = ((step, loss, f"after step {step:,}: validation loss {loss:.4g}") for step, loss in of.points)
    values = [{"step": step, "value": loss, "label": label} for step, loss, label in labels]
    lowest, step = min((loss, step) for step, loss in of.points)
    sentence = f"from {of.first:.4g} to {of.last:.4g} in {of.known:,} validations, lowest {lowest:.4g} after step {step:,}"
    return Chart("Validation loss", sentence, layered(curve(values, "validation loss", zero=False)))


def losses_together(title: str, runs: Sequence[tuple[str, Curve]]) -> Chart:
    """The losses of at most MOST_RUNS runs of the same work in one chart, each under its name."""
    last = [of.last for _, of in runs if of.last is not None]
    spec = _together([(name, of.points) for name, of in runs], "loss", "loss {:.4g}", [name for name, _ in runs])
    return Chart(title, f"{len(runs)} runs; the last loss is from {min(last):.4g} to {max(last):.4g}", spec)


def loss_differences(title: str, first: tuple[str, Curve], runs: Sequence[tuple[str, Curve]]) -> Chart | None:
    """The losses less those of the first run, at the steps that both curves have."""
    name, of = first
    there = dict(of.points)
    found = [(other, [(step, loss - there[step]) for step, loss in of.points if step in there]) for other, of in runs]
    different = [(other, points) for other, points in found if other != name and len(points) > 1]
    if not different:
        return None
    largest, step, which = max((abs(value), step, other) for other, points in different for step, value in points)
    sentence = f"loss minus that of {name}; the largest difference is {largest:.3g}: {which}, step {step:,}"
    spec = _together(different, "difference of loss", "{:+.3g}", [other for other, _ in runs])
    return Chart(f"{title}: difference from {name}", sentence, spec)


def _together(runs: Sequence[tuple[str, list[Point]]], title: str, how: str, names: Sequence[str]) -> dict[str, Any]:
    """Several curves, each in the colour that its place among the names gives it."""
    values = [
        {"step": step, "value": value, "run": shortened(name), "label": clean(f"{name}, step {step:,}: {how.format(value)}")}
        for name, points in runs
        for step, value in points
    ]
    return layered(curve(values, title, zero=False, by="run", names=list(map(shortened, names))))
