"""Reads the user catalogue: a TOML file that adds models and GPUs to the catalogue of ftgen.

In: the `Source`s of a site profile and a spec; each may name a file. Out: a `UserCatalogue`, or a `SpecError`.
"""

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field, create_model

from ftgen.catalogue import Gpu, Model, Split, UserCatalogue, gpu_from, model_from
from ftgen.errors import Problem, SpecError
from ftgen.spec.read import named_file, read_source
from ftgen.spec.source import Layer, Source
from ftgen.spec.spec import OneLine, Positive, Table
from ftgen.validation import validate

_TYPES: dict[Any, Any] = {int: Positive, str: OneLine, int | None: Positive | None}


def read_user_catalogue(*sources: Source) -> UserCatalogue:
    """The models and GPUs of the files that the key `catalogue` names. A later source wins. SpecError with every problem."""
    models: dict[str, Model] = {}
    gpus: dict[str, Gpu] = {}
    for source in sources:
        layer = next((layer for layer in reversed(source.layers) if "catalogue" in layer.document), None)
        path = named_file(layer, "catalogue") if layer else None
        if layer and path:
            found = _read(path, layer)
            models |= found.models
            gpus |= found.gpus
    return UserCatalogue(models, gpus)


def _read(path: Path, named_in: Layer) -> UserCatalogue:
    try:
        source = read_source(path)
    except SpecError as error:
        spec = Source((named_in,), named_in.document, {}, {})
        unread = [Problem(("catalogue",), f"{p.file}: {p.what}", p.hint) for p in error.problems if not p.line]
        raise SpecError(*(map(spec.located, unread) if unread else error.problems)) from None
    found, problems = validate(tables(), source.document)
    if problems or not found:
        raise SpecError(*map(source.located, problems))
    said = found.model_dump(exclude_unset=True)
    return UserCatalogue(
        {name: model_from(name, table) for name, table in said.get("models", {}).items()},
        {name: gpu_from(name, table) for name, table in said.get("gpus", {}).items()},
    )


@cache
def tables() -> type[Table]:
    """The pydantic model of a user catalogue."""
    split = _table(Split)
    models = _table(Model, parallelism=(list[split], Field([])))  # type: ignore[valid-type]
    gpus = _table(
        Gpu,
        precisions=(list[OneLine], Field()),
        peak_tflops=(dict[str, float], Field()),
        expected=(dict[str, float] | None, None),
    )
    return create_model(
        "Catalogue",
        __base__=Table,
        models=(dict[str, models], Field({}, description="Models, by the name in `model` of a spec.")),  # type: ignore[valid-type]
        gpus=(dict[str, gpus], Field({}, description="GPUs, by the name in `gpu` of a spec.")),  # type: ignore[valid-type]
    )


def _table(record: Any, **others: Any) -> type[Table]:
    """The pydantic model with the fields of a `NamedTuple` of the catalogue, except its name."""
    types, defaults = record.__annotations__, record._field_defaults
    keys = {key: (_TYPES.get(kind, kind), defaults.get(key, Field())) for key, kind in types.items() if key != "name"}
    return create_model(record.__name__, __base__=Table, **(keys | others))
