"""Specs and site profiles as hypothesis makes them: right, wrong and hostile, for every key that the JSON Schema has."""

import datetime
from typing import Any

from hypothesis import strategies as st

from ftgen.spec.site import Site
from ftgen.spec.spec import Spec
from ftgen.units import WALLTIME

HOSTILE = [
    "'", '"', "`", "\\", "$", "$(touch pwned)", "`touch pwned`", "${PATH}", "$STAGE_PATH", "${STAGE_PATH}x", "; touch pwned",
    "\n", "\r", "\t", "\0", "\x1b[31m", "\x7f", "\x85", "\u2028", "\ufeff", "#SBATCH --nodes=99", "\n#SBATCH --nodes=99\n",
    "-", "--", " ", "  ", ":", ",", "*", "?", "~", "!", "}", ")", "(", "{{ plan }}", "{% raw %}", "{#", "%}", '"""', '""")',
    "END_OF_FTGEN_FILE", "\nEND_OF_FTGEN_FILE\n", "EOF", "../..", "/", "größer ≥ 1 – 日本", "😀", "=", "\\n", "%j",
]  # fmt: skip
hostile_text = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=4), max_size=5).map("".join)
one_line = hostile_text.map(lambda text: "".join(c for c in text if c >= " " and c != "\x7f"))
integers = st.sampled_from([1, 2, 4, 8, 16, 20, 32, 64, 128, 4096]) | st.integers(-2, 300) | st.integers()
numbers = st.floats() | st.sampled_from([1e-4, 0.5, 0.0, 1e400, float("nan")])
any_value: st.SearchStrategy[Any] = st.recursive(
    hostile_text | integers | numbers | st.booleans() | st.just(datetime.time(0, 30)) | st.just(datetime.date(2025, 2, 1)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hostile_text, inner, max_size=3),
    max_leaves=4,
)


def valid(schema: dict[str, Any], definitions: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of one key that its schema accepts, with the hostile ones among them."""
    if "$ref" in schema:
        return table(definitions[schema["$ref"].rpartition("/")[2]], definitions, junk=False)
    if "anyOf" in schema:
        return st.one_of([valid(each, definitions) for each in schema["anyOf"] if each.get("type") != "null"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema["type"]
    if kind == "integer":
        low, high = schema.get("minimum", 1), schema.get("maximum", schema.get("exclusiveMaximum", 2**31) - 1)
        return integers.filter(lambda number: low <= number <= high)
    if kind == "number":
        return st.floats(1e-9, 0.9)
    if kind == "array":
        return st.lists(valid(schema["items"], definitions), min_size=schema.get("minItems", 0), max_size=3)
    if kind == "object":  # the environment
        names = st.from_regex(r"\A[A-Z_]{2}[A-Z0-9_]{0,6}\Z").filter(lambda name: "TOKEN" not in name and "KEY" not in name)
        return st.dictionaries(names.map("X_".__add__), one_line, max_size=4)
    if kind == "string":
        return _string(schema.get("pattern", ""))
    return st.booleans()


def _string(pattern: str) -> st.SearchStrategy[str]:
    if pattern == WALLTIME:
        return st.from_regex(pattern, fullmatch=True).filter(lambda text: set(text) - set("0:-") != set())
    if r"\x00-\x1f" in pattern:
        return one_line
    return st.from_regex(pattern, fullmatch=True) if pattern else hostile_text


def table(schema: dict[str, Any], definitions: dict[str, Any], *, junk: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Documents of a table: each key left out, right, or (with `junk`) anything at all; unknown keys too."""
    needed = {key: valid(schema["properties"][key], definitions) for key in schema.get("required", [])}
    others = {key: valid(each, definitions) for key, each in schema["properties"].items() if key not in needed}
    documents = st.fixed_dictionaries(needed, optional=others)
    if not junk:
        return documents
    wrong = st.dictionaries(st.sampled_from(sorted(schema["properties"])) | hostile_text, any_value, max_size=2)
    return st.builds(lambda document, faults: document | faults, documents, wrong)


def documents(model: type[Spec] | type[Site], *, junk: bool) -> st.SearchStrategy[dict[str, Any]]:
    """Documents for a spec or a site profile."""
    schema = model.model_json_schema()
    return table(schema, schema.get("$defs", {}), junk=junk)


LEFT_OUT = {
    "parallelism",
    "checkpoint",
    "gpus_per_node",
    "model",
    "extends",
    "matrix",
    "catalogue",
    "profile",
    "optimizations",
    "fp8_scaling",
}


def _workable(document: dict[str, Any]) -> dict[str, Any]:
    """The document with what rarely fits together taken out: most of these compile."""
    kept = {key: value for key, value in document.items() if key not in LEFT_OUT}
    if kept.get("scheme") != "lora":
        kept.pop("lora", None)
    if "save" not in kept:
        kept.pop("export", None)
    if "max_steps" in kept:
        kept.pop("epochs", None)
    if kept.get("engine") == "megatron_bridge":
        kept.pop("sources", None)
    path = kept.get("data", {}).get("path")
    data = {"kind": "jsonl", "path": path} if path else {}
    window = {"last_steps": min(kept.get("max_steps", 100), 20)}
    sizes = {
        "gpus": 8,
        "seq_length": 4096,
        "micro_batch_size": 1,
        "global_batch_size": 32,
        "gpu": "h100",
        "precision": "bf16",
    }
    return kept | sizes | {"data": data, "window": window}


def _workable_site(document: dict[str, Any]) -> dict[str, Any]:
    python = dict(document.get("python", {}))
    images = {"container", "apptainer", "singularity"}
    image = {"kind": python.get("kind") if python.get("kind") in images else "container"}
    if python.get("image"):
        python |= image | {"image": f"/{python['image']}"}
        python.pop("path", None)
        python.pop("container_env", None)
        if image["kind"] != "container":
            python.pop("container_name", None)
    else:
        python = {"kind": "venv", "path": python["path"]} if python.get("path") else {}
    dropped = {
        "catalogue",
        "gpu_type",
        "gpus_per_node",
        "max_nodes",
        "max_walltime",
        "end_before_limit_s",
        "sbatch_flags",
        "convert_flags",
        "segment",
        "setup_lines",  # these would run
        "master_addr",
        "prefix",
        "mem" if "mem_per_cpu" in document else "mem_per_cpu",
        "mem_per_gpu",
    }
    kept = {key: value for key, value in document.items() if key not in dropped}
    if not {"price_per_gpu_hour", "currency"} <= kept.keys():
        kept.pop("price_per_gpu_hour", None)
        kept.pop("currency", None)
    kept["srun_flags"] = [f"--x={flag}" for flag in kept.get("srun_flags", [])]
    kept["sbatch_flags"] = [f"--mail-user={flag}" for flag in document.get("sbatch_flags", [])]
    kept["gres"] = [f"nvme:{each}" for each in document.get("gres", [])]
    if "output_folder" in kept:
        kept["output_folder"] = "/" + kept["output_folder"].replace("$", "").replace("~", "")
    if "stage_path" in kept:
        kept["stage_path"] = f"/no such folder/{kept['stage_path'].replace('STAGE_PATH', 'PATH')}"
    return kept | {"python": python}


def _paths(model: type[Spec]) -> list[str]:
    """Every key path of a vocabulary, tables too."""
    schema = model.model_json_schema()
    paths = []
    for key, each in schema["properties"].items():
        inner = schema["$defs"].get(str(each.get("$ref")).rpartition("/")[2], {}).get("properties", {})
        paths += [key, *(f"{key}.{name}" for name in inner)]
    return paths


key_paths = st.sampled_from([*_paths(Spec), "environment.X", "environment.A B", "environment.HF_TOKEN", "a.b.c", "gpus.x"])
raw_text = (hostile_text | any_value.map(str)).filter(lambda text: "\0" not in text)  # no argument of a process has NUL
any_spec = documents(Spec, junk=True)
any_site = documents(Site, junk=True)
working_spec = documents(Spec, junk=False).map(_workable)
working_site = documents(Site, junk=False).map(_workable_site)
