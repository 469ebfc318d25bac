#!/usr/bin/env python3
"""sft_nemo_llama3_8b_bf16_32: the program that each task of the job runs.

In: the plan below and one command. Out: an exit code.

Written by ftgen 0.1.0 from sft_bf16_32.toml. The job's script runs it. To run it by hand:

    STAGE_PATH=/shared/folder python3 sft_bf16_32.py COMMAND

    check      print an error for each thing that is missing
    packages   check only the packages of this Python
    missing    print what a job would have to download; exit code 0 if nothing is missing, 1 if something is
    download   download the weights and the data, where there is a network; needs only huggingface_hub
    data       prepare the training data, and show its counts and an example with the text that the loss counts
    converted  exit code 0 if the converted checkpoint exists, 1 if not
    convert    download the weights and the data, and convert the weights to the engine's format, unless that is done
    verify     read every byte of the converted checkpoint; if a byte has changed, rename the checkpoint
    finetune   train; start one process per GPU, with RANK, LOCAL_RANK and WORLD_SIZE (or Slurm's own variables)
    export     export a trained checkpoint to Hugging Face format; `export FOLDER`: that of a run or of a checkpoint
"""

import json
import os
import socket
import sys
import textwrap
import traceback
from pathlib import Path

PLAN = json.loads(r"""
{
  "format": 1,
  "ftgen_version": "0.1.0",
  "name": "sft_bf16_32",
  "experiment": "sft_nemo_llama3_8b_bf16_32",
  "spec_file": "sft_bf16_32.toml",
  "spec_sha256": "0c2f5640dd0b00809260d3ca7742c01be8eecce681c173b8c65fe6d741678f16",
  "point": {},
  "overrides": {},
  "engine": "nemo",
  "scheme": "sft",
  "precision": "bf16",
  "fp8_scaling": null,
  "model": {
    "name": "llama3_8b",
    "hf_id": "meta-llama/Meta-Llama-3-8B",
    "nemo_recipe": "llama3_8b",
    "megatron_bridge_recipe": "llama.h100.llama3:llama3_8b",
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 14336,
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "head_size": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rope_scaling_factor": null,
    "tied_embeddings": false,
    "qkv_bias": false,
    "parameters": 8030261248,
    "flops_per_sample": 184000000000000.0
  },
  "checkpoint": {
    "source": "hub",
    "revision": null,
    "path": null,
    "gated": true,
    "place": "meta-llama/Meta-Llama-3-8B"
  },
  "lora": null,
  "gpu": {
    "name": "h100",
    "memory_gib": 80,
    "peak_flops": 989000000000000.0
  },
  "gpus": 32,
  "nodes": 4,
  "gpus_per_node": 8,
  "max_steps": 100,
  "epochs": null,
  "global_batch_size": 128,
  "micro_batch_size": 1,
  "seq_length": 4096,
  "seed": 1234,
  "parallelism": {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": null,
    "sequence_parallel": false,
    "data_parallel_size": 32
  },
  "data": {
    "kind": "squad",
    "path": null,
    "dataset": null,
    "revision": null,
    "config": null,
    "split": "train",
    "columns": {
      "messages": null,
      "tools": null,
      "prompt": null,
      "completion": null
    },
    "examples": 14000,
    "packed": true,
    "chat_template": null,
    "too_long": "truncate",
    "order": "recipe"
  },
  "optimizer": {
    "learning_rate": 5e-06,
    "warmup_steps": 50
  },
  "optimizations": {
    "cuda_graphs": true,
    "fused_cross_entropy": true,
    "loss_tokens_only": true,
    "loss_tokens_in_last_layer": true,
    "scale_small_tensor": false,
    "fused_wgrad_accumulation": true,
    "skip_nan_check": true,
    "async_step": true,
    "skip_shard_transposes": false,
    "short_padding": true,
    "fused_rotary": true,
    "short_attention": true,
    "fused_lora_add": false,
    "fused_residual_add": true,
    "fp8_swiglu": false,
    "fused_swiglu": true,
    "early_gather": false,
    "bf16_grads_in_adam": false,
    "merge_micro_batches": false,
    "op_fuser": false
  },
  "profile": null,
  "window_steps": 20,
  "environment": {
    "NCCL_NVLS_ENABLE": "0",
    "NVTE_ASYNC_AMAX_REDUCTION": "1",
    "NVTE_DP_AMAX_REDUCE_INTERVAL": "0",
    "NVTE_FLASH_ATTN": "1",
    "NVTE_FUSED_ATTN": "1",
    "TOKENIZERS_PARALLELISM": "False",
    "TORCH_NCCL_AVOID_RECORD_STREAMS": "1"
  },
  "sources": [],
  "stage_path": null,
  "modules": [],
  "setup_lines": [],
  "prefix": [],
  "python": {
    "kind": "none",
    "path": null,
    "image": null,
    "image_from": null,
    "mounts": [],
    "writable": false,
    "mount_home": false,
    "container_name": false,
    "container_env": []
  },
  "node_check": {
    "on": true,
    "bad": "warn",
    "expected": {
      "driver_name": "H100",
      "peak_bf16_tflops": 989,
      "memory_gb_per_s": 3350,
      "nvlinks": 18,
      "nvlink_gb_per_s": 450
    }
  },
  "telemetry": true,
  "slurm": {
    "partition": null,
    "account": null,
    "qos": null,
    "reservation": null,
    "constraint": null,
    "gpu_request": "none",
    "gpu_type": null,
    "gres": [],
    "segment": null,
    "mpi": "none",
    "exclusive": true,
    "cpus_per_gpu": null,
    "mem": "0",
    "mem_per_cpu": null,
    "mem_per_gpu": null,
    "requeue": null,
    "end_before_limit_s": 120,
    "convert": "job",
    "convert_flags": [],
    "job_name_prefix": null,
    "output_folder": null,
    "master_addr": null,
    "sbatch_flags": [],
    "srun_flags": [],
    "walltime_s": 1800,
    "convert_walltime_s": 7200
  }
}
""")

HERE = Path(__file__).resolve().parent


def find_runtime() -> None:
    """Add the folder of runtime/ to sys.path. It is beside this file in a run directory, and above it in ftgen's sources."""
    for folder in (HERE, HERE.parent):
        if (folder / "runtime" / "check.py").is_file():
            sys.path.insert(0, str(folder))
            return
    sys.exit(f"ftgen: error: there is no runtime/ beside {__file__}\n  hint: run bash {PLAN['name']}.sh --unpack FOLDER")


def find_sources() -> None:
    """Add the plan's own sources of the framework to sys.path, before all others. Exits if one of them is missing."""
    for source in PLAN["sources"]:
        folder = Path(os.environ["STAGE_PATH"], source["folder"])
        if not (folder / ".ftgen-commit").is_file():
            sys.exit(f"ftgen: error: {folder} is missing\n  hint: ftgen setup --site SITE {PLAN['name']}.toml clones it")
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def set_environment() -> None:
    """Set the plan's variables again: in a container, those of the image override those of the script."""
    from runtime.job import variables

    env = os.environ
    stage = env.setdefault("STAGE_PATH", str(Path.cwd()))
    env.setdefault("FTGEN_RUN_DIR", str(Path(stage, "logs", "by_hand", PLAN["experiment"])))
    user_home = env.get("HF_HOME") or f"{env.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    user_cache = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or f"{user_home}/hub"
    env.setdefault("HF_TOKEN_PATH", str(Path(user_home, "token").expanduser()))
    env.setdefault("FTGEN_HUB_CACHE", user_cache)
    env["NEMO_HOME"] = env["HF_HOME"] = str(Path(stage, "HF_ckpt"))
    env["NEMORUN_HOME"] = str(Path(stage, "logs"))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if f"FTGEN_{name}" in env:
            env[name] = env[f"FTGEN_{name}"]
    variables.set_variables(PLAN["environment"])


def finetune() -> int:
    """Train. With several ranks, each line of an error starts with its rank and host, because many can fail at once."""
    from runtime import download, engines
    from runtime.hub import find
    from runtime.job import caches, prefix, ranks
    from runtime.job.errors import JobError

    try:
        ranks.be_a_rank(PLAN)
        prefix.enter(PLAN)
        caches.set_places()
        if not download.missing(PLAN):
            find.go_offline()  # on a node without a network, no library must wait for one
        return int(engines.module(PLAN, "train").train(PLAN))
    except Exception as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        text = f"ftgen: error: {error}" if isinstance(error, JobError) else traceback.format_exc().rstrip()
        who = f"[rank {os.environ['RANK']} on {socket.gethostname()}] "
        print(textwrap.indent(text, who, lambda _line: True), file=sys.stderr, flush=True)
        return 1


def main(command: str, argument: str = "") -> int:
    """Run one command; returns its exit code."""
    if sys.version_info < (3, 10):
        what = f"{sys.executable} is Python {sys.version.split()[0]}, but 3.10 or newer is needed"
        sys.exit(f"ftgen: error: {what}\n  hint: export FTGEN_PYTHON=<a newer interpreter>")
    find_runtime()
    set_environment()
    if command not in {"missing", "download"}:
        find_sources()
    from runtime.job import ranks, sharing, watchdog
    from runtime.job.errors import JobError

    sharing.share_new_files(Path(os.environ["STAGE_PATH"]))
    watchdog.begin(command)
    try:
        if command == "finetune":
            return finetune()
        # every other command is one process, also in a job or a session of several tasks
        ranks.be_alone()
        if command == "check":
            from runtime import check

            return check.check(PLAN)
        if command == "packages":
            from runtime import check

            return check.packages(PLAN)
        if command in {"missing", "download"}:
            from runtime import download

            return download.download(PLAN) if command == "download" else download.tell_missing(PLAN)
        if command == "data":
            from runtime import show_data

            return show_data.show(PLAN)
        if command in {"converted", "convert", "verify"}:
            from runtime import engines
            from runtime.data import prepare
            from runtime.weights import checkpoint

            if command == "converted":
                return 0 if checkpoint.converted(PLAN) else 1
            if command == "verify":
                return checkpoint.verify(PLAN)
            prepare.download(PLAN)
            return int(engines.module(PLAN, "convert").convert(PLAN))
        if command == "export":
            from runtime.export import export

            return export.export(PLAN, argument)
    except JobError as error:
        print(f"ftgen: error: {error}", file=sys.stderr, flush=True)
        return 1
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if 2 <= len(sys.argv) <= 3 else main(""))
