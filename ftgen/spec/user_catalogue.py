"""A catalogue file of the user's: models and GPUs as in ftgen's own. In: a `Source` that names one. Out: `UserCatalogue`."""

from functools import cache
from typing import Any

from pydantic import Field, create_model

from ftgen.catalogue import Gpu, Model, Split, UserCatalogue, gpu_from, model_from
from ftgen.errors import Problem, SpecError
from ftgen.spec.source import Layer, Source, read
from ftgen.spec.spec import OneLine, Positive, Table
from ftgen.validation import validate

_TYPES: dict[Any, Any] = {int: Positive, str: OneLine, int | None: Positive | None}


def own(source: Source) -> UserCatalogue:
    """What the file named by `catalogue` adds; SpecError with every problem, in that file."""
    layer = next((layer for layer in reversed(source.layers) if "catalogue" in layer.document), None)
    return _read(layer) if layer and isinstance(layer.document["catalogue"], str) else UserCatalogue({}, {})


def _read(layer: Layer) -> UserCatalogue:
    try:
        there = read(layer.path.parent / layer.document["catalogue"], {})
    except SpecError as error:
        where = Source((layer,), layer.document, {}, {})
        unread = [
            Problem(("catalogue",), f"{each.file}: {each.what}", each.hint) for each in error.problems if not each.line
        ]
        raise SpecError(*(map(where.located, unread) if unread else error.problems)) from None
    found, problems = validate(tables(), there.document)
    if problems or not found:
        raise SpecError(*map(there.located, problems))
    said = found.model_dump(exclude_unset=True)
    return UserCatalogue(
        {name: model_from(name, table) for name, table in said.get("models", {}).items()},
        {name: gpu_from(name, table) for name, table in said.get("gpus", {}).items()},
    )


@cache
def tables() -> type[Table]:
    """The vocabulary of a catalogue file."""
    split = _table(Split)
    models = _table(Model, parallelism=(list[split], Field([])))  # type: ignore[valid-type]
    gpus = _table(Gpu, precisions=(list[OneLine], Field()), peak_tflops=(dict[str, float], Field()))
    return create_model(
        "Catalogue",
        __base__=Table,
        models=(dict[str, models], Field({}, description="Models by the name that a spec gives.")),  # type: ignore[valid-type]
        gpus=(dict[str, gpus], Field({}, description="GPUs by the name that a spec gives.")),  # type: ignore[valid-type]
    )


def _table(record: Any, **others: Any) -> type[Table]:
    """The keys of a record of ftgen's own catalogue, a `NamedTuple`; its name is the table's."""
    types, defaults = record.__annotations__, record._field_defaults
    keys = {key: (_TYPES.get(kind, kind), defaults.get(key, Field())) for key, kind in types.items() if key != "name"}
    return create_model(record.__name__, __base__=Table, **(keys | others))
