"""Convert a Hugging Face checkpoint to the format of the plan's engine, once for all jobs.

In: a plan, and the engine's importer. Out: $NEMO_HOME/models/<place>/{context,weights}.

checkpoint.source in the plan says where the weights come from: "hub" (downloaded from Hugging Face, unless they are on
this machine), "directory" (a Hugging Face checkpoint on a disk), "random" (generated). The engine's importer converts them.
The guard publishes the result. Each engine has its own format, so the engine is part of the checkpoint's identity.

Environment: NEMO_HOME (default $STAGE_PATH/HF_ckpt), HF_HOME, HF_TOKEN or HF_TOKEN_PATH, HF_HUB_OFFLINE.
"""

import functools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.guard import manifest, publish
from runtime.hub import fetch, find
from runtime.job import variables
from runtime.job.environment import installed
from runtime.job.errors import JobError
from runtime.job.progress import say, timed
from runtime.weights import hub, random_llama

Plan = dict[str, Any]
# Converts a Hugging Face directory (first path) into the checkpoint (second path). Returns facts for the manifest.
Importer = Callable[[Path, Path], dict[str, Any]]
ARCHITECTURE = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "vocab_size",
)
CONTEXT_BYTES = 64 << 20  # tokenizer, config and manifest: an upper bound
MARGIN = 1.05  # of the estimate of what is written


def convert(plan: Plan, importer: Importer) -> int:
    """Convert the checkpoint unless that is done; exit code 0. JobError: no access, network or disk space; wrong shape."""
    begin = time.monotonic()
    place = directory(plan)
    if converted(plan):
        say(f"the converted checkpoint exists: {place} (checked in {time.monotonic() - begin:.1f} s)")
        return 0
    build = functools.partial(_build, plan, importer)
    publish.ensure(place, source(plan), build, need_bytes=lambda: _need_bytes(plan))
    say(f"the converted checkpoint is ready: {place} (after {time.monotonic() - begin:.0f} s)")
    return 0


def converted(plan: Plan) -> bool:
    """Whether the plan's converted checkpoint exists and has no flaw. Takes milliseconds."""
    return manifest.flaw(directory(plan), source(plan)) is None


def verify(plan: Plan) -> int:
    """Read every byte of the checkpoint. Exit code 0 if it is unchanged; otherwise 1, and the checkpoint is renamed."""
    with timed(f"reading every byte of {directory(plan)}"):
        flaw = manifest.flaw(directory(plan), source(plan), thorough=True)
    if flaw:
        say(f"the checkpoint in {directory(plan)} cannot be used: {flaw}. The next job converts it again")
        publish.set_aside(directory(plan), source(plan), thorough=True)
    return 1 if flaw else 0


def directory(plan: Plan) -> Path:
    """Path of the plan's converted checkpoint."""
    home = os.environ.get("NEMO_HOME") or Path(os.environ.get("STAGE_PATH") or Path.cwd(), "HF_ckpt")
    return Path(home, "models", plan["checkpoint"]["place"])


def tokenizer(plan: Plan) -> Path:
    """The folder of the tokenizer in the plan's converted checkpoint."""
    context = directory(plan) / "context"
    return context / "nemo_tokenizer" if plan["engine"] == "nemo" else context


def origin(plan: Plan) -> dict[str, Any]:
    """What the conversion found: the commit of the weights, versions of packages."""
    document: dict[str, Any] = json.loads((directory(plan) / manifest.NAME).read_text())
    return dict(document["origin"])


def source(plan: Plan) -> dict[str, Any]:
    """What identifies the checkpoint: two plans with the same source use the same checkpoint."""
    kind = plan["checkpoint"]["source"]
    identity = {"kind": f"{plan['engine']} checkpoint", "source": kind} | {key: plan["model"][key] for key in ARCHITECTURE}
    if kind == "hub":
        return identity | {"hf_id": plan["model"]["hf_id"], "revision": plan["checkpoint"]["revision"]}
    if kind == "random":
        return identity | {"seed": plan["seed"]}
    return identity | {"path": str(user_directory(plan))}


def _build(plan: Plan, importer: Importer, staging: Path) -> dict[str, Any]:
    weights, origin = _fetch(plan, staging / "from")
    _refuse_unfit(plan, weights)
    find.go_offline()
    origin |= importer(weights, staging)
    shutil.rmtree(staging / "from", ignore_errors=True)
    return origin


def _fetch(plan: Plan, scratch: Path) -> tuple[Path, dict[str, Any]]:
    """A directory in Hugging Face format, and its origin for the manifest."""
    kind, model = plan["checkpoint"]["source"], plan["model"]
    if kind == "hub":
        weights = fetch.fetch(hub.repository(plan), plan["name"])
        return weights, {"commit": find.commit(weights)}
    if kind == "random":
        with timed(f"generating random weights: {model['parameters']:,} parameters"):
            random_llama.write(plan, scratch)
        return scratch, {}
    return user_directory(plan), {}


def _need_bytes(plan: Plan) -> int:
    """Bytes that download and conversion write."""
    kind, weights = plan["checkpoint"]["source"], weight_bytes(plan)
    if kind == "hub":
        weights += fetch.bytes_to_download(hub.repository(plan), plan["name"])
    if kind == "random":
        weights *= 2
    return int(weights * MARGIN) + CONTEXT_BYTES


def weight_bytes(plan: Plan) -> int:
    """Estimated bytes of the model's weights: two per parameter, in small models four."""
    parameters: int = plan["model"]["parameters"]
    return parameters * (2 if parameters >= random_llama.LARGE else 4)


def versions(*packages: str) -> dict[str, str]:
    """The versions of these packages, for the manifest; "" for one that is not installed."""
    return {name: installed(name) or "" for name in packages}


def user_directory(plan: Plan) -> Path:
    """Path of a checkpoint of source "directory"; a relative checkpoint.path is below STAGE_PATH."""
    path = variables.path_with_values("checkpoint.path", plan["checkpoint"]["path"])
    return Path(os.environ.get("STAGE_PATH") or Path.cwd(), path)


def _refuse_unfit(plan: Plan, weights: Path) -> None:
    """JobError if a file is missing or the shape is not the model's: the importer would notice late, or never."""
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
        raise JobError(f"{weights} is not a Hugging Face checkpoint: {error}", "set checkpoint.path to one") from error
    if missing := sorted(shard for shard in shards if not (weights / shard).is_file()):
        raise JobError(f"{weights}: files are missing: {', '.join(missing)}", "complete the download of *.safetensors")
    for key, name in names.items():
        if config.get(name, plan["model"][key]) != plan["model"][key]:
            raise JobError(
                f"{weights} has {name} = {config[name]}, but model {plan['model']['name']} has {plan['model'][key]}",
                "set model to the model of this checkpoint, or checkpoint.path to another checkpoint",
            )
