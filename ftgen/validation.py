"""Validates a document against a table of keys, which is a pydantic model.

In: a pydantic model and a document (`dict[str, Any]`). Out: the frozen model, or a `list[Problem]` with every wrong key.
"""

from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ftgen.documents import Document, get, without
from ftgen.errors import KeyPath, Problem, closest, quoted

T = TypeVar("T", bound=BaseModel)

_FOUND = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "a table",
}
_WANTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "an array",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
}


def validate(table: type[T], document: Document) -> tuple[T | None, list[Problem]]:
    """The document as a frozen table and no problems; or None and every problem of the document."""
    try:
        return table.model_validate(document), []
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=True, include_input=True)
        return None, [_problem(table, document, detail) for detail in details]


def validate_partly(table: type[T], document: Document, placeholders: Document) -> tuple[T, list[Problem]]:
    """A table without the keys that have problems, and all those problems. Rules can then check the other keys.

    `placeholders` stand in for missing keys that have no default.
    """
    found, problems = validate(table, document)
    if found:
        return found, problems
    for path in [_existing(document, problem.where) for problem in problems]:
        document = without(document, path) if path else document
    found, more = validate_partly(table, placeholders | document, placeholders)
    return found, problems + more


def _existing(document: Document, path: KeyPath) -> KeyPath:
    """The part of the path that the document has; for a missing key, the table that needs it."""
    value: Any = document
    for length, key in enumerate(path):
        if not isinstance(value, dict) or key not in value:
            return path[:length]
        value = value[key]
    return path


def _problem(table: type[BaseModel], document: Document, detail: Any) -> Problem:
    path: KeyPath = detail["loc"]
    found, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "missing":
            return Problem(path, "is required and has no default", _description(table, path))
        case "extra_forbidden":
            return Problem(path, "unknown key", closest(str(path[-1]), _keys(table, path[:-1])))
        case "literal_error":
            return Problem(path, f"must be {context['expected']}, found {show(found)}", _description(table, path))
        case "value_error":
            return Problem(path, str(context["error"]), _description(table, path))
        case "string_pattern_mismatch":
            return Problem(path, f"must match {context['pattern']}, found {show(found)}", _description(table, path))
        case "at_key":
            return Problem((*path, context["key"]), detail["msg"], context["hint"])
        case kind if kind in _WANTED:
            what = _FOUND.get(type(found), f"a {type(found).__name__}")
            return Problem(path, f"must be {_WANTED[kind]}, found {what}: {show(found)}", _description(table, path))
    message = detail["msg"].replace("Input should", "must")
    return Problem(path, f"{message}, found {show(get(document, path))}", _description(table, path))


def show(value: Any) -> str:
    """The value as TOML writes it, on one line of at most 60 characters."""
    text = quoted(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _table_at(table: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The table at a key path; None if no table has this path."""
    current: type[BaseModel] = table
    keys = [str(key) for key in path if isinstance(key, str)]
    while keys:
        field = current.model_fields.get(keys.pop(0))
        inner = field and [t for t in _inside(field.annotation) if _is_table(t)]
        if not inner:
            return None
        current = inner[0]
        if field and get_origin(field.annotation) is dict:
            keys = keys[1:]  # the next key is a name that the user chose
    return current


def _inside(annotation: Any) -> tuple[Any, ...]:
    """The annotation and the annotations inside it."""
    return (annotation, *(inner for each in get_args(annotation) for inner in (each, *get_args(each))))


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _keys(table: type[BaseModel], path: KeyPath) -> list[str]:
    owner = _table_at(table, path)
    return list(owner.model_fields) if owner else []


def _description(table: type[BaseModel], path: KeyPath) -> str:
    """The description of the key, from its field; "" if there is none."""
    names = [str(key) for key in path if isinstance(key, str)]
    owner = _table_at(table, tuple(names[:-1])) if names else None
    field = owner.model_fields.get(names[-1]) if owner else None
    return (field.description or "") if field else ""
