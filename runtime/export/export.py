"""Export a trained checkpoint to Hugging Face format: the whole model, or only the adapters.

In: a plan, and a run directory or a checkpoint. Out: <run directory>/exports/step_<N>/{merged,adapter}.

No model is built and no framework is imported: the tensors of the distributed checkpoint are read one at a time. The guard
publishes the folder after the checks of `check.py`, so an export that exists is complete and was checked. It is
kept if the same checkpoint is exported again.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from runtime.export import base_model, check, names
from runtime.export.names import Source
from runtime.export.trained import Trained
from runtime.guard import manifest, publish
from runtime.job.errors import JobError
from runtime.job.progress import say, timed
from runtime.weights import adapter, base, card, checkpoint, distributed, reload, shards
from runtime.weights.distributed import Checkpoint
from runtime.weights.runs import Run, find
from runtime.weights.shards import Entry

Plan = dict[str, Any]
FORMAT = 1  # version of what an export contains
SMALL_FILES = 64 << 20  # bytes; an upper bound of tokenizer, config and card


def export(plan: Plan, given: str = "") -> int:
    """Export what the plan asks for; exit code 0. `given`: a run directory or a checkpoint; "": the newest of all runs.

    JobError: no checkpoint, no base, no disk space, or an export that is not the trained model.
    """
    run = find(plan, given)
    for what in (plan.get("export") or {"what": ["merged"]})["what"]:
        _export(run, what)
    return 0


def _export(run: Run, what: str) -> None:
    if what == "adapter" and not run.plan["lora"]:
        raise JobError(f"{run.checkpoint} has no adapters: it was trained with SFT", 'set export.what = ["merged"]')
    source, place = _source(run, what), run.export(what)
    if manifest.flaw(place, source) is None:
        say(f"the export exists: {place}")
        return
    with timed(f"exporting {run.checkpoint}: {what}"):
        need_bytes = SMALL_FILES + (_size(run.weights) if what == "adapter" else checkpoint.weight_bytes(run.plan))
        publish.ensure(place, source, lambda staging: _build(run, what, staging), need_bytes=need_bytes)
    say(f"the export is ready: {place}")


def _source(run: Run, what: str) -> dict[str, Any]:
    """What identifies an export."""
    saved = distributed.inner(run.weights) / distributed.METADATA  # it has a random id of the save
    return {
        "kind": "model in Hugging Face format",
        "format": FORMAT,
        "what": what,
        "checkpoint": manifest.sha256_of(saved),
        "base": checkpoint.source(run.plan),
        "lora": run.plan["lora"],
    }


def _build(run: Run, what: str, staging: Path) -> dict[str, Any]:
    scratch = staging / "from"
    export = Export(run, staging, base_model.files(run.plan, scratch))
    findings = {"merged": _merged, "adapter": _adapter}[what](export)
    if template := run.plan["data"].get("chat_template"):
        base.set_chat_template(staging, template)
        findings.append("the tokenizer has the chat template of the spec, with which the model was trained")
    shutil.rmtree(scratch, ignore_errors=True)
    for finding in findings:
        say(finding)
    card.write(staging, what, run, checkpoint.origin(run.plan), findings)
    return {"checkpoint": run.checkpoint.name, "findings": findings}


class Export:
    """What an export is made of."""

    def __init__(self, run: Run, folder: Path, base_folder: Path) -> None:
        """JobError: the checkpoint, or the base of its adapters, is not there or is another model's."""
        self.plan, self.folder, self.base = run.plan, folder, base_folder
        self.config = base.config(base_folder)
        saved = Checkpoint(run.weights)
        if run.plan["lora"]:
            self.trained = Trained(run.plan, Checkpoint(base_model.converted(run.plan) / "weights"), saved)
        else:
            self.trained = Trained(run.plan, saved, None)
        self.untied = bool(self.config.get("tie_word_embeddings")) and self.trained.has_own_head()
        self.tensors = self._tensors()

    def _tensors(self) -> dict[str, Entry]:
        """The tensors to export: those of the base. Rows of one fused tensor follow each other."""
        found = {name: entry for name, entry in base.tensors(self.base).items() if not names.COMPUTED.search(name)}
        self.trained.refuse_unknown(found)
        if self.untied:
            found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
        return dict(sorted(found.items(), key=lambda item: (item[1].file, *_place(self.trained.source(item[0])))))


def _place(source: Source) -> tuple[int, str]:
    return (-1 if source.layer is None else source.layer, source.name)


def _merged(export: Export) -> list[str]:
    """Write the whole model and check it; the findings."""
    trained, tensors, folder = export.trained, export.tensors, export.folder
    base.copy(export.base, folder)
    findings = []
    if export.untied:
        (folder / "config.json").write_text(json.dumps(export.config | {"tie_word_embeddings": False}, indent=2) + "\n")
        findings.append("config.json: tie_word_embeddings is false now, because the LM head was trained by itself")
    shards.write(folder, tensors, lambda name: trained.weight(name, shards.torch_dtype(tensors[name].dtype)))
    findings += [check.structure(folder, tensors), check.values(folder, tensors, trained)]
    if why := reload.missing(export.plan["model"]["parameters"]):
        return [*findings, f"not checked: logits and completion, because {why}"]
    merged = check.merged_type(tensors, trained)
    expected = check.reference(trained, export.config["rms_norm_eps"], merged)
    model = reload.Reloaded(folder)
    return [*findings, *check.behaviour(model, expected), check.completion(model)]


def _adapter(export: Export) -> list[str]:
    """Write the adapters alone and check them; the findings."""
    trained, folder, plan = export.trained, export.folder, export.plan
    modules = {name.removesuffix(".weight"): source for name, source in trained.adapted(export.tensors).items()}
    base.copy(export.base, folder, without=("config.json", "generation_config.json"))
    name, revision = base_model.name(plan)
    adapter.write(folder, list(modules), lambda module: trained.adapter(modules[module]), plan["lora"], name, revision)
    findings = [check.adapter_values(folder, modules, trained)]
    model = base_model.weights(plan)
    why = reload.missing(plan["model"]["parameters"], "peft") if model else "the base in Hugging Face format is not here"
    if model is None or why:
        return [*findings, f"not checked: logits, because {why}"]
    expected = check.reference(trained, export.config["rms_norm_eps"])
    return findings + check.behaviour(reload.Reloaded(model, folder), expected)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
