"""Completes the value of --set in a shell. In: the typed text (`str`). Out: key paths of a spec, or `key=value`s."""

from ftgen.spec.spec import Spec


def keys(typed: str) -> list[str]:
    """Key paths that begin with the typed text, with "=" at the end. After "=": also the possible values of the key."""
    schema = Spec.model_json_schema()
    values: dict[str, list[str]] = {}
    for name, key in schema["properties"].items():
        kinds = [key, *key.get("anyOf", [])]
        inside = {
            k: v
            for kind in kinds
            for k, v in schema["$defs"].get(str(kind.get("$ref"))[8:], {}).get("properties", {}).items()
        }
        for path, each in {f"{name}.{inner}": value for inner, value in inside.items()}.items() or [(name, key)]:
            kinds = [each, *each.get("anyOf", [])]
            known = [value for kind in kinds for value in kind.get("enum", [])]
            known += [True, False] if any(kind.get("type") == "boolean" for kind in kinds) else []
            values[path] = [str(value).lower() for value in known]
    path, equals, _ = typed.partition("=")
    found = [f"{path}={value}" for value in values.get(path, [])] if equals else [f"{key}=" for key in values]
    return [each for each in found if each.startswith(typed)]
