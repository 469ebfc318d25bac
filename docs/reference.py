"""The reference pages, made from ftgen itself while the site is built. In: the models and the catalogue. Out: pages.

MkDocs calls `on_config` and `on_files` (hooks in mkdocs.yml).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

from ftgen import catalogue
from ftgen.spec.site import Site
from ftgen.spec.spec import Spec
from ftgen.units import format_flops


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave pages out of the navigation that nobody has written yet."""
    config.nav = _written(config.nav, Path(config.docs_dir))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, text in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text()))
    return files


def _written(entries: Any, folder: Path) -> list[Any]:
    kept = []
    for entry in entries:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            if inner := _written(target, folder):
                kept.append({title: inner})
        elif (folder / target).is_file() or Path(target).stem in PAGES:
            kept.append(entry)
    return kept


def _keys(table: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """A table of the keys of one TOML table, and of those inside it."""
    inner: list[tuple[str, type[BaseModel]]] = []
    yield "| key | type | default | what for |\n|---|---|---|---|"
    for name, field in table.model_fields.items():
        if table_type := _table(field.annotation):
            inner.append((name, table_type))
        else:
            kind = _kind(table.model_json_schema()["properties"][name])
            default = "needed" if field.is_required() else _default(field.get_default(call_default_factory=True))
            yield f"| `{prefix}{name}` | {kind} | {default} | {_cell(field.description or '')} |"
    for name, table_type in inner:
        yield f"\n## `[{prefix}{name}]`\n\n{table_type.__doc__}\n"
        yield from _keys(table_type, f"{prefix}{name}.")


def _table(annotation: Any) -> type[BaseModel] | None:
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _kind(schema: dict[str, Any]) -> str:
    """A JSON Schema's type in words, with its limits."""
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value!r}`".replace("'", '"') for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'])}"
    limits = [
        f"{word} {schema[key]:g}"
        for key, word in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    return " ".join([{"object": "table"}.get(schema.get("type", ""), schema.get("type", "any")), *limits])


def _default(value: Any) -> str:
    if value is None:
        return "–"
    return f"`{str(value).lower() if isinstance(value, bool) else repr(value)}`".replace("'", '"')


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _spec() -> str:
    lines = ["# Spec\n", f"{Spec.__doc__}\n", "`ftgen schema` prints the same as a JSON Schema for editors.\n"]
    return "\n".join([*lines, *_keys(Spec)]) + "\n"


def _site() -> str:
    lines = ["# Site profile\n", "The cluster: what a job asks Slurm for, and where its Python comes from.\n"]
    return "\n".join([*lines, *_keys(Site)]) + "\n"


def _catalogue() -> str:
    lines = [
        "# Catalogue\n",
        "What `model` and `gpu` can name. FLOPs: one sequence of 4096 tokens, forward and backward, SFT.\n",
        "## Models\n",
        "| `model` | | layers | hidden | heads / groups | vocabulary | parameters | FLOPs per 4096 tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in catalogue.models().values():
        heads = f"{model.num_attention_heads} / {model.num_query_groups}"
        lines.append(
            f"| `{model.name}` | {model.title} | {model.num_layers} | {model.hidden_size} | {heads} "
            f"| {model.vocab_size} | {model.parameters / 1e9:.2f} x 10⁹ | {model.flops(4096):.4g} |"
        )
    lines += ["\n## GPUs\n", "| `gpu` | | memory | dense peaks | source |", "|---|---|---|---|---|"]
    for gpu in catalogue.gpus().values():
        peaks = ", ".join(f"{precision} {format_flops(gpu.peak_flops(precision))}" for precision in gpu.precisions)
        lines.append(f"| `{gpu.name}` | {gpu.title} | {gpu.memory_gib:g} GiB | {peaks} | {gpu.source} |")
    return "\n".join(lines) + "\n"


PAGES = {"spec": _spec, "site": _site, "catalogue": _catalogue}
