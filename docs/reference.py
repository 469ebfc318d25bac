"""Generate the reference pages of the documentation from ftgen itself.

In: the tables of keys (`Spec`, `Site`) and the catalogue. Out: Markdown pages.

MkDocs calls `on_files` (hooks in mkdocs.yml).
"""

from collections.abc import Iterator
from typing import Any, get_args

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from pydantic import BaseModel

from ftgen import catalogue
from ftgen.spec.site import Site
from ftgen.spec.spec import Spec
from ftgen.units import format_flops


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, text in PAGES.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text()))
    return files


def _keys(table: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The keys of one TOML table as a Markdown table, then the tables inside it."""
    inner: list[tuple[str, type[BaseModel]]] = []
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    for name, field in table.model_fields.items():
        if table_type := _table(field.annotation):
            inner.append((name, table_type))
        else:
            kind = _kind(table.model_json_schema()["properties"][name])
            default = "required" if field.is_required() else _default(field.get_default(call_default_factory=True))
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
    """The type of a JSON Schema in words, with its limits."""
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
    lines = ["# Spec\n", f"{Spec.__doc__}\n", "`ftgen schema` prints these keys as a JSON Schema for editors.\n"]
    return "\n".join([*lines, *_keys(Spec)]) + "\n"


def _site() -> str:
    lines = [
        "# Site profile\n",
        "A site profile describes a cluster: what a job asks Slurm for, and where its Python comes from.\n",
        "`ftgen schema --site` prints these keys as a JSON Schema for editors.\n",
    ]
    return "\n".join([*lines, *_keys(Site)]) + "\n"


def _catalogue() -> str:
    lines = [
        "# Catalogue\n",
        "The catalogue lists the models and GPUs that `model` and `gpu` of a spec can name, and images. "
        "A [user catalogue](../how-to/own-model.md) adds others.\n",
        "## Models\n",
        "The FLOPs are those of one sequence of 4096 tokens in SFT, forward and backward "
        "([Model FLOPs utilization](../explanation/mfu.md)).\n",
        "| `model` | title | layers | hidden | heads / groups | vocabulary | parameters | FLOPs per 4096 tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in catalogue.models().values():
        heads = f"{model.num_attention_heads} / {model.num_query_groups}"
        lines.append(
            f"| `{model.name}` | {model.title} | {model.num_layers} | {model.hidden_size} | {heads} "
            f"| {model.vocab_size} | {model.parameters / 1e9:.2f} x 10⁹ | {model.flops(4096):.4g} |"
        )
    lines += ["\n## GPUs\n", "| `gpu` | title | memory | dense peaks | source |", "|---|---|---|---|---|"]
    for gpu in catalogue.gpus().values():
        peaks = ", ".join(f"{precision} {format_flops(gpu.peak_flops(precision))}" for precision in gpu.precisions)
        lines.append(f"| `{gpu.name}` | {gpu.title} | {gpu.memory_gib:g} GiB | {peaks} | {gpu.source} |")
    lines += [
        "\n## Images\n",
        "NVIDIA's NeMo images, and the packages that ftgen installs. [Choose and import an image](../how-to/images.md) says "
        "what was tested. – means not known, or not inside.\n",
        "| `nvcr.io/nvidia/nemo:` | engines that work | NeMo | Megatron-Bridge | Megatron-Core | Transformer Engine "
        "| tested | without | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for image in catalogue.images().values():
        known = (image.nemo, image.megatron_bridge, image.megatron_core, image.transformer_engine)
        versions = " | ".join(found or "–" for found in known)
        fits = ", ".join(image.fits) or "none"
        lines.append(f"| `{image.name}` | {fits} | {versions} | {image.tested} | {image.lacks or '–'} | {image.source} |")
    return "\n".join(lines) + "\n"


PAGES = {"spec": _spec, "site": _site, "catalogue": _catalogue}
