"""Write the model card of an export: what was trained, on what, how, and what was checked.

In: the run, the origin of its base, the findings of the checks. Out: README.md.

The card is made to be published. It has no path, no variable of the environment and no name of a machine: of the plan,
it has only the keys in `SHOWN`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime.job import environment
from runtime.job.names import ENGINES
from runtime.weights.runs import Run

Plan = dict[str, Any]
# Keys of the plan without paths and without names of the site.
SHOWN = ("scheme", "precision", "gpus", "max_steps", "epochs", "global_batch_size", "micro_batch_size", "seq_length", "seed")
SHOWN_TABLES = ("lora", "parallelism", "optimizer", "validation")
PATHS = {"file", "path", "train", "chat_template"}  # keys of these tables that can be paths
COUNTS = ("examples", "trained_tokens")  # of the data, as the log has them
LIBRARY = {"merged": "transformers", "adapter": "peft"}
RELATION = {"merged": "finetune", "adapter": "adapter"}
USE = {
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", torch_dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
    "adapter": """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("BASE", torch_dtype="auto")
model = PeftModel.from_pretrained(base, "FOLDER")""",
}


def write(folder: Path, what: str, run: Run, origin: dict[str, Any], findings: Iterable[str]) -> None:
    """Write README.md. `what` is "merged" or "adapter"; `origin` is that of the converted checkpoint."""
    plan = run.plan
    base = _base(plan)
    lines = [
        *_front_matter(what, plan, base),
        f"# {_scheme(plan)} of {base}",
        "",
        f"Trained with ftgen {plan['ftgen_version']} and {ENGINES[plan['engine']]}: {_work(run)}.",
        "",
        "```python",
        USE[what].replace("BASE", base),
        "```",
        *_section("Base", {"model": base, "revision": origin.get("commit") or _revision(plan)}),
        *_section("Data", _data(run)),
        *_section("Losses", run.losses() or {"losses": "not recorded: the log of the run is not beside the checkpoint"}),
        *_section("Plan", _plan(run)),
        *_section("Versions", _versions(run, origin)),
        "",
        "## Checks",
        "",
        *(f"- {finding}" for finding in findings),
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n")


def _front_matter(what: str, plan: Plan, base: str) -> list[str]:
    """Metadata that the hub reads (https://huggingface.co/docs/hub/model-cards)."""
    on_hub = plan["checkpoint"]["source"] == "hub"
    of_base = [f"base_model: {base}", f"base_model_relation: {RELATION[what]}"] if on_hub else []
    return ["---", f"library_name: {LIBRARY[what]}", "pipeline_tag: text-generation", *of_base, "---", ""]


def _base(plan: Plan) -> str:
    """The base's name: its repository, or the last part of its directory."""
    asked = plan["checkpoint"]
    return Path(asked["path"]).name if asked["source"] == "directory" else str(plan["model"]["hf_id"])


def _revision(plan: Plan) -> str:
    random = f"random weights of seed {plan['seed']}"
    return {"random": random, "directory": "unknown: a directory"}.get(plan["checkpoint"]["source"], "unknown")


def _scheme(plan: Plan) -> str:
    return "LoRA fine-tune" if plan["scheme"] == "lora" else "Fine-tune"


def _work(run: Run) -> str:
    plan, step = run.plan, run.manifest.get("step", "an unknown number")
    of_all = f" of {plan['max_steps']}" if plan["max_steps"] else ""
    epochs = f" ({plan['epochs']} epochs in all)" if plan.get("epochs") else ""
    what = f"{step}{of_all} steps of {plan['global_batch_size']} sequences{epochs}"
    return f"{plan['model']['parameters']:,} parameters, {what}"


def _data(run: Run) -> dict[str, Any]:
    """Kind, hash and counts of the data. Names of the data's folders end with the hash of what they were made from."""
    data, folders, facts = run.plan["data"], run.manifest.get("data"), run.data()
    named = {"dataset": data.get("dataset"), "revision": data.get("revision"), "sha256": facts.get("sha256")}
    counts = {
        f"{key.replace('_', ' ')}, {split}": facts[split].get(key)
        for split in ("training", "validation")
        for key in COUNTS
        if split in facts
    }
    return {
        "kind": data["kind"],
        "prepared as": ", ".join(folders) if folders else "not recorded",
        **{key: value for key, value in (named | counts).items() if value is not None},
    }


def _plan(run: Run) -> dict[str, Any]:
    plan = run.plan
    tables = {
        f"{table}.{key}": value
        for table in SHOWN_TABLES
        for key, value in (plan.get(table) or {}).items()
        if key not in PATHS
    }
    on = [name for name, is_on in plan["optimizations"].items() if is_on]
    return {
        "experiment": plan["experiment"],
        "spec": f"{plan['spec_file']}, sha256 {plan['spec_sha256']}",
        "checkpoint": run.checkpoint.name,
        **{key: plan[key] for key in SHOWN if plan.get(key) is not None},
        **tables,
        "optimizations": ", ".join(on) or "none",
    }


def _versions(run: Run, origin: dict[str, Any]) -> dict[str, str]:
    """Versions of the training, and those of the conversion and of this export that differ from them."""
    trained = run.manifest.get("versions") or {"training": "not recorded"}
    others = {"conversion": origin, "export": environment.packages()}
    return {"ftgen": run.plan["ftgen_version"], **trained} | {
        f"{name}, at the {when}": versions[name]
        for when, versions in others.items()
        for name in environment.PACKAGES
        if versions.get(name, trained.get(name)) != trained.get(name)
    }


def _section(title: str, rows: dict[str, Any]) -> list[str]:
    table = [f"| {key} | {value if isinstance(value, str) else json.dumps(value)} |" for key, value in rows.items()]
    return ["", f"## {title}", "", "| | |", "|---|---|", *table]
