"""The converted checkpoint, made once for all jobs. In: a plan. Out: $NEMO_HOME/models/<place>/{context,weights}.

Where the weights come from: "hub" (Hugging Face, downloaded into $HF_HOME's cache, where a broken download goes on),
"directory" (a Hugging Face checkpoint on a disk), "random" (made here). NeMo's own importer converts them, behind the
guard. A checkpoint that is there already is found without importing NeMo.

Environment: NEMO_HOME (default $STAGE_PATH/HF_ckpt), HF_HOME, HF_TOKEN or HF_TOKEN_PATH, HF_HUB_OFFLINE.
"""

import json
import os
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from runtime.engines.nemo import imports
from runtime.guard import manifest, publish
from runtime.job.errors import JobError
from runtime.job.progress import say, timed
from runtime.weights import hub, random_llama

Plan = dict[str, Any]
ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "vocab_size",
)
ROOM_FOR_CONTEXT = 64 << 20  # bytes: tokenizer, config, manifest
MARGIN = 1.05


def convert(plan: Plan) -> int:
    """Make the checkpoint unless it is there; 0. JobError: no access, no network, no room, another shape."""
    begin = time.monotonic()
    place = directory(plan)
    if converted(plan):
        say(f"the converted checkpoint is there: {place} (looked for {time.monotonic() - begin:.1f} s)")
        return 0
    publish.ensure(place, source(plan), lambda staging: _build(plan, staging), need_bytes=lambda: _need_bytes(plan))
    say(f"the converted checkpoint is in {place} (after {time.monotonic() - begin:.0f} s)")
    return 0


def converted(plan: Plan) -> bool:
    """Whether the plan's checkpoint is there and can be used; takes milliseconds."""
    return manifest.flaw(directory(plan), source(plan)) is None


def verify(plan: Plan) -> int:
    """Read every byte of the checkpoint; 0 if all is as it was made, else 1, what is not, and it is moved away."""
    with timed(f"reading {directory(plan)}"):
        flaw = manifest.flaw(directory(plan), source(plan), thorough=True)
    if flaw:
        say(f"the checkpoint in {directory(plan)} cannot be used: {flaw}. The next job makes it anew")
        publish.set_aside(directory(plan), source(plan), thorough=True)
    return 1 if flaw else 0


def directory(plan: Plan) -> Path:
    """Where the plan's converted checkpoint belongs."""
    home = os.environ.get("NEMO_HOME") or Path(os.environ.get("STAGE_PATH") or Path.cwd(), "HF_ckpt")
    return Path(home, "models", plan["checkpoint"]["place"])


def source(plan: Plan) -> dict[str, Any]:
    """What identifies the checkpoint: two plans with the same use the same one."""
    kind = plan["checkpoint"]["source"]
    identity = {"kind": "nemo checkpoint", "source": kind} | {key: plan["model"][key] for key in ARCHITECTURE}
    if kind == "hub":
        return identity | {"hf_id": plan["model"]["hf_id"], "revision": plan["checkpoint"]["revision"]}
    if kind == "random":
        return identity | {"seed": plan["seed"]}
    return identity | {"path": str(user_directory(plan))}


def _build(plan: Plan, staging: Path) -> dict[str, Any]:
    weights, origin = _fetch(plan, staging / "from")
    _refuse_unfit(plan, weights)
    with timed("importing NeMo"):
        imports.defer()
        from runtime.engines.nemo.importer import import_directory
    with timed(f"converting {weights}"):
        origin["layers"] = import_directory(weights, staging, staging / "tokenizer")
    shutil.rmtree(staging / "from", ignore_errors=True)
    return origin | {name: _version(name) for name in ("nemo_toolkit", "megatron-core", "torch", "transformers")}


def _fetch(plan: Plan, scratch: Path) -> tuple[Path, dict[str, Any]]:
    """A directory in Hugging Face format, and what is known of it."""
    kind, model = plan["checkpoint"]["source"], plan["model"]
    if kind == "hub":
        with timed(f"downloading {model['hf_id']}"):
            path = hub.download(model["hf_id"], plan["checkpoint"]["revision"])
        return path, {"commit": path.name}
    if kind == "random":
        with timed(f"making random weights: {model['parameters']:,} parameters"):
            random_llama.write(plan, scratch)
        return scratch, {}
    return user_directory(plan), {}


def _need_bytes(plan: Plan) -> int:
    """What download and conversion write; converted weights take two bytes a parameter, four in small models."""
    parameters, kind = plan["model"]["parameters"], plan["checkpoint"]["source"]
    weights = parameters * (2 if parameters >= random_llama.LARGE else 4)
    if kind == "hub":
        weights += hub.bytes_to_download(plan["model"]["hf_id"], plan["checkpoint"]["revision"])
    if kind == "random":
        weights *= 2
    return int(weights * MARGIN) + ROOM_FOR_CONTEXT


def user_directory(plan: Plan) -> Path:
    """Where a checkpoint of source "directory" is; a relative path is one below STAGE_PATH."""
    return Path(os.environ.get("STAGE_PATH") or Path.cwd(), plan["checkpoint"]["path"])


def _refuse_unfit(plan: Plan, weights: Path) -> None:
    """JobError unless the directory is whole and of the model's shape: the importer would fail late, or not at all."""
    names = {
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "num_query_groups": "num_key_value_heads",
        "vocab_size": "vocab_size",
    }
    try:
        config = json.loads((weights / "config.json").read_text())
        index = weights / "model.safetensors.index.json"
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    except (OSError, ValueError) as error:
        raise JobError(f"{weights} is no Hugging Face checkpoint: {error}", "set checkpoint.path to one") from error
    if missing := sorted(shard for shard in shards if not (weights / shard).is_file()):
        raise JobError(f"{weights} lacks {', '.join(missing)}", "complete the download: its files are *.safetensors")
    for key, name in names.items():
        if config.get(name, plan["model"][key]) != plan["model"][key]:
            raise JobError(
                f"{weights} has {name} = {config[name]}, and model {plan['model']['name']} has {plan['model'][key]}",
                "choose the model that this checkpoint is of",
            )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
