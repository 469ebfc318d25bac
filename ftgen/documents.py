"""Looks up, sets, merges and removes values of nested tables by key path.

In: documents (`dict[str, Any]`) and key paths (`KeyPath`). Out: values, or new documents. No function changes its input.
"""

from typing import Any

from ftgen.errors import KeyPath

Document = dict[str, Any]
_MISSING = object()


def get(document: Any, path: KeyPath, default: Any = None) -> Any:
    """The value at this key path."""
    for key in path:
        try:
            document = document[key]
        except (KeyError, IndexError, TypeError):
            return default
    return document


def has(document: Any, path: KeyPath) -> bool:
    """Whether the document has a value at this key path."""
    return get(document, path, default=_MISSING) is not _MISSING


def leaves(document: Document, path: KeyPath = ()) -> dict[KeyPath, Any]:
    """Every value that is not a table, and every empty table, by key path."""
    found: dict[KeyPath, Any] = {}
    for key, value in document.items():
        found |= leaves(value, (*path, key)) if isinstance(value, dict) and value else {(*path, key): value}
    return found


def with_value(document: Document, path: KeyPath, value: Any) -> Document:
    """A copy of the document with the value at this key path; creates tables as needed."""
    key, *rest = path
    inner = document.get(str(key), {})
    if not rest:
        return {**document, str(key): value}
    return {**document, str(key): with_value(inner if isinstance(inner, dict) else {}, tuple(rest), value)}


def merged(below: Document, above: Document) -> Document:
    """Both documents in one: merges tables; any other value of `above` replaces that of `below`."""
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = merged(below[key], above[key])
    return both


def without(document: Document, path: KeyPath) -> Document:
    """A copy of the document without this key path."""
    key, *rest = path
    if key not in document:
        return document
    if not rest or not isinstance(document[str(key)], dict):
        return {k: v for k, v in document.items() if k != key}
    return {**document, str(key): without(document[str(key)], tuple(rest))}
