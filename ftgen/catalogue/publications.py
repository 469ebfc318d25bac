"""Reads what others have published: fine-tuning figures with their hardware, work, software, date and source.

In: the TOML files of published/, one a publication. Out: a `Publication` with its `Published` results.
"""

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import tomli

HERE = Path(__file__).parent / "published"


class Published(NamedTuple):
    """The speed of one training as published. None: the publication does not say it."""

    model: str  # as in the catalogue, if it has the model
    gpu: str
    scheme: str  # sft, lora
    precision: str
    gpus: int
    global_batch_size: int
    seq_length: int  # tokens
    step_time_s: float | None = None
    tokens_per_s: float | None = None  # of all GPUs
    mfu: float | None = None  # a fraction
    days_per_1t_tokens: float | None = None
    tokens_per_s_per_gpu: float | None = None
    tflops_per_gpu: float | None = None  # TFLOP/s
    split: str = ""  # TP 2, PP 4

    @property
    def tokens_of_gpu(self) -> float:
        """Tokens of one GPU in a step."""
        return self.global_batch_size * self.seq_length / self.gpus

    @property
    def time_of_step_s(self) -> float | None:
        """The step time as published, or else the one that follows from tokens per second and GPU."""
        return self.step_time_s or (self.tokens_per_s_per_gpu and self.tokens_of_gpu / self.tokens_per_s_per_gpu)

    @property
    def speed_of_gpu(self) -> float | None:
        """Tokens per second and GPU as published, or else those that follow from the step time."""
        return self.tokens_per_s_per_gpu or (self.step_time_s and self.tokens_of_gpu / self.step_time_s)


class TimeToTrain(NamedTuple):
    """How long a whole training took, to the publication's target loss. It compares with no step time."""

    model: str
    gpu: str
    scheme: str
    gpus: int
    minutes: float
    round: str = ""
    submitter: str = ""


class Publication(NamedTuple):
    """A publication: what is true of all its results."""

    name: str  # of its file
    title: str
    publisher: str
    date: str
    software: str
    source: str  # where it was published
    results: tuple[Published, ...] = ()
    times_to_train: tuple[TimeToTrain, ...] = ()
    engine: str = ""  # of ftgen's engines; empty: another one, or not said
    data: str = ""
    packed: bool | None = None  # whether several examples share a sequence
    lora_targets: tuple[str, ...] = ()  # by Megatron's names; empty: not said
    caveats: tuple[str, ...] = ()  # what to know before a figure is compared
    recipe: bool = False  # a recipe that ftgen compiles: its results stand in the tables


@cache
def publications() -> tuple[Publication, ...]:
    """Every publication: the recipes first, then by name."""
    found = [_read(path) for path in sorted(HERE.glob("*.toml"))]
    return tuple(sorted(found, key=lambda each: not each.recipe))


def _read(path: Path) -> Publication:
    table = tomli.loads(path.read_text(encoding="utf-8"))
    results = tuple(Published(**row) for row in table.pop("result", ()))
    times = tuple(TimeToTrain(**row) for row in table.pop("time_to_train", ()))
    lists: dict[str, Any] = {key: tuple(table.pop(key, ())) for key in ("lora_targets", "caveats")}
    return Publication(name=path.stem, results=results, times_to_train=times, **lists, **table)


@cache
def published() -> tuple[Published, ...]:
    """The results of the recipes, in the order of their tables."""
    return tuple(row for publication in publications() if publication.recipe for row in publication.results)


@cache
def published_for(model: str, scheme: str, precision: str, gpus: int) -> Published | None:
    """The recipes' result of this experiment, for any GPU; None if there is none."""
    wanted = (model, scheme, precision, gpus)
    return next((row for row in published() if (row.model, row.scheme, row.precision, row.gpus) == wanted), None)
