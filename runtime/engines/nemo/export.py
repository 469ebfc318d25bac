"""Export a trained checkpoint to Hugging Face format: the whole model, or only the adapters.

In: a plan, and a run directory or a checkpoint. Out: <run directory>/exports/step_<N>/{merged,adapter}.

No model is built and NeMo is not imported: the tensors of the distributed checkpoint are read one at a time. Memory
holds the largest tensor two or three times. The guard publishes the folder after the checks of `export_check.py`, so an
export that exists is complete and was checked. An export of the same checkpoint is kept.

Environment: FTGEN_RUN_DIR, STAGE_PATH.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from runtime.engines.nemo import convert, export_check, names
from runtime.engines.nemo.names import Source
from runtime.engines.nemo.trained import Trained
from runtime.guard import publish
from runtime.guard.manifest import sha256_of
from runtime.job.errors import JobError
from runtime.job.progress import say, timed
from runtime.weights import adapter, base, card, distributed, hub, reload, shards
from runtime.weights.distributed import Checkpoint
from runtime.weights.shards import Entry

Plan = dict[str, Any]
FORMAT = 1  # version of what an export contains
SMALL_FILES = 64 << 20  # bytes; an upper bound of tokenizer, config and card


class Run(NamedTuple):
    """A checkpoint, and the plan that trained it."""

    plan: Plan
    checkpoint: Path  # .../step_<N>

    @property
    def weights(self) -> Path:
        """The folder of the distributed checkpoint."""
        return self.checkpoint / "weights"

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.checkpoint.parent.parent

    def export(self, what: str) -> Path:
        """The folder of an export."""
        return self.directory / "exports" / self.checkpoint.name / what


def export(plan: Plan, given: str = "") -> int:
    """Export what the plan asks for; exit code 0. `given`: a run directory or a checkpoint; "": the newest of this run.

    JobError: no checkpoint, no base, no disk space, or an export that differs from the checkpoint.
    """
    run = find(plan, given)
    for what in (plan.get("export") or {"what": ["merged"]})["what"]:
        if what == "adapter" and not run.plan["lora"]:
            raise JobError(f"{run.checkpoint} has no adapters: it was trained with SFT", 'set export.what = ["merged"]')
        with timed(f"exporting {run.checkpoint}: {what}"):
            _publish(run, what)
    return 0


def find(plan: Plan, given: str) -> Run:
    """The checkpoint to export, with the plan of its run. JobError: there is none."""
    folder = Path(given or os.environ["FTGEN_RUN_DIR"])
    if (folder / "weights" / distributed.METADATA).is_file():
        checkpoint = folder
    elif not (checkpoint := newest(folder)):
        raise JobError(
            f"{folder} has no checkpoint: neither weights/ nor checkpoints/step_<N>/weights/",
            "give the directory of a run that saved, or one of its checkpoints; set [save] in the spec",
        )
    own = checkpoint.parent.parent / "plan.json"
    return Run(json.loads(own.read_text()) if own.is_file() else plan, checkpoint.resolve())


def newest(run_directory: Path) -> Path | None:
    """The checkpoint of the last step in a run directory."""
    found = [path for path in run_directory.glob("checkpoints/step_*") if (path / "weights" / distributed.METADATA).is_file()]
    return max(found, key=lambda path: int(path.name.rpartition("_")[2]), default=None)


def _publish(run: Run, what: str) -> None:
    place = run.export(what)
    source = {
        "kind": "model in Hugging Face format",
        "format": FORMAT,
        "what": what,
        "checkpoint": sha256_of(run.weights / distributed.METADATA),  # has an id of the save
        "base": convert.source(run.plan),
        "lora": run.plan["lora"],
    }
    build = {"merged": _merged, "adapter": _adapter}[what]
    publish.ensure(place, source, lambda staging: _build(run, staging, build), need_bytes=lambda: _need_bytes(run, what))
    say(f"the export is ready: {place}")


def _build(run: Run, staging: Path, build: Callable[["Export"], list[str]]) -> dict[str, Any]:
    export = Export(run, staging, _base(run.plan, staging / "from"))
    findings = build(export)
    for finding in findings:
        say(finding)
    card.write(staging, run.plan, run.checkpoint, findings, convert.origin(run.plan))
    return {"checkpoint": run.checkpoint.name, "findings": findings}


class Export:
    """What an export is made of."""

    def __init__(self, run: Run, folder: Path, base_folder: Path) -> None:
        self.plan, self.folder, self.base = run.plan, folder, base_folder
        self.config = base.config(base_folder)
        checkpoint = Checkpoint(run.weights)
        converted = convert.directory(run.plan) / "weights"
        pair = (Checkpoint(converted), checkpoint) if run.plan["lora"] else (checkpoint, None)
        self.trained = Trained(run.plan, *pair)
        self.tensors = self._tensors()

    def _tensors(self) -> dict[str, Entry]:
        """The tensors to export: those of the base, rows of one fused tensor side by side."""
        found = {name: entry for name, entry in base.tensors(self.base).items() if not names.COMPUTED.search(name)}
        self.trained.refuse_unknown(found)
        if "lm_head.weight" not in found and self.trained.has_own_head():
            found["lm_head.weight"] = found["model.embed_tokens.weight"]
        return dict(sorted(found.items(), key=lambda item: (item[1].file, _order(self.trained.source(item[0])))))


def _order(source: Source) -> tuple[int, str]:
    return (-1 if source.layer is None else source.layer, source.name)


def _merged(export: Export) -> list[str]:
    """Write the whole model and check it."""
    trained, tensors, folder = export.trained, export.tensors, export.folder
    base.copy(export.base, folder)
    findings = []
    if export.config.get("tie_word_embeddings") and "lm_head.weight" in tensors and trained.has_own_head():
        (folder / "config.json").write_text(json.dumps(export.config | {"tie_word_embeddings": False}, indent=2) + "\n")
        findings.append("config.json: tie_word_embeddings is false now, because the LM head was trained by itself")
    shards.write(folder, tensors, lambda name: trained.weight(name, shards.torch_dtype(tensors[name].dtype)))
    findings += [export_check.structure(folder, tensors), export_check.values(folder, tensors, trained)]
    if why := reload.room_for(export.plan["model"]["parameters"]):
        return [*findings, f"not checked: logits and completion, because {why}"]
    model = reload.Reloaded(folder)
    bound = export_check.bound_of(tensors, trained)
    findings.append(export_check.behaviour(model, trained, export.config["rms_norm_eps"], bound))
    return [*findings, export_check.completion(model)]


def _adapter(export: Export) -> list[str]:
    """Write the adapters alone and check them."""
    trained, folder, plan = export.trained, export.folder, export.plan
    modules = {name.removesuffix(".weight"): source for name, source in trained.adapted(export.tensors).items()}
    base.copy(export.base, folder, without=("config.json", "generation_config.json"))
    name, revision = _base_name(plan)
    adapter.write(folder, list(modules), lambda module: trained.adapter(modules[module]), plan["lora"], name, revision)
    findings = [export_check.adapter_values(folder, modules, trained)]
    model = _base_weights(plan)
    why = "" if model else "the base is not in the cache of the hub"
    if why := why or reload.room_for(plan["model"]["parameters"]) or reload.missing("peft"):
        return [*findings, f"not checked: logits, because {why}"]
    loaded = reload.Reloaded(model, folder)
    return [*findings, export_check.behaviour(loaded, trained, export.config["rms_norm_eps"], export_check.SAME_WEIGHTS)]


def _base(plan: Plan, scratch: Path) -> Path:
    """The base's small files and the list of its tensors. Conversions before ftgen kept them: taken from its directory."""
    kept = convert.directory(plan) / base.FOLDER
    if (kept / base.TENSORS).is_file():
        return kept
    model = _base_weights(plan)
    if model is None:
        raise JobError(
            f"{kept} does not exist: an older ftgen converted this checkpoint, and the base is not on this machine",
            f"move {kept.parent} away and run the command convert",
        )
    base.keep(model, scratch)
    return scratch


def _base_weights(plan: Plan) -> Path | None:
    """The base in Hugging Face format, if it is on this machine."""
    kind = plan["checkpoint"]["source"]
    if kind == "hub":
        return hub.cached(plan["model"]["hf_id"], convert.origin(plan).get("commit"))
    folder = convert.user_directory(plan) if kind == "directory" else None
    return folder if folder and folder.is_dir() else None


def _base_name(plan: Plan) -> tuple[str, str | None]:
    """What PEFT loads the base from: a repository of the hub and its commit, or a directory."""
    if plan["checkpoint"]["source"] == "directory":
        return str(convert.user_directory(plan)), None
    return plan["model"]["hf_id"], convert.origin(plan).get("commit")


def _need_bytes(run: Run, what: str) -> int:
    if what == "adapter":
        return sum(path.stat().st_size for path in run.weights.iterdir()) + SMALL_FILES
    return run.plan["model"]["parameters"] * 4 + SMALL_FILES
