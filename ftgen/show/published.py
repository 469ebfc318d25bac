"""What others have published, as text. In: conditions such as `gpu=h100`. Out: rows for JSON, lines of a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from ftgen import catalogue
from ftgen.catalogue import Publication, Published, TimeToTrain
from ftgen.errors import LogError, Problem, closest
from ftgen.units import UNKNOWN, significant, whole

Row = Mapping[str, Any]
KEYS = ("publication", "model", "scheme", "precision", "gpu", "gpus", "global_batch_size", "seq_length")
HEADS = ("Publication", "Date", "Work", "GPUs", "GBS", "Tokens", "Step time (s)", "Tokens/s/GPU", "TFLOPS", "Minutes")
DERIVED = "~"  # before a figure that follows from another one


def read_conditions(texts: Sequence[str]) -> dict[str, str]:
    """Read `gpu=h100`; LogError for an unknown key, or a text without `=`."""
    conditions = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise LogError(Problem(("published",), f"must be KEY=VALUE, found {text}", "for example gpu=h100"))
        if key not in KEYS:
            raise LogError(Problem(("published",), f"unknown key {key}", closest(key, KEYS)))
        conditions[key] = value
    return conditions


def rows(conditions: Mapping[str, str]) -> list[Row]:
    """Every published result that fulfils the conditions, with what its publication says of all its results."""
    found: list[Row] = []
    for publication in catalogue.publications():
        found += [_row(publication, result) for result in publication.results]
        found += [_row(publication, result) for result in publication.times_to_train]
    return [row for row in found if all(str(row.get(key)) == value for key, value in conditions.items())]


def table(found: Sequence[Row]) -> list[str]:
    """The rows in columns, and below them each publication's source and caveats."""
    cells = [HEADS, *map(_cells, found)]
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(_aligned(text, width, at) for at, (text, width) in enumerate(zip(row, wide, strict=True))) for row in cells
    ]
    return [*(line.rstrip() for line in lines), "", *_sources(found)]


def _row(publication: Publication, result: Published | TimeToTrain) -> Row:
    common = {key: value for key, value in publication._asdict().items() if key not in {"name", "results", "times_to_train"}}
    figures = result._asdict()
    if isinstance(result, Published):
        figures |= {
            "step_time_s": result.time_of_step_s,
            "tokens_per_s_per_gpu": result.speed_of_gpu,
            "derived": [
                key
                for key, said in (("step_time_s", result.step_time_s), ("tokens_per_s_per_gpu", result.tokens_per_s_per_gpu))
                if said is None
            ],
        }
    return {"publication": publication.name, **common, **figures}


def _cells(row: Row) -> tuple[str, ...]:
    def figure(key: str, text: str) -> str:
        return f"{DERIVED}{text}" if key in row.get("derived", ()) and text != UNKNOWN else text

    work = " ".join(filter(None, (row["model"], row["scheme"], row.get("precision"), row.get("split"))))
    return (
        row["publication"],
        row["date"],
        " ".join(filter(None, (work, row.get("submitter"), row.get("round")))),
        f"{row['gpus']}x {row['gpu'].upper()}",
        str(row.get("global_batch_size") or UNKNOWN),
        str(row.get("seq_length") or UNKNOWN),
        figure("step_time_s", significant(row.get("step_time_s"), 4)),
        figure("tokens_per_s_per_gpu", whole(row.get("tokens_per_s_per_gpu"))),
        whole(row.get("tflops_per_gpu")),
        str(row.get("minutes") or UNKNOWN),
    )


def _aligned(text: str, width: int, column: int) -> str:
    return f"{text:>{width}}" if column > 3 else f"{text:{width}}"


def _sources(found: Sequence[Row]) -> list[str]:
    by_name = {row["publication"]: row for row in found}
    lines = [f"{DERIVED} follows from the other figure of the row"] if any(row.get("derived") for row in found) else []
    for name, row in by_name.items():
        packed = {True: "packed sequences", False: "no packing", None: ""}[row["packed"]]
        targets = f"LoRA on {', '.join(row['lora_targets'])}" if row["lora_targets"] else ""
        said = "; ".join(filter(None, (row["software"], row["data"], packed, targets)))
        lines += [
            "",
            f"{name}: {row['title']}, {row['publisher']}, {row['date']}",
            f"  {said}",
            f"  source: {row['source']}",
        ]
        lines += [f"  note: {caveat}" for caveat in row["caveats"]]
    return lines
