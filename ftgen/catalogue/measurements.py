"""Reads how fast trainings were: our own measurements, those of the publications, and runs of a user's history.

In: the TOML files of measured/, which `bench/measured.py` writes; publications; the results and the plan of a run, as JSON
has them. Out: `Measured` rows.
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tomli

from ftgen.catalogue.publications import Publication, Published, publications
from ftgen.documents import get

HERE = Path(__file__).parent / "measured"
MEASURED, PUBLISHED, HISTORY = "measured", "published", "history"
WARM = 10  # steps before the first timed one: earlier steps are slower
WORDS = ("model", "gpu", "scheme", "precision")  # that results have of a run
COUNTS = ("gpus", "global_batch_size", "seq_length")
LARGEST = 1e9  # no step time in seconds and no power in watts is larger
SPLIT_BY = ("tensor_model", "pipeline_model", "context")
SPLIT = re.compile(r"(TP|PP|CP) (\d+)")
DEFAULT_SCALING = {"nemo": "delayed", "megatron_bridge": "current"}  # of FP8, where a plan or a publication does not say it


class Measured(NamedTuple):
    """The speed of one training."""

    model: str
    gpu: str
    scheme: str  # sft, lora
    precision: str
    engine: str
    gpus: int
    global_batch_size: int
    seq_length: int  # tokens
    step_time_s: float
    source: str  # where it stands
    origin: str = MEASURED
    split: tuple[int, ...] | None = None  # TP, PP, CP; None: not said
    micro_batch_size: int = 1
    packed: bool = True
    fp8_scaling: str | None = None
    lora_targets: tuple[str, ...] = ()
    optimizations: tuple[str, ...] = ()  # those that were on; none: the stock recipe
    power_w: float | None = None  # mean of a GPU

    @property
    def tokens_of_gpu(self) -> float:
        """Tokens of one GPU in a step."""
        return self.global_batch_size * self.seq_length / self.gpus


@cache
def measurements() -> tuple[Measured, ...]:
    """Our own, and those that were published."""
    return (*_own(), *(row for publication in publications() for row in _of(publication)))


def _own() -> list[Measured]:
    tables = [tomli.loads(path.read_text(encoding="utf-8")) for path in sorted(HERE.glob("*.toml"))]
    return [_row({"source": each["source"], **run}) for each in tables for run in each["run"]]


def _row(table: Mapping[str, Any]) -> Measured:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return Measured(**fields)


def _of(publication: Publication) -> list[Measured]:
    """The step times of a publication that says which engine and data it had."""
    if not (publication.engine and publication.packed):
        return []
    rows = [(row, time_s) for row in publication.results if (time_s := row.time_of_step_s)]
    return [_published(publication, row, time_s) for row, time_s in rows if row.scheme == "sft" or publication.lora_targets]


def _published(publication: Publication, row: Published, time_s: float) -> Measured:
    sizes = dict(SPLIT.findall(row.split))
    return Measured(
        **{
            key: getattr(row, key)
            for key in ("model", "gpu", "scheme", "precision", "gpus", "global_batch_size", "seq_length")
        },
        engine=publication.engine,
        step_time_s=time_s,
        source=f"{publication.title} ({publication.publisher}, {publication.date})",
        origin=PUBLISHED,
        split=tuple(int(sizes.get(key, 1)) for key in ("TP", "PP", "CP")) if sizes else None,
        fp8_scaling=DEFAULT_SCALING.get(publication.engine) if row.precision == "fp8" else None,
        lora_targets=publication.lora_targets if row.scheme == "lora" else (),
    )


def from_run(results: Mapping[str, Any], plan: Mapping[str, Any] | None, source: str, origin: str) -> Measured | None:
    """A complete run of ftgen with a step time; None for another, or if its window begins with the slow first steps.

    Results and plan may be anybody's: what has not the types of ftgen's is no run that counts.
    """
    if not plan or results.get("status") != "complete" or not _is_above_zero(results.get("step_time_s")):
        return None
    first, power_w = results.get("window_first"), results.get("gpu_power_w")
    said = {key: results.get(key) for key in (*WORDS, *COUNTS)}
    known = all(isinstance(said[key], str) for key in WORDS) and all(_is_count(said[key]) for key in COUNTS)
    if not known or not isinstance(first, int) or first < WARM:
        return None
    try:
        how = of_plan(plan)
    except (TypeError, AttributeError):  # a plan that is none of ftgen's
        return None
    if not all(map(_is_count, (*how["split"], how["micro_batch_size"]))) or not isinstance(how["packed"], bool):
        return None
    return Measured(
        **said,  # type: ignore[arg-type]
        **how,
        step_time_s=results["step_time_s"],
        source=source,
        origin=origin,
        power_w=power_w if _is_above_zero(power_w) else None,
    )


def of_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan says, as JSON has it, of how it trains: the fields of `Measured` that results do not have."""
    engine = str(plan.get("engine") or "nemo")
    on = plan.get("optimizations") or {}
    scaling = str(plan.get("fp8_scaling") or DEFAULT_SCALING.get(engine))
    return {
        "engine": engine,
        "split": tuple(get(plan, ("parallelism", f"{part}_parallel_size")) for part in SPLIT_BY),
        "micro_batch_size": plan.get("micro_batch_size"),
        "packed": get(plan, ("data", "packed")),
        "fp8_scaling": scaling if plan.get("precision") == "fp8" else None,
        "lora_targets": tuple(map(str, get(plan, ("lora", "targets")) or ())),
        "optimizations": tuple(sorted(str(name) for name, chosen in on.items() if chosen is True)),
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_above_zero(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < LARGEST
