#!/usr/bin/env bash
# sft_nemo_llama3_8b_fp8_8: SFT FP8 fine-tuning of llama3_8b on 1 node of 8 h100
# Written by ftgen 0.1.0 from sft_fp8_8.toml (sha256 9f4f6e3b1426468bffe6c42e3b39ec676b0a0ab8f856c2eb1177fd5466683193).
# Change the spec and compile it again rather than this file.
#
#   sbatch sft_fp8_8.sh           on a Slurm cluster; several scripts after it run one after the other
#   bash sft_fp8_8.sh             on this machine
#   bash sft_fp8_8.sh --unpack F  only write the entrypoint and the runtime into folder F
#
# Reads: STAGE_PATH (where checkpoint, data and logs live; default: the folder it is submitted from),
# HF_TOKEN (or huggingface_hub's token file) where the model is gated, FTGEN_PYTHON (an interpreter to use instead).
#
#SBATCH --job-name=ftgen_llama3_8b
#SBATCH --dependency=singleton
#SBATCH --comment=sft_nemo_llama3_8b_fp8_8
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --mem=0
#SBATCH --output=sbatch_sft_nemo_llama3_8b_fp8_8_%j.out
#SBATCH --open-mode=append
#SBATCH --exclusive

# shellcheck disable=SC2016 # what the spec says is literal: nothing in it is expanded
set -euo pipefail

readonly name=sft_fp8_8
readonly experiment=sft_nemo_llama3_8b_fp8_8
readonly nodes=1 tasks_per_node=8 tasks=8
# What this script sets, and a job that it submits must not inherit.
readonly ours=(STAGE_PATH FTGEN_RUN_DIR MASTER_ADDR MASTER_PORT PYTHONUNBUFFERED NCCL_NVLS_ENABLE NVTE_ASYNC_AMAX_REDUCTION NVTE_DP_AMAX_REDUCE_INTERVAL NVTE_FLASH_ATTN NVTE_FUSED_ATTN TOKENIZERS_PARALLELISM TORCH_NCCL_AVOID_RECORD_STREAMS)

main() {
    local mode=finetune
    local converted_by=
    case ${1:-} in
        --unpack)
            unpack "${2:?--unpack needs a folder}"
            return
            ;;
        --convert)
            mode=convert
            shift
            ;;
        --after)
            converted_by=${2:?--after needs a job}
            shift 2
            ;;
    esac
    rest=("$@")
    is_batch_job || run_all
    exec 3>&1
    inherited=$(for variable in "${ours[@]}"; do [[ -z ${!variable+set} ]] || declare -p "$variable"; done)
    trap 'finish $?' EXIT
    trap 'stop 124 "the time limit is near: the run is ended, with nothing half-made left behind"' USR1
    trap 'stop 143 "SIGTERM: cancelled, pre-empted or requeued"' TERM
    trap 'stop 130 "interrupted"' INT
    find_places
    open_log $mode
    load_environment $mode
    find_python
    # from here on a failing step ends the job with its own status
    if [[ $mode == convert ]]; then
        run_once convert
        return
    fi
    run_once check
    if is_batch_job && [[ -z $converted_by ]] && ! run_once converted && hand_over; then
        return
    fi
    if is_batch_job; then submit_the_rest "$SLURM_JOB_ID"; fi
    run_once convert
    run_tasks finetune
}

say() { printf 'ftgen: %s\n' "$*"; }
# To Slurm's own output file too: a requeued job reads there what it has submitted.
tell() {
    say "$*"
    say "$*" >&3
}
die() {
    printf 'ftgen: error: %s\n  hint: %s\n' "$1" "$2" >&2
    exit 1
}
is_batch_job() { [[ -n ${SLURM_JOB_ID:-} && ${SLURM_TASK_PID:-} == "$$" ]]; }

# `bash a.sh b.sh c.sh` runs them, one after the other, and ends with the last failure.
run_all() {
    local script status=0
    if ((${#rest[@]} == 0)); then return; fi
    for script in "$0" "${rest[@]}"; do bash "$script" || status=$?; done
    exit "$status"
}

# submit_the_rest AFTER [ALL]: `sbatch a.sh b.sh c.sh` makes b.sh and c.sh arguments of a.sh, which submits them, the first
# after job AFTER, each after the one before, however that ends. A job only ever waits for jobs with smaller numbers, so
# that none can wait for itself. ALL are the jobs before them.
submit_the_rest() {
    local after=$1 all=${2:-$1} script job number=1 total=$((${#rest[@]} + 1))
    # in a trap a bare `return` would give the status that the job ends with
    if ((total == 1)) || [[ -n ${rest_is_submitted:-} ]]; then return 0; fi
    rest_is_submitted=yes
    for script in "${rest[@]}"; do
        ((number += 1))
        job=$(sed -n "s/^ftgen: $number of $total: job \([0-9]*\) runs .*/\1/p" "/proc/$$/fd/3" 2>/dev/null | tail -n 1) || true
        if [[ -z $job ]]; then # else it was submitted before this job was requeued
            if ! job=$(submit "$script" "--dependency=singleton,afterany:$after" "$script"); then
                tell "$number of $total: $script could not be submitted"
                continue
            fi
            tell "$number of $total: job $job runs $script after job $after"
        fi
        after=$job
        all+=" $job"
    done
    tell "this cancels all of them: scancel $all"
}

# submit LIKE WORDS...: `sbatch WORDS...` as the user would have, with what they said for this job in place of its header
# if the header of LIKE says the same as this one's. Prints the new job's number.
submit() (
    like=$1 options=()
    shift
    cd "$SLURM_SUBMIT_DIR" || return
    record=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null) || record=
    for field in Account Partition QOS Reservation TimeLimit; do
        option=${field,,} option=${option%limit} got=
        if [[ $record =~ [[:space:]]$field=([^[:space:]]+) ]]; then got=${BASH_REMATCH[1]}; fi
        mine=$(header "$0" "$option")
        if [[ -n $got && $got != "(null)" && $got != "$mine" && $mine == "$(header "$like" "$option")" ]]; then
            options+=("--$option=$got")
        fi
    done
    # the environment as the user had it; a job's own SLURM_ variables would reach into the jobs it submits
    unset "${ours[@]}"
    eval "$inherited"
    for variable in $(compgen -e SLURM_); do
        if [[ $variable != SLURM_CONF ]]; then unset "$variable"; fi
    done
    job=$(sbatch --parsable "${options[@]}" "$@") || return
    printf %s "${job%%;*}"
)

# header FILE OPTION: what a script's #SBATCH line says of it.
header() { sed -n -e '/^set /q' -e "s/^#SBATCH --$2=//p" "$1" 2>/dev/null; }

# The checkpoint is not there: a small job makes it, and this one makes way for a copy of itself after that one.
hand_over() {
    local job copy script=$code/convert.sh
    sed -E '1,/^set /{/^#SBATCH --(dependency|exclusive|gres|gpus-per-node|ntasks-per-node)(=|$)/d}' "$0" >"$script"
    if ! job=$(submit "$0" --job-name=ftgen_llama3_8b_convert --dependency=singleton --nodes=1 --ntasks=1 --time=02:00:00 "$script" --convert); then
        say "no job can be submitted for the conversion: it is done in this one"
        return 1
    fi
    if ! copy=$(submit "$0" "--dependency=singleton,afterany:$job" "$0" --after "$job"); then
        scancel "$job" || true
        say "no job can be submitted after the conversion: it is done in this one"
        return 1
    fi
    tell "the checkpoint is not there: job $job makes it, on one node, and job $copy runs this script after it"
    # this was no run: no log of it is to be found by who looks for runs
    mv "$log" "${log/"/log-"/"/submit-"}"
    submit_the_rest "$copy" "$job $copy"
}

# STAGE_PATH, and below it the recipe's layout: logs/experiments/<experiment>/<experiment>_<id>/<experiment>/log-….out
find_places() {
    local id=${SLURM_JOB_ID:-} runs
    export STAGE_PATH=${STAGE_PATH:-${SLURM_SUBMIT_DIR:-$PWD}}
    if [[ ! -d $STAGE_PATH ]]; then
        die "STAGE_PATH is no folder: $STAGE_PATH" "mkdir -p it, or export STAGE_PATH=<a folder that all nodes share>"
    fi
    if [[ ! -w $STAGE_PATH ]]; then
        die "STAGE_PATH cannot be written to: $STAGE_PATH" "export STAGE_PATH=<a folder of yours that all nodes share>"
    fi
    STAGE_PATH=$(cd "$STAGE_PATH" && pwd)
    runs=$STAGE_PATH/logs/experiments/$experiment
    mkdir -p "$runs"
    if [[ -z $id ]]; then
        id=$(date +%s)
        until mkdir "$runs/${experiment}_$id" 2>/dev/null; do
            [[ -d $runs/${experiment}_$id ]] || die "cannot write to $runs" "is the disk full, or the folder somebody else's?"
            ((id += 1))
        done
    fi
    run_id=$id
    export FTGEN_RUN_DIR=$runs/${experiment}_$id/$experiment
    code=$FTGEN_RUN_DIR/code
    unpack "$code"
}

# Everything from here on goes to the log, whose first line is the plan; on a terminal it is shown as well.
open_log() {
    local plan kind=log account=${SLURM_JOB_ACCOUNT:-local}
    if [[ $1 == convert ]]; then kind=convert; fi
    account=${account//[^A-Za-z0-9_-]/}
    log=$FTGEN_RUN_DIR/$kind-${account:-none}.${experiment}_${run_id}_${SLURM_RESTART_COUNT:-0}.out
    plan=$(sed -n '/^PLAN = /,/^""")$/{//!p;}' "$code/$name.py" | sed 's/^ *//' | tr -d '\n')
    printf '%s\n' "$plan" >"$FTGEN_RUN_DIR/plan.json"
    printf 'ftgen plan: %s\n' "$plan" >>"$log"
    say "log: $log"
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        exec >>"$log" 2>&1
    else
        exec > >(exec tee -i -a "$log") 2>&1
        tee=$!
    fi
}

finish() {
    trap '' USR1 TERM INT
    # a job that failed before it came to that; one that was stopped before it submits nothing
    if [[ -z ${stopping:-} ]] && is_batch_job; then submit_the_rest "$SLURM_JOB_ID"; fi
    if [[ -n ${ender:-} ]]; then kill "$ender" 2>/dev/null || true; fi
    say "exit status $1"
    if [[ -n ${tee:-} ]]; then
        exec >/dev/null 2>&1 3>&1
        wait "$tee" || true
    fi
}

# A signal: what runs is asked to end, and the job ends with status $1.
stop() {
    if [[ -n ${stopping:-} ]]; then return 0; fi
    stopping=$1
    printf 'ftgen: error: %s\n' "$2" >&2
    if ((${#children[@]} == 0)); then exit "$1"; fi
}
children=()

end_children() {
    # of a job that it ends Slurm has asked every process itself, and once is enough
    if [[ -n ${SLURM_JOB_ID:-} ]] && ((stopping == 143)); then sleep 2; fi
    if [[ -n ${step:-} ]]; then
        scancel --signal=TERM "$SLURM_JOB_ID.$step" || true # the tasks: srun, if it were asked, would kill them at once
    else
        kill "${children[@]}" || true
    fi
    sleep 20
    kill -KILL "${children[@]}"
}

# await COMMAND...: run it so that a signal is acted upon at once; its status.
await() {
    local status
    "$@" &
    children=($!)
    status=0
    wait_for "${children[0]}" || status=$?
    children=()
    if [[ -n ${stopping:-} ]]; then exit "$stopping"; fi
    return "$status"
}

# A trapped signal ends bash's `wait`, and says nothing of the child. Of a child that the same signal ended, bash can miss
# the end and wait for ever: once the job is to stop, the child's own number is looked for.
wait_for() {
    local status=0
    wait "$1" || status=$?
    if [[ -z ${stopping:-} ]]; then return "$status"; fi
    if [[ -z ${ender:-} ]]; then
        end_children >/dev/null 2>&1 3>&1 &
        ender=$!
    fi
    while kill -0 "$1" 2>/dev/null; do sleep 0.1 || true; done
    return "$stopping"
}

load_environment() {
    export NCCL_NVLS_ENABLE=0
    export NVTE_ASYNC_AMAX_REDUCTION=1
    export NVTE_DP_AMAX_REDUCE_INTERVAL=0
    export NVTE_FLASH_ATTN=1
    export NVTE_FUSED_ATTN=1
    export TOKENIZERS_PARALLELISM=False
    export TORCH_NCCL_AVOID_RECORD_STREAMS=1
    export PYTHONUNBUFFERED=1
    MASTER_ADDR=127.0.0.1
    MASTER_PORT=$((20000 + RANDOM % 10000))
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        if [[ $1 == finetune ]] && ((SLURM_JOB_NUM_NODES != nodes)); then
            die "the job has $SLURM_JOB_NUM_NODES nodes, the plan needs $nodes" "drop --nodes, or change gpus in the spec"
        fi
        if [[ $1 == finetune ]]; then warn_of_variables; fi
        read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    elif ((nodes > 1)); then
        die "this run needs $nodes nodes of $tasks_per_node GPUs" "submit it: sbatch $name.sh"
    fi
    # a batch script runs on the first node: another program there may have the port
    while (: <"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do ((MASTER_PORT += 1)); done
    export MASTER_ADDR MASTER_PORT
}

# The submitting shell's SBATCH_ variables win over this script's header.
warn_of_variables() {
    local variable value
    while read -r variable value; do
        if [[ -n ${!variable+set} && ${!variable} != "$value" ]]; then
            tell "warning: $variable=${!variable}, set where the job was submitted, wins over this script (${value:-nothing})"
        fi
    done <<'END_OF_FTGEN_FILE'
SBATCH_ARRAY_INX 
SBATCH_CLUSTERS 
SBATCH_CORE_SPEC 
SBATCH_EXCLUSIVE 
SBATCH_GPUS 
SBATCH_GPUS_PER_NODE 
SBATCH_GPUS_PER_TASK 
SBATCH_GRES 
SBATCH_JOB_NAME ftgen_llama3_8b
SBATCH_MEM_PER_CPU 
SBATCH_MEM_PER_GPU 
SBATCH_MEM_PER_NODE 0
SBATCH_NO_REQUEUE 
SBATCH_OPEN_MODE append
SBATCH_OUTPUT sbatch_sft_nemo_llama3_8b_fp8_8_%j.out
SBATCH_OVERCOMMIT 
SBATCH_REQUEUE 
SBATCH_SIGNAL B:USR1@120
SBATCH_THREADS_PER_CORE 
SBATCH_TIMELIMIT 00:30:00
END_OF_FTGEN_FILE
}

# The interpreter, and what srun needs for it.
find_python() {
    srun_flags=()
    python=(python3)
    if [[ -n ${FTGEN_PYTHON:-} ]]; then python=("$FTGEN_PYTHON"); fi
    if ! command -v "${python[0]}" >/dev/null; then
        die "no Python: ${python[0]}" "activate the environment that holds NeMo, or export FTGEN_PYTHON=<its interpreter>"
    fi
}

# One task: what the whole job needs once.
run_once() {
    await "${python[@]}" "$code/$name.py" "$1"
}

# Slurm numbers a job's steps.
next_step() { step=$((${step:--1} + 1)); }

# One task for each GPU.
run_tasks() {
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        run_step "$1"
        return
    fi
    local rank status=0
    for ((rank = 0; rank < tasks; rank++)); do
        RANK=$rank LOCAL_RANK=$rank NODE_RANK=0 WORLD_SIZE=$tasks "${python[@]}" "$code/$name.py" "$1" &
        children+=($!)
    done
    for ((rank = 0; rank < tasks && status == 0; rank++)); do
        # the first task that fails decides; the others would wait for it for ever
        wait -n || status=$?
    done
    if ((status)); then kill "${children[@]}" 2>/dev/null || true; fi
    for rank in "${children[@]}"; do wait_for "$rank" || true; done
    children=()
    return "${stopping:-$status}"
}

run_step() {
    local before status=0
    before=$(wc -c <"$log")
    next_step
    await srun --nodes="$nodes" --ntasks="$tasks" --ntasks-per-node="$tasks_per_node" --kill-on-bad-exit=1 --export=ALL \
        --mpi=pmix "${srun_flags[@]}" "${python[@]}" "$code/$name.py" "$1" || status=$?
    if ((status)); then status=$(first_failure "$before" "$status"); fi
    return "$status"
}

# first_failure FROM STATUS: srun's STATUS is the highest, and that is of the tasks that it killed; the task whose end it
# reports first, in the log after FROM bytes, decides.
first_failure() {
    local report
    report=$(tail -c "+$(($1 + 1))" "$log" | sed -n '/srun: error: .*: tasks\{0,1\} /{s/.*srun: error: .*: tasks\{0,1\} [^:]*: //p;q;}') || true
    case $report in
        "Exited with exit code "*) printf %s "${report##* }" ;;
        "Segmentation fault"*) printf 139 ;;
        "Aborted"*) printf 134 ;;
        "Bus error"*) printf 135 ;;
        "Killed"* | "Out Of Memory"*) printf 137 ;;
        *) printf %s "$2" ;;
    esac
}

# The entrypoint and the runtime, verbatim.
unpack() {
    mkdir -p "$1"/runtime
    mkdir -p "$1"/runtime/data
    mkdir -p "$1"/runtime/engines
    mkdir -p "$1"/runtime/engines/nemo
    mkdir -p "$1"/runtime/engines/nemo/optimizations
    mkdir -p "$1"/runtime/guard
    mkdir -p "$1"/runtime/job
    mkdir -p "$1"/runtime/weights
    cat >"$1"/runtime/__init__.py <<'END_OF_FTGEN_FILE'
"""What runs inside the job. It uses the standard library and the framework, never ftgen.

In: the plan, in the job's entrypoint. Out: a checkpoint, data, step lines. Start with `check.py`, then `engines/nemo/train.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/check.py <<'END_OF_FTGEN_FILE'
"""The job's first seconds: what is missing, all of it, before anything is done. In: a plan. Out: an exit status.

Nothing heavy is imported: versions are read from the packages' metadata, and the GPUs of this host from its driver.

Environment: STAGE_PATH, NEMO_HOME, HF_TOKEN, HF_TOKEN_PATH, HF_HOME, CUDA_VISIBLE_DEVICES.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from runtime.data import jsonl
from runtime.engines.nemo import convert
from runtime.job.errors import JobError
from runtime.job.progress import say

Plan = dict[str, Any]
# Package, the versions that work (a prefix), why others do not.
PACKAGES = (
    ("nemo_toolkit", "2.7.", "2.7 is the last one with nemo.collections.llm, and 3 has none"),
    ("megatron-core", "0.15.", "NeMo 2.7 works with no other"),
    ("torch", "", ""),
    ("lightning", "", ""),
    ("transformers", "", ""),
    ("huggingface_hub", "", ""),
)
ON_A_GPU = (("transformer-engine", "", ""),)
DRIVER = Path("/proc/driver/nvidia/gpus")


def check(plan: Plan) -> int:
    """0 when the job can begin; else 1, and on stderr a line for each thing that is missing and one for what to do."""
    problems = [*_stage_path(), *_packages(plan), *_weights(plan), *_data(plan), *_gpus(plan)]
    for problem in problems:
        print(f"ftgen: error: {problem}", file=sys.stderr, flush=True)
    if not problems:
        say(f"nothing is missing for {plan['experiment']}")
    return 1 if problems else 0


def packages(plan: Plan) -> int:
    """The part of it that a login node can look at too: 0 when the packages of this Python are those the job needs."""
    problems = list(_packages(plan))
    for problem in problems:
        print(f"ftgen: error: {problem}", file=sys.stderr, flush=True)
    return 1 if problems else 0


def _stage_path() -> Iterator[JobError]:
    path = os.environ.get("STAGE_PATH", "")
    hint = "export STAGE_PATH=<a folder that all nodes see and you can write to>"
    if not path:
        yield JobError("STAGE_PATH is not set", hint)
    elif not Path(path).is_dir():
        yield JobError(f"STAGE_PATH: there is no folder {path} on this machine", hint)
    elif not os.access(path, os.W_OK | os.X_OK):
        yield JobError(f"STAGE_PATH: {path} cannot be written to", hint)


def _packages(plan: Plan) -> Iterator[JobError]:
    hint = f"install ftgen's extra {'runtime' if plan['gpu']['name'] == 'cpu' else 'gpu'} for {sys.executable}"
    for name, wanted, why in PACKAGES + (() if plan["gpu"]["name"] == "cpu" else ON_A_GPU):
        try:
            found = version(name)
        except PackageNotFoundError:
            yield JobError(f"the package {name} is not installed", hint)
            continue
        if not found.startswith(wanted):
            yield JobError(f"{name} {found} is installed, {wanted}x is needed: {why}", hint)


def _weights(plan: Plan) -> Iterator[JobError]:
    asked = plan["checkpoint"]
    if convert.converted(plan):
        return
    if asked["source"] == "directory" and not (folder := convert.user_directory(plan)).is_dir():
        yield JobError(f"checkpoint.path: there is no folder {folder}", "give the path of a Hugging Face checkpoint")
    if asked["gated"] and not _has_token():
        yield JobError(
            f"{plan['model']['hf_id']} is gated, and there is no Hugging Face token",
            "export HF_TOKEN=<your token>, or run huggingface-cli login",
        )


def _has_token() -> bool:
    """Whether huggingface_hub would find one; it is not read here."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    file = Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token"))
    return file.is_file() and file.stat().st_size > 0


def _data(plan: Plan) -> Iterator[JobError]:
    if plan["data"]["kind"] == "jsonl":
        try:
            jsonl.user_file(plan)
        except JobError as problem:
            yield problem


def _gpus(plan: Plan) -> Iterator[JobError]:
    if plan["gpu"]["name"] == "cpu":
        return
    count = gpu_count()
    if count is not None and count < plan["gpus_per_node"]:
        yield JobError(
            f"the plan needs {plan['gpus_per_node']} GPUs on each node, and {count} can be used here",
            'ask Slurm for them (gpu_request in the site profile), or set gpus; gpu = "cpu" runs without',
        )


def gpu_count() -> int | None:
    """GPUs that this process may use; None when the driver is there and does not say."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in {"", "-1"}])
    if DRIVER.is_dir():
        return len(list(DRIVER.iterdir()))
    if not shutil.which("nvidia-smi"):
        return 0
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.count("UUID: GPU") if answer.returncode == 0 else None
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/__init__.py <<'END_OF_FTGEN_FILE'
"""Training data: SQuAD, synthetic examples, JSONL; packing.

In: a plan and a tokenizer. Out: folders below $STAGE_PATH/data. Start with `prepare.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/jsonl.py <<'END_OF_FTGEN_FILE'
"""The user's own examples, one {"input", "output"} a line. In: a plan. Out: training.jsonl and validation.jsonl."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.data.split import split
from runtime.guard.manifest import sha256_of
from runtime.job.errors import JobError

Plan = dict[str, Any]
SHOWN = 5  # faulty lines that an error shows


def identity(plan: Plan) -> dict[str, Any]:
    """The hash of the file."""
    return {"sha256": sha256_of(user_file(plan))}


def write(plan: Plan, folder: Path) -> None:
    """Read the file and split it."""
    split(read_jsonl(user_file(plan)), plan["seed"], folder)


def user_file(plan: Plan) -> Path:
    """The file of kind "jsonl"; a relative path is one below STAGE_PATH. JobError: it cannot be read."""
    path = Path(os.environ.get("STAGE_PATH") or Path.cwd(), plan["data"]["path"])
    if not path.is_file() or not os.access(path, os.R_OK):
        raise JobError(f"data.path: there is no file {path} that can be read", "give the path of a file on every node")
    return path


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """The examples of a file; JobError with the first faulty lines, numbered."""
    found = list(_lines(path))
    if faults := [example for example in found if isinstance(example, str)]:
        more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise JobError("; ".join(faults[:SHOWN]) + more, 'each line is {"input": "...", "output": "..."}')
    examples = [example for example in found if isinstance(example, dict)]
    if len(examples) < 2:
        raise JobError(f"{path}: {len(examples)} examples, at least 2 are needed", "one to train on, one to validate")
    return examples


def _lines(path: Path) -> Iterator[dict[str, str] | str]:
    """Of each line that is not empty its example, or what is wrong with it."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _example(line, f"{path}:{number}")


def _example(line: bytes, where: str) -> dict[str, str] | str:
    try:
        document = json.loads(line)
    except ValueError as error:
        return f"{where}: not JSON: {error}"
    if not isinstance(document, dict):
        return f"{where}: not an object"
    for key in ("input", "output"):
        if not isinstance(document.get(key), str) or not document[key].strip():
            return f'{where}: no text under "{key}"'
    return {key: document[key] for key in ("input", "output")}
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/packing.py <<'END_OF_FTGEN_FILE'
"""Examples to packed sequences, by NeMo. In: a folder of examples and a tokenizer. Out: files that NeMo's data module reads."""

from pathlib import Path
from typing import Any

from runtime.job.progress import timed


def index(folder: Path) -> None:
    """Write NeMo's line index of each .jsonl file now; if training wrote it, several jobs would write one file at once."""
    from nemo.collections.llm.gpt.data.utils import build_index_files

    build_index_files([str(path) for path in sorted(folder.glob("*.jsonl"))], newline_int=ord("\n"), workers=1)


def pack(plan: dict[str, Any], examples: Path, tokenizer: Path, staging: Path) -> None:
    """Tokenize and pack training.jsonl and validation.jsonl into sequences of plan["seq_length"] tokens."""
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.data.packed_sequence import prepare_packed_sequence_data

    with timed(f"packing the data into sequences of {plan['seq_length']} tokens"):
        for name in ("training", "validation"):
            prepare_packed_sequence_data(
                input_path=examples / f"{name}.jsonl",
                output_path=staging / f"{name}.npy",
                output_metadata_path=staging / "metadata.json",
                packed_sequence_size=plan["seq_length"],
                tokenizer=AutoTokenizer(str(tokenizer)),
                max_seq_length=plan["seq_length"],
                seed=plan["seed"],
                dataset_kwargs={"pad_to_max_length": True},
            )
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/prepare.py <<'END_OF_FTGEN_FILE'
"""The training data, made once for all jobs.

In: a plan and a tokenizer. Out: a folder with training.jsonl and validation.jsonl, one {"input", "output"} a line; and, if the
plan packs, a folder with the same examples tokenized and packed into sequences of seq_length tokens.

The guard publishes both below $STAGE_PATH/data, so ranks, nodes and jobs that start together make them once. Each kind of data
is a file of this folder with its name: `identity(plan)` gives what identifies its examples, `write(plan, folder)` writes them.
"""

import json
import os
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from runtime.data import packing
from runtime.guard import publish
from runtime.guard.manifest import sha256_of
from runtime.job.progress import timed

Plan = dict[str, Any]
FORMAT = 1  # of the files that are written


class Files(NamedTuple):
    """Where the data is."""

    examples: Path  # training.jsonl, validation.jsonl
    packed: Path | None  # training.npy, validation.npy, metadata.json


def prepare(plan: Plan, tokenizer: Path) -> Files:
    """Make what is missing. `tokenizer` is the folder of a Hugging Face tokenizer. JobError: a faulty file."""
    examples = identity(plan)
    folder = _folder(plan["data"]["kind"], examples)
    publish.ensure(folder, examples, lambda staging: _build(plan, staging))
    if not plan["data"]["packed"]:
        return Files(folder, None)
    packed = {
        "kind": "packed examples",
        "examples": examples,
        "tokenizer": sha256_of(tokenizer / "tokenizer.json"),
        "seq_length": plan["seq_length"],
        "seed": plan["seed"],
    }
    packed_folder = _folder(f"{plan['data']['kind']}-packed-{plan['seq_length']}", packed)
    publish.ensure(packed_folder, packed, lambda staging: packing.pack(plan, folder, tokenizer, staging))
    return Files(folder, packed_folder)


def identity(plan: Plan) -> dict[str, Any]:
    """What identifies the examples."""
    kind = plan["data"]["kind"]
    own: dict[str, Any] = _module(kind).identity(plan)
    return {"kind": f"{kind} examples", "format": FORMAT, "seed": plan["seed"]} | own


def _folder(name: str, identity: dict[str, Any]) -> Path:
    short = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return Path(os.environ.get("STAGE_PATH") or Path.cwd(), "data", f"{name}-{short}")


def _build(plan: Plan, staging: Path) -> None:
    kind = plan["data"]["kind"]
    with timed(f"preparing the data: {kind}"):
        _module(kind).write(plan, staging)
        packing.index(staging)


def _module(kind: str) -> Any:
    return import_module(f"runtime.data.{kind}")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/split.py <<'END_OF_FTGEN_FILE'
"""Examples to training and validation. In: a list of examples. Out: training.jsonl and validation.jsonl."""

import json
import random
from pathlib import Path

VALIDATION = 0.05  # of all examples, as NeMo's SQuAD module splits them


def split(examples: list[dict[str, str]], seed: int, folder: Path) -> None:
    """Write both files; the order of the examples is kept in each."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)  # noqa: S311
    count = max(1, round(len(examples) * VALIDATION))
    for name, numbers in (("validation", order[:count]), ("training", order[count:])):
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(examples[number]) + "\n" for number in sorted(numbers))
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/squad.py <<'END_OF_FTGEN_FILE'
"""SQuAD, as NeMo downloads and splits it. In: a plan. Out: training.jsonl and validation.jsonl."""

from pathlib import Path
from typing import Any

from runtime.job.errors import JobError


def identity(_plan: dict[str, Any]) -> dict[str, Any]:
    """Nothing beside the kind and the seed."""
    return {}


def write(plan: dict[str, Any], folder: Path) -> None:
    """Download and split; JobError without network."""
    from nemo.collections.llm import SquadDataModule

    try:
        SquadDataModule(dataset_root=folder, seed=plan["seed"]).prepare_data()
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise JobError(
            f"SQuAD cannot be downloaded: {reason}", 'set data.kind = "synthetic" in the spec: it needs no network'
        ) from error
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/synthetic.py <<'END_OF_FTGEN_FILE'
"""Made-up examples with the statistics of SQuAD. In: a plan. Out: training.jsonl and validation.jsonl."""

import random
from pathlib import Path
from typing import Any

from runtime.data import synthetic_text
from runtime.data.split import split


def identity(plan: dict[str, Any]) -> dict[str, Any]:
    """How many examples there are."""
    return {"examples": plan["data"]["examples"]}


def write(plan: dict[str, Any], folder: Path) -> None:
    """Make plan["data"]["examples"] examples from the seed."""
    rng = random.Random(plan["seed"])  # noqa: S311
    split([synthetic_text.example(rng) for _ in range(plan["data"]["examples"])], plan["seed"], folder)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/synthetic_text.py <<'END_OF_FTGEN_FILE'
"""Made-up text with the statistics of SQuAD: contexts, questions, answers. In: a random.Random. Out: words.

Most words are the commonest English ones, drawn by Zipf's law, so that a real tokenizer cuts the text into about as
many tokens as real text; the rest are invented names, so that a tokenizer can be trained to any vocabulary on it.
"""

import random
from itertools import accumulate

ENGLISH = """
the of and to in a is that for it was on are as with his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people my made over did down
only way find use may water long little very after words called just where most know get through back much before also
around another came come work three word must because does part even place well such here take why things help put
years different away again off went old number great tell men say small every found still between name should home big
give air line set own under read last never us left end along while might next sound below saw something thought both
few those always looked show large often together asked house world going want school important until form food keep
children feet land side without boy once animals life enough took four head above kind began almost live page got
earth need far hand high year mother light parts country father let night following picture being study second eyes
soon times story boys since white days ever paper hard near sentence better best across during today others however
sure means knew try told young miles sun ways thing whole hear example heard several change answer room sea against
top turned learn point city play toward five using himself usually century government university war state system
music church river
"""
COMMON = ENGLISH.split()
ONSETS = [
    "b",
    "br",
    "c",
    "ch",
    "cl",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "qu",
    "r",
    "s",
    "sh",
    "st",
    "t",
    "th",
    "tr",
    "v",
    "w",
    "z",
]
VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "io", "ou", "y"]
CODAS = ["", "", "", "n", "r", "s", "l", "t", "nd", "rk", "m", "st"]
QUESTIONS = ["What", "Who", "Where", "When", "Which", "How"]
NAME_SHARE = 0.06  # of the words of a context
CONTEXT_WORDS, CONTEXT_SPREAD = 140, 45  # with question and answer an example has about 160
_WEIGHTS = list(accumulate(1 / (rank + 2) for rank in range(len(COMMON))))


def name(rng: random.Random) -> str:
    """An invented name of one to four syllables."""
    syllables = rng.choice((1, 2, 2, 3, 3, 4))
    letters = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables))
    return letters.capitalize()


def words(rng: random.Random, count: int, names: list[str]) -> list[str]:
    """Common words by frequency, now and then one of `names`."""
    drawn = rng.choices(COMMON, cum_weights=_WEIGHTS, k=count)
    return [rng.choice(names) if rng.random() < NAME_SHARE else word for word in drawn]


def context(rng: random.Random, names: list[str]) -> list[str]:
    """A paragraph's words, in sentences."""
    count = max(20, round(rng.gauss(CONTEXT_WORDS, CONTEXT_SPREAD)))
    drawn = words(rng, count, names)
    start = 0
    while start < count:
        end = min(count, start + rng.randint(8, 24))
        drawn[start] = drawn[start][0].upper() + drawn[start][1:]
        drawn[end - 1] += "."
        start = end
    return drawn


def example(rng: random.Random) -> dict[str, str]:
    """One example in the form that NeMo gives SQuAD: the answer is a span of the context."""
    paragraph = context(rng, [name(rng) for _ in range(3)])
    length = rng.choice((1, 1, 2, 2, 3, 4, 6))
    start = rng.randrange(len(paragraph) - length)
    question = f"{rng.choice(QUESTIONS)} {' '.join(words(rng, rng.randint(6, 12), paragraph[start : start + 1]))}?"
    return {
        "input": f"Context: {' '.join(paragraph)} Question: {question} Answer:",
        "output": " ".join(paragraph[start : start + length]).rstrip("."),
    }
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/__init__.py <<'END_OF_FTGEN_FILE'
"""One folder for each framework that trains; each has the same file names.

In: a plan, weights, data. Out: step lines and checkpoints. Start with `nemo/train.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/__init__.py <<'END_OF_FTGEN_FILE'
"""NeMo 2 with Megatron-Core.

In: a plan. Out: a converted checkpoint (`convert.py`), training (`train.py`). Start with `train.py`, then `recipe.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/convert.py <<'END_OF_FTGEN_FILE'
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
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/cpu.py <<'END_OF_FTGEN_FILE'
"""Megatron-Core and NeMo on a machine without a GPU: for trying things, not for measuring.

In: nothing; `stand_in()` is called once, before NeMo is used. Out: torch.cuda's calls that the two make without asking
do nothing, tensors meant for "cuda" land on the CPU, and `PLAIN` is what a model's config needs beside that: no fused
kernels, and Megatron's own layers in place of Transformer Engine's. Both kinds of layers keep the same names in a
checkpoint, so what is converted here can be trained on GPUs.
"""

import contextlib
import functools
import logging
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
)
# Where the norms are that Transformer Engine fuses into the linear layer behind them, and Megatron's own layers do not.
NORMS = {
    "model.layers.*.input_layernorm.weight": "decoder.layers.*.input_layernorm.weight",
    "model.layers.*.post_attention_layernorm.weight": "decoder.layers.*.pre_mlp_layernorm.weight",
}


def plain() -> dict[str, Any]:
    """The fields of a model's config that run anywhere."""
    from nemo.collections.llm.gpt.model.base import local_layer_spec

    return dict.fromkeys(FUSIONS, False) | {"transformer_layer_spec": local_layer_spec}


def stand_in() -> None:
    """Make torch.cuda's calls harmless, once; the rest of this process has no GPU."""
    if torch.cuda.is_available() or torch.cuda.Stream is _Idle:
        return
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron asks for it before it looks for a GPU
    for name, value in _stand_ins().items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.Tensor.cuda = _same
    torch.nn.Module.cuda = _same
    import megatron.core.tensor_parallel.random as megatron_random
    from nemo.collections.llm.peft import lora
    from nemo.collections.llm.peft import utils as lora_layers
    from nemo.lightning import megatron_init
    from nemo.lightning.io import pl as nemo_checkpoints

    megatron_random._set_cuda_rng_state = torch.cuda.set_rng_state
    megatron_random._get_cuda_rng_state = torch.cuda.get_rng_state
    if not lora.HAVE_TE:
        lora.te = types.SimpleNamespace(Linear=None)  # it asks of each layer whether it is Transformer Engine's
        lora_layers.HAVE_TE = False  # NeMo 2.7 takes it for installed here when it is not
    megatron_init._set_random_seed = _with_a_device(megatron_init._set_random_seed)
    nemo_checkpoints._fix_tensors_device = _same  # it moves what was loaded between GPUs
    # The CPU's random numbers are the GPU's here, and Megatron warns each time that it sees them change.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    _OnTheCpu().__enter__()  # for good


@contextlib.contextmanager
def plain_import() -> Iterator[None]:
    """Within it, NeMo's importers of Hugging Face checkpoints make a plain model and find its norms."""
    from nemo.collections.llm.gpt.model import llama, mistral, qwen2
    from nemo.lightning import io

    with contextlib.ExitStack() as stack:
        for config in (llama.LlamaConfig, llama.Llama31Config, mistral.MistralConfig7B, qwen2.Qwen2Config):
            stack.enter_context(_replaced(config, "__init__", _with_defaults(config.__init__, plain())))
        stack.enter_context(_replaced(io, "apply_transforms", _with_norms(io.apply_transforms)))
        yield


class _Idle:
    """A stream or an event of a device that is not there."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return _nothing


class _OnTheCpu(TorchFunctionMode):  # type: ignore[misc]
    """Tensors that are made for, or moved to, "cuda" stay on the CPU."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if isinstance(kwargs.get("pin_memory"), bool):
            kwargs["pin_memory"] = False
        if getattr(func, "__name__", "") == "to":
            args = tuple("cpu" if _is_cuda(value) else value for value in args)
        return func(*args, **kwargs)


def _stand_ins() -> dict[str, Any]:
    names = ("ByteTensor", "IntTensor", "LongTensor", "HalfTensor", "BFloat16Tensor", "FloatTensor", "DoubleTensor")
    return {
        **{name: getattr(torch, name) for name in names},
        "Event": _Idle,
        "Stream": _Idle,
        "current_device": lambda: torch.device("cpu"),
        "current_stream": _Idle,
        "get_rng_state": lambda *_args, **_kwargs: torch.get_rng_state(),
        "manual_seed": _nothing,
        "set_device": _nothing,
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        "stream": lambda _stream: contextlib.nullcontext(),
        "synchronize": _nothing,
        "_lazy_call": _nothing,
        "_lazy_init": _nothing,
    }


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _same(self: Any, *_args: Any, **_kwargs: Any) -> Any:
    return self


def _is_cuda(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _with_defaults(init: Callable[..., None], defaults: dict[str, Any]) -> Callable[..., None]:
    @functools.wraps(init)
    def with_defaults(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **(defaults | kwargs))

    return with_defaults


def _with_a_device(set_random_seed: Callable[[int], None]) -> Callable[[int], None]:
    """NeMo seeds the generator of its weights only where it counts a GPU."""

    def with_a_device(seed: int) -> None:
        with _replaced(torch.cuda, "device_count", lambda: 1):
            set_random_seed(seed)

    return with_a_device


def _with_norms(apply_transforms: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(apply_transforms)
    def with_norms(source: Any, target: Any, mapping: dict[str, str], *args: Any, **kwargs: Any) -> Any:
        return apply_transforms(source, target, mapping | NORMS, *args, **kwargs)

    return with_norms
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/importer.py <<'END_OF_FTGEN_FILE'
"""NeMo's own importers of Hugging Face checkpoints, kept to one directory. In: a Hugging Face one. Out: a NeMo checkpoint.

This module imports NeMo (15-40 s): only a conversion does.
"""

import ctypes
import json
import os
import queue
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from nemo.collections.llm.gpt.model.llama import HFLlamaImporter
from nemo.collections.llm.gpt.model.mistral import HFMistralImporter
from nemo.collections.llm.gpt.model.qwen2 import HFQwen2Importer
from transformers import AutoTokenizer

from runtime.engines.nemo import cpu
from runtime.job.errors import JobError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None)


# NeMo's importers by the `model_type` of a config.json.
IMPORTERS = {"llama": HFLlamaImporter, "mistral": HFMistralImporter, "qwen2": HFQwen2Importer}


class OurHabits:
    """Of the stock importer's habits two are left out: a shared folder in /tmp, and a second process for saving."""

    tokenizer_directory: Path

    def save_hf_tokenizer_assets(self, tokenizer_name_or_path: str, save_path: str = "") -> str:
        """Keep the tokenizer in a folder of our own; the checkpoint gets a copy under the folder's name."""
        target = save_path or str(self.tokenizer_directory)
        AutoTokenizer.from_pretrained(tokenizer_name_or_path).save_pretrained(target)  # and no code of the model's
        return target

    def nemo_setup(self, model: Any, trainer: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Save in this process: another one would import everything again, and may outlive us."""
        return super().nemo_setup(model, trainer, *args, ckpt_async_save=False, **kwargs)  # type: ignore[misc]


def importer_of(source: Path) -> Any:
    """NeMo's importer of this Hugging Face directory, with our habits; JobError: NeMo has none that ftgen knows."""
    kind = json.loads((source / "config.json").read_text()).get("model_type")
    if kind not in IMPORTERS:
        raise JobError(f"a checkpoint of type {kind} cannot be converted", f"one of {', '.join(IMPORTERS)}")
    return type("Importer", (OurHabits, IMPORTERS[kind]), {})(str(source))


def import_directory(source: Path, output: Path, scratch: Path) -> str:
    """Convert the Hugging Face directory `source` to `output`/{context,weights}; the kind of layers it was made with.

    `scratch` is a new directory's name beside them; it is removed again.
    """
    _keep_to_this_process()
    importer = importer_of(source)
    importer.tokenizer_directory = scratch / "nemo_tokenizer"  # the name that NeMo looks for in a checkpoint
    try:
        if torch.cuda.is_available():
            importer.apply(output)
            return "transformer_engine"
        cpu.stand_in()
        with cpu.plain_import():
            importer.apply(output)
        return "local"
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _keep_to_this_process() -> None:
    """Nothing that Megatron starts to save outlives us when we are killed: it would keep our memory and our output.

    The queue of results needs no server process of its own (two seconds to start) where saving is not asynchronous.
    """
    filesystem_async._results_queue = queue.Queue()
    os.register_at_fork(after_in_child=_die_with_the_parent)


def _die_with_the_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/imports.py <<'END_OF_FTGEN_FILE'
"""Packages that a fine-tune does not use, imported only once something does use them. Out: NeMo is imported sooner.

NeMo, Megatron-Core and what they stand on import much at their top that a training never calls: other clouds' clients,
other loggers, quantization. Of what `DEFERRED` names, `import` gives a stand-in, whose names are classes: to import, to
annotate with, to derive from. The real package is imported when one of them is called, asked about or iterated over, so
what is used after all is only imported later. A package that is not installed cannot be imported, as ever.

Environment: FTGEN_IMPORT_ALL=1 turns this off.
"""

import contextlib
import importlib
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

OFF = "FTGEN_IMPORT_ALL"
# Who imports each for what. Only what nothing compares with can stand here: a stand-in equals itself alone.
DEFERRED = {
    "accelerate": "transformers: models over several devices, where Megatron does that here",
    "datasets": "NeMo: downloads of data sets, where runtime/data.py makes the files; with aiohttp",
    "leptonai": "nemo_run: a cloud's client; with fastapi, httpx, trio",
    "modelopt": "NeMo: quantization, pruning and distillation; with transformers' trainer",
    "nemo.collections.llm.modelopt": "NeMo: the same",
    "pandas": "NeMo: a tokenizer of tables",
    "paramiko": "nemo_run: tunnels to other machines; with cryptography",
    "pytorch_lightning": "NeMo: a reranker; it is `lightning` once more",
    "scipy": "torchmetrics, transformers: metrics of audio, the loss of object detection",
    "sklearn": "transformers: a metric of assisted decoding",
    "torch.utils.tensorboard": "Megatron-Core: a logger; with tensorboard",
    "wandb": "Megatron-Core: a logger",
}
# What every training asks NeMo's modelopt for, and what it then does: no checkpoint of ftgen's holds a state of modelopt,
# and none of its models is distilled.
NOTHING_TO_DO = {
    "nemo.collections.llm.modelopt.set_modelopt_spec_if_exists_in_ckpt",
    "nemo.collections.llm.modelopt.model_utils.restore_modelopt_state",
    "nemo.collections.llm.modelopt.model_utils.save_modelopt_state",
    "nemo.collections.llm.modelopt.distill.utils.get_tensor_shapes_adjust_fn_for_distillation",
}


# Megatron-Core's memory for inference: its import compiles a CUDA extension, in every process, and starts CUDA.
MANAGED_MEMORY = "megatron.core.inference.unified_memory"


def defer() -> None:
    """From now on what `DEFERRED` names is imported when it is used; what has been imported stays."""
    if os.environ.get(OFF, "0") in {"", "0"} and not any(isinstance(finder, Deferring) for finder in sys.meta_path):
        sys.meta_path.insert(0, Deferring(DEFERRED))
        without = ModuleType(MANAGED_MEMORY)
        vars(without).update(has_unified_memory=False, create_unified_mempool=None)
        sys.modules.setdefault(MANAGED_MEMORY, without)


class Deferring(MetaPathFinder, Loader):
    """Finds stand-ins for the modules of packages that are there and not wanted yet."""

    def __init__(self, packages: Iterable[str]) -> None:
        self.waiting = {package for package in packages if package not in sys.modules}
        self.written: list[tuple[str, str, Any]] = []  # to names of modules, while they were stand-ins
        self.lock = threading.Lock()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The real one's, but for its loader."""
        package = next((package for package in self.waiting if _is_in(package, name)), None)
        if package is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        real = next((spec for finder in others if (spec := finder.find_spec(name, path, target))), None)
        if real is None:
            return None
        spec = ModuleSpec(name, self, origin=real.origin, loader_state=package)
        spec.submodule_search_locations = real.submodule_search_locations
        spec.has_location = real.has_location
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """A stand-in."""
        return StandIn(spec.name, self, str(spec.loader_state))

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: that is what takes time."""

    def real(self, package: str, module: str, key: str) -> Any:
        """What `key` ("a" or "a.b") of the module stands for: from now on the package is the real one."""
        with self.lock:
            if was_waiting := package in self.waiting:
                self.waiting.remove(package)
                for name in [name for name in sys.modules if _is_in(package, name)]:
                    del sys.modules[name]
        if was_waiting:
            self._write(package)
        found: Any = importlib.import_module(module)
        for part in key.split("."):
            found = _attribute(found, part)
        return found

    def _write(self, package: str) -> None:
        for module, key, value in self.written:
            if _is_in(package, module):
                owner, _, name = key.rpartition(".")
                setattr(self.real(package, module, owner), name, value)


def _attribute(owner: Any, key: str) -> Any:
    """As getattr; what was imported below a stand-in is not imported below the real one yet."""
    if isinstance(owner, ModuleType) and not hasattr(owner, key):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(f"{owner.__name__}.{key}")
    return getattr(owner, key)


def _is_in(package: str, name: str) -> bool:
    return name == package or name.startswith(f"{package}.")


class StandIn(ModuleType):
    """Stands for a module; every name can be had from it."""

    def __init__(self, name: str, finder: Deferring, package: str) -> None:
        super().__init__(name)
        self.__dict__["_deferred"] = (finder, package)

    def __getattr__(self, key: str) -> Any:
        finder, package = self.__dict__["_deferred"]
        if package in finder.waiting:
            if f"{self.__name__}.{key}" in NOTHING_TO_DO:
                return _nothing
            if not _is_special(key):
                return _name(finder, package, self.__name__, key)
            if key not in {"__version__", "__all__"}:  # asked by inspect and warnings of every module
                raise AttributeError(f"module {self.__name__!r} has no attribute {key!r}")
        return finder.real(package, self.__name__, key)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Do what the real one does here."""


def _is_special(key: str) -> bool:
    return key.startswith("__") and key.endswith("__")


def _name(finder: Deferring, package: str, module: str, key: str) -> type:
    return Name(key.rpartition(".")[2], (), {"__module__": module, "_stands_for": (finder, package, module, key)})


class Name(type):
    """The type of the classes that stand for a deferred package's names, and of those that are derived from them."""

    def _real(cls) -> Any:
        if "_stands_for" not in cls.__dict__:
            base = next(base for base in cls.__mro__ if "_stands_for" in base.__dict__)
            raise RuntimeError(
                f"{cls.__module__}.{cls.__name__} cannot be used: it is derived from {base.__module__}.{base.__name__}, "
                f"which is not imported for a fine-tune. export {OFF}=1 imports it"
            )
        finder, package, module, key = cls.__dict__["_stands_for"]
        return finder.real(package, module, key)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Call what it stands for; RuntimeError: a class derived from a stand-in."""
        return cls._real()(*args, **kwargs)

    def __getattr__(cls, key: str) -> Any:
        if "_stands_for" not in cls.__dict__ or _is_special(key):
            raise AttributeError(f"type object {cls.__name__!r} has no attribute {key!r}")
        finder, package, module, own = cls.__dict__["_stands_for"]
        if package in finder.waiting:
            return _name(finder, package, module, f"{own}.{key}")
        return finder.real(package, module, f"{own}.{key}")

    def __setattr__(cls, key: str, value: Any) -> None:
        if "_stands_for" not in cls.__dict__ or _is_special(key):
            super().__setattr__(key, value)
            return
        finder, package, module, own = cls.__dict__["_stands_for"]
        if package in finder.waiting:
            finder.written.append((module, f"{own}.{key}", value))
        else:
            setattr(finder.real(package, module, own), key, value)

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls._real()) if "_stands_for" in cls.__dict__ else super().__instancecheck__(instance)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, cls._real()) if "_stands_for" in cls.__dict__ else super().__subclasscheck__(subclass)

    def __iter__(cls) -> Iterator[Any]:
        return iter(cls._real())

    def __getitem__(cls, key: Any) -> Any:
        return cls._real()[key]
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/__init__.py <<'END_OF_FTGEN_FILE'
"""What makes a step faster than the stock recipe: one file for each optimization.

In: a recipe and a plan. Out: the recipe, changed. Start with `switch.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/cuda_graphs.py <<'END_OF_FTGEN_FILE'
"""Capture each layer in local CUDA graphs of Megatron-Core, and make them right for FP8.

In: a recipe. Out: the recipe with graphs on, and Megatron-Core's class changed for this process.

Replays of a captured layer would get two things wrong.

Transposed weights: Transformer Engine keeps a transposed copy of each FP8 weight for the backward pass. The forward pass renews
it when the optimizer has marked it as old. A captured forward pass contains only what ran during capture, when the copy was
fresh, so replays would keep the transposes of the first step and the gradients would be wrong. Here the copies are renewed in
place, before the graph of a layer is replayed: once a step, when they are old.

Scales of a fused MLP: before Megatron-Core captures a layer, it runs the layer on whatever is in its buffers, and then restores
the amax history and scales of Transformer Engine. It misses those of a fused MLP, which is not a submodule. Here they are
restored too.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch local graphs on."""
    if "expandable_segments" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        os.environ.pop("PYTORCH_CUDA_ALLOC_CONF")  # Megatron-Core refuses graphs with it
    recipe.model.config.cuda_graph_impl = "local"
    recipe.trainer.strategy.use_te_rng_tracker = True
    recipe.data.packed_sequence_specs.pad_cu_seqlens = True
    mend_fp8()


def mend_fp8() -> None:
    """Make captured layers right in FP8; call it once, before the model is built."""
    from megatron.core.transformer.cuda_graphs import _CudaGraphRunner

    _CudaGraphRunner.replay_graph_capture = _with_fresh_transposes(_CudaGraphRunner.replay_graph_capture)
    _CudaGraphRunner.create_fwd_graph = _with_scales_kept(_CudaGraphRunner.create_fwd_graph)


def _with_fresh_transposes(replay: Any) -> Any:
    @functools.wraps(replay)
    def replay_fresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights = self.__dict__.get("_ftgen_fp8_weights")
        if weights is None:
            weights = self.__dict__["_ftgen_fp8_weights"] = _fp8_weights(self.base_module)
        for weight in weights:
            if weight._transpose_invalid:
                weight._create_transpose()
        return replay(self, *args, **kwargs)

    return replay_fresh


def _fp8_weights(module: Any) -> list[Any]:
    """The module's weights in FP8 that have a transposed copy."""
    return [weight for weight in module.parameters() if getattr(weight, "_transpose", None) is not None]


def _with_scales_kept(create: Any) -> Any:
    @functools.wraps(create)
    def create_and_restore(self: Any, *args: Any, **kwargs: Any) -> None:
        kept = [(operation, operation._save_fp8_metas()) for operation in _fused_operations(self.base_module)]
        create(self, *args, **kwargs)
        for operation, scales in kept:
            operation._load_fp8_metas(scales)

    return create_and_restore


def _fused_operations(layer: Any) -> Iterator[Any]:
    """The basic operations of a layer's fused MLP, which Megatron-Core keeps in a tuple of its own."""
    for module in layer.modules():
        for fused in getattr(module, "_fused_impl", None) or ():
            yield from (operation for operation in fused.modules() if hasattr(operation, "_save_fp8_metas"))
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/fused_cross_entropy.py <<'END_OF_FTGEN_FILE'
"""Use Transformer Engine's fused cross entropy. In: a recipe. Out: the recipe, with its model's config changed."""

from typing import Any


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch the loss; right for micro_batch_size = 1 only (Transformer Engine 2.9)."""
    recipe.model.config.cross_entropy_loss_fusion = True
    recipe.model.config.cross_entropy_fusion_impl = "te"
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/fused_swiglu.py <<'END_OF_FTGEN_FILE'
"""Use Transformer Engine's fused SwiGLU, in FP8 with the cast in it. In: a recipe. Out: the recipe, changed."""

from typing import Any


def apply(recipe: Any, plan: dict[str, Any]) -> None:
    """Switch the op fuser on for the MLP alone, unless the plan has all of it on."""
    recipe.model.config.use_transformer_engine_op_fuser = True
    if not plan["optimizations"]["op_fuser"]:
        from nemo.collections.llm.peft import lora

        lora.HAVE_TE_FUSED_LORA = False  # the same setting would also fuse the adapters, which rounds their input
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/fused_wgrad_accumulation.py <<'END_OF_FTGEN_FILE'
"""Accumulate weight gradients in the GEMM that computes them, without APEX.

In: a recipe. Out: the recipe with the fusion on. This module also stands in for APEX's extension
`fused_weight_gradient_mlp_cuda`: Megatron-Core and NeMo fuse only if that can be imported. Transformer Engine's GEMMs then
accumulate into main_grad, and the two functions below do so for Megatron's LM head.
"""

import sys
from typing import Any

import torch


def before_imports() -> None:
    """Be importable under the extension's name before Megatron-Core looks for it."""
    sys.modules.setdefault("fused_weight_gradient_mlp_cuda", sys.modules[__name__])


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch the fusion on."""
    recipe.model.config.gradient_accumulation_fusion = True


def wgrad_gemm_accum_fp16(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] += grad_outputᵀ [out, n] @ inputs [n, in], all of one 16-bit type."""
    main_grad.addmm_(grad_output.t(), inputs)


def wgrad_gemm_accum_fp32(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] (float32) += grad_outputᵀ [out, n] @ inputs [n, in]."""
    main_grad.add_(grad_output.t() @ inputs)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/loss_tokens_only.py <<'END_OF_FTGEN_FILE'
"""Compute the LM head and the loss only for tokens that have a loss.

In: a recipe. Out: the recipe, with steps that pick those tokens.

A fine-tune has a loss on the answers alone; for every other token the stock recipe computes the head and the cross entropy and
multiplies them by zero. The loss mask is read while the batch is still on the CPU, so that nothing waits for the GPU. Each row
is the same sum as before, but a GEMM of another height may add in another order.
"""

from collections.abc import Iterator
from typing import Any

import torch

ROWS = 128  # row counts are rounded up to it, so that few shapes occur


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Make the recipe's steps pick the tokens with a loss."""
    install(recipe.model.config)


def install(config: Any) -> None:
    """Make a GPTConfig's steps pick the tokens with a loss. For one tensor-, pipeline- and context-parallel rank."""
    from megatron.core.models.gpt import GPTModel

    config.data_step_fn = data_step
    config.forward_step_fn = forward_step
    GPTModel._postprocess = _postprocess_with(GPTModel._postprocess)


def data_step(dataloader_iter: Iterator[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """NeMo's, with `loss_rows` [n] in the batch: where in [batch, sequence] the loss counts; and `loss_count`."""
    from nemo.collections.llm.gpt.model.base import gpt_data_step

    batch = next(dataloader_iter)
    rows = (batch[0] if isinstance(batch, tuple) else batch)["loss_mask"].flatten().nonzero().flatten()
    step: dict[str, Any] = gpt_data_step(iter([batch]), *args, **kwargs)
    height = max(1, -(-len(rows) // ROWS)) * ROWS
    padded = torch.zeros(height, dtype=torch.long, pin_memory=torch.cuda.is_available())
    padded[: len(rows)] = rows
    return step | {"loss_rows": padded.cuda(non_blocking=True), "loss_count": len(rows)}


def forward_step(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """NeMo's, after telling the head which rows it is to work on."""
    from nemo.collections.llm.gpt.model.base import gpt_forward_step

    head = model
    while hasattr(head, "module"):
        head = head.module
    head.loss_rows, head.loss_count = batch["loss_rows"], batch["loss_count"]
    return gpt_forward_step(model, batch)


def _postprocess_with(whole: Any) -> Any:
    def postprocess(self: Any, hidden_states: torch.Tensor, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """Loss [batch, sequence], zero where it does not count, from hidden states [sequence, batch, hidden]."""
        rows = getattr(self, "loss_rows", None)
        if labels is None or rows is None or not self.post_process:
            return whole(self, hidden_states, *args, labels=labels, **kwargs)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        picked = hidden_states.transpose(0, 1).flatten(0, 1).index_select(0, rows).unsqueeze(1)
        logits, _ = self.output_layer(picked, weight=weight)
        loss = self.compute_language_model_loss(labels.flatten().index_select(0, rows).unsqueeze(0), logits).flatten()
        count = self.loss_count
        return loss.new_zeros(labels.numel()).index_copy(0, rows[:count], loss[:count]).view_as(labels)

    return postprocess
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/merge_micro_batches.py <<'END_OF_FTGEN_FILE'
"""Run all packs of a step as one micro-batch.

In: a recipe with packed data. Out: the recipe, with a data module that gives a step's whole batch and a step that merges it.

The stock recipe runs one micro-batch of one pack after the other. Here the batch of a step, [packs, length], is laid end to end
as [1, packs * length]; the boundaries of the examples (cu_seqlens) come along, so attention stays inside each example. The
gradient equals the stock one: the loss of every token is weighted so that the means of the packs are averaged, as they are
when each pack is a micro-batch of its own. The logged loss is the mean over all tokens, as before.
"""

from typing import Any

import torch

from runtime.engines.nemo.optimizations.packs import ChangedStep, cu_seqlens, ends_of


def apply(recipe: Any, plan: dict[str, Any]) -> None:
    """Merge the micro-batches of a step. For packed data, CP = PP = 1."""
    packs = plan["global_batch_size"] // plan["parallelism"]["data_parallel_size"]
    install(recipe.data, recipe.model.config, packs)


def install(data: Any, config: Any, packs: int) -> None:
    """Make NeMo's data module give `packs` packs at a time, and a GPTConfig's steps merge them."""
    from nemo.collections.llm.gpt.data.fine_tuning import FineTuningDataModule
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

    FineTuningDataModule.validate_batch_size_for_packed_sequence = lambda _self: None  # NeMo allows one pack only
    data.micro_batch_size = packs
    config.data_step_fn = ChangedStep(config.data_step_fn, merge)
    MaskedTokenLossReduction.forward = _weighted(MaskedTokenLossReduction.forward)


def merge(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch [packs, length] of NeMo's packed dataset as one of [1, packs * length], with `loss_weights` of that shape."""
    _, length = batch["tokens"].shape
    rows = ends_of(batch)
    ends = sorted({0} | {pack * length + end for pack, row in enumerate(rows) for end in row})
    count = sum(len(row) - 1 for row in rows) + 1  # the same for every batch where NeMo pads cu_seqlens
    ends += [ends[-1]] * (count - len(ends))
    flat = {key: batch[key].reshape(1, -1) for key in ("tokens", "labels", "loss_mask", "position_ids")}
    return {
        **flat,
        **cu_seqlens(ends),
        "attention_mask": batch["attention_mask"][:1],
        "max_seqlen": batch["max_seqlen"].max().reshape(1, 1),
        "loss_weights": _loss_weights(batch["loss_mask"]).reshape(1, -1),
    }


def _loss_weights(loss_mask: torch.Tensor) -> torch.Tensor:
    """[packs, length], float32: the weight of each token's loss that makes the mean over all tokens that of the packs' means."""
    tokens = loss_mask.sum(dim=1, keepdim=True, dtype=torch.float32)
    return (tokens.sum() / (len(loss_mask) * tokens.clamp(min=1))).expand(loss_mask.shape)


def _weighted(stock: Any) -> Any:
    def forward(self: Any, batch: dict[str, Any], loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """The weighted sum of the losses for the gradient; the logged loss is not weighted."""
        total, tokens, logged = stock(self, batch, loss)
        if batch.get("loss_weights") is not None:
            total = (loss.float() * batch["loss_mask"] * batch["loss_weights"]).sum()
        return total, tokens, logged

    return forward
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/op_fuser.py <<'END_OF_FTGEN_FILE'
"""Use Transformer Engine's op fuser everywhere, which rounds differently. In: a recipe. Out: the recipe, changed."""

from typing import Any


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch it on."""
    recipe.model.config.use_transformer_engine_op_fuser = True
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/packs.py <<'END_OF_FTGEN_FILE'
"""What the optimizations of packed sequences share: a data step that changes the batch, and the boundaries of sequences.

In: NeMo's data step and its batches on the CPU. Out: the same, changed.
"""

from collections.abc import Iterator
from typing import Any

import torch


class ChangedStep:
    """A data step that changes each batch on the CPU and then calls the step that it replaces."""

    def __init__(self, step: Any, change: Any) -> None:
        self.step, self.change = step, change

    def __call__(self, dataloader_iter: Iterator[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = next(dataloader_iter)
        changed = self.change(batch[0] if isinstance(batch, tuple) else batch)
        step: dict[str, Any] = self.step(iter([changed]), *args, **kwargs)
        if "loss_weights" in changed and step.get("loss_weights") is None:  # NeMo's step drops the keys it does not know
            step["loss_weights"] = changed["loss_weights"].cuda(non_blocking=True)
        return step


def ends_of(batch: dict[str, Any]) -> list[list[int]]:
    """For each row the boundaries of its sequences, from 0 on; in NeMo's cu_seqlens they are followed by -1."""
    lengths = batch["cu_seqlens_argmin"].flatten().tolist()
    return [row[:length] for row, length in zip(batch["cu_seqlens"].tolist(), lengths, strict=True)]


def cu_seqlens(ends: list[int]) -> dict[str, torch.Tensor]:
    """The boundaries of one row, in the form that NeMo's forward step reads."""
    return {
        "cu_seqlens": torch.tensor([[*ends, -1]], dtype=torch.int32),
        "cu_seqlens_argmin": torch.tensor([[len(ends)]]),
    }
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/scale_small_tensor.py <<'END_OF_FTGEN_FILE'
"""Apply LoRA's scale to the small tensor between the adapter's two matrices.

In: nothing of the recipe. Out: NeMo's adapter class, changed for this process.
"""

from typing import Any

import torch


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Change the adapters of this process."""
    scale_small_tensor()


def scale_small_tensor() -> None:
    """Multiply [tokens, rank] by alpha / rank, instead of the adapter's output [tokens, features].

    The same bits where alpha / rank is a power of two. For one tensor-parallel rank and no dropout.
    """
    from nemo.collections.llm.peft.utils import ParallelLinearAdapter

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.linear_in(x)
        x, _ = self.linear_out(self.activation(x) * (self.alpha / self.dim))
        return x

    ParallelLinearAdapter.forward = forward
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/short_padding.py <<'END_OF_FTGEN_FILE'
"""Cut the padding of each pack into several short sequences.

In: a recipe with packed data. Out: the recipe, with a data step that cuts.

To attention and rotary embedding, the padding at the end of a pack is one more sequence, and it can be as long as the emptiest
pack leaves it. With padded cu_seqlens, the kernels then treat every sequence as if it were that long. This cuts the padding
into sequences that are no longer than the longest example.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from runtime.engines.nemo.optimizations.packs import ChangedStep, cu_seqlens, ends_of

MULTIPLE = 64  # tokens that an attention kernel works on at a time: the longest sequence is rounded up to a multiple


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Make the recipe's data step cut the padding. For packed data and one context-parallel rank."""
    install(recipe.data, recipe.model.config)


def install(data: Any, config: Any) -> None:
    """Change a GPTConfig's data step; the length of the longest example is read from the packs' metadata."""
    metadata = json.loads(Path(data.packed_sequence_specs.packed_metadata_path).read_text())
    longest = max(split["dataset_max_seqlen"] for split in metadata)
    limit = -(-longest // MULTIPLE) * MULTIPLE
    config.data_step_fn = ChangedStep(config.data_step_fn, lambda batch: cut_padding(batch, limit))


def cut_padding(batch: dict[str, Any], longest: int) -> dict[str, Any]:
    """A batch of one row without sequences of more than `longest` tokens; no example is that long, so only padding is cut.

    cu_seqlens [1, n] always grows by as much as the longest possible padding needs: CUDA graphs need one shape.
    """
    ends = ends_of(batch)[0]
    cut = [0]
    for begin, end in pairwise(ends):
        cut += [*range(begin + longest, end, longest), end]
    count = len(ends) + ends[-1] // longest
    cut += [ends[-1]] * (count - len(cut))
    return batch | cu_seqlens(cut) | {"max_seqlen": torch.tensor([[longest]], dtype=torch.int32)}
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/skip_nan_check.py <<'END_OF_FTGEN_FILE'
"""Do not look for NaN in the gradients of each step. In: a recipe. Out: the recipe, with its data parallelism changed."""

from typing import Any

from runtime.engines.nemo.recipe import ddp


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch the check off."""
    recipe.trainer.strategy.ddp = ddp(recipe, check_for_nan_in_grad=False)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/skip_shard_transposes.py <<'END_OF_FTGEN_FILE'
"""Do not transpose the shards of FP8 weights after the optimizer's step.

In: nothing of the recipe. Out: Transformer Engine, changed for this process.

With a distributed optimizer, each rank casts its shard of every weight to FP8 as a matrix of one row. Transformer Engine also
writes a transpose of that row. Nobody reads it (the transpose of the whole weight is made when all shards are there), and it
takes far longer than the cast.
"""

from typing import Any


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Change the cast of this process."""
    skip_transposes()


def skip_transposes() -> None:
    """Leave the transposes of shards out; call it once, before the optimizer is built. The weights are the same bits."""
    from transformer_engine.pytorch.tensor import utils

    utils._cast_master_weights_to_fp8_delayed_scaling = _without_transposes(
        utils._cast_master_weights_to_fp8_delayed_scaling
    )


def _without_transposes(cast: Any) -> Any:
    def cast_rows(weights: list[Any], *args: Any, **kwargs: Any) -> None:
        quantizers = [weight._get_quantizer() for weight, *_ in weights]
        wanted = [quantizer.columnwise_usage for quantizer in quantizers]
        for quantizer in quantizers:
            quantizer.set_usage(columnwise=False)
        cast(weights, *args, **kwargs)
        for quantizer, columnwise in zip(quantizers, wanted, strict=True):
            quantizer.set_usage(columnwise=columnwise)

    return cast_rows
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/switch.py <<'END_OF_FTGEN_FILE'
"""Switch on the optimizations that the plan names. In: a recipe and a plan. Out: the recipe, changed.

Each optimization is a file of this folder with its name and a function `apply(recipe, plan)`. One that is off leaves the stock
recipe as it is. The catalogue's optimizations.toml has the measured effect and the numerics of each.
"""

from importlib import import_module
from typing import Any

from runtime.job.progress import say

Plan = dict[str, Any]
BEFORE_IMPORTS = ("fused_wgrad_accumulation",)  # Megatron-Core decides about these while it is imported


def before_imports(plan: Plan) -> None:
    """What must be done before NeMo and Megatron-Core are imported."""
    for name in BEFORE_IMPORTS:
        if plan["optimizations"][name]:
            _module(name).before_imports()


def apply(recipe: Any, plan: Plan) -> None:
    """Apply every optimization that is on."""
    on = [name for name, is_on in plan["optimizations"].items() if is_on]
    say(f"optimizations: {', '.join(on) or 'none, the stock recipe'}")
    for name in on:
        _module(name).apply(recipe, plan)


def _module(name: str) -> Any:
    return import_module(f"{__package__}.{name}")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/recipe.py <<'END_OF_FTGEN_FILE'
"""NeMo's own fine-tuning recipe with the plan's numbers. In: plan, checkpoint, data. Out: what trains when called.

This module imports NeMo (15-40 s): only a training does.
"""

import functools
import importlib
import inspect
from pathlib import Path
from typing import Any

import nemo_run as run
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from megatron.core.distributed import DistributedDataParallelConfig
from nemo import lightning as nl
from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_with_fp8_mixed
from nemo.lightning import _strategy_lib

from runtime.data.prepare import Files
from runtime.job.progress import say

Plan = dict[str, Any]
ARCHITECTURE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


def build(plan: Plan, checkpoint: Path, files: Files, log_directory: Path) -> Any:
    """The recipe as a `run.Partial`; `fdl.build(recipe)()` trains. Nothing is written outside `log_directory`."""
    recipe = stock(plan, log_directory)
    set_model(recipe, plan)
    _set_scheme(recipe, plan)
    _set_optimizer(recipe, plan)
    _set_parallelism(recipe, plan)
    _set_precision(recipe, plan)
    _set_data(recipe, plan, files)
    _set_trainer(recipe, plan)
    recipe.log.ckpt = recipe.log.tensorboard = None
    recipe.log.use_datetime_version = False
    recipe.resume = run.Config(nl.AutoResume, restore_config=run.Config(nl.RestoreConfig, path=str(checkpoint)))
    if plan["gpu"]["name"] == "cpu":
        _for_the_cpu(recipe)
    # The seed of adapters and dropout is no setting of NeMo's: its default stands in this function's signature.
    _strategy_lib.init_parallel_ranks = functools.partial(_strategy_lib.init_parallel_ranks, seed=plan["seed"])
    return recipe


def stock(plan: Plan, log_directory: Path) -> Any:
    """NeMo's own recipe of the model, with as much of the plan as it takes; not every model's takes all of it."""
    library = importlib.import_module(f"nemo.collections.llm.recipes.{plan['model']['nemo_recipe']}")
    arguments = {
        "dir": str(log_directory),
        "name": "nemo",
        "num_nodes": plan["nodes"],
        "num_gpus_per_node": plan["gpus_per_node"],
        "peft_scheme": "lora" if plan["scheme"] == "lora" else "none",
        "seq_length": plan["seq_length"],
        "packed_sequence": plan["data"]["packed"],
        "performance_mode": True,
    }
    taken = inspect.signature(library.finetune_recipe).parameters
    return library.finetune_recipe(**{key: value for key, value in arguments.items() if key in taken})


def set_model(recipe: Any, plan: Plan) -> None:
    """The plan's architecture, over that of the recipe's model."""
    config, model = recipe.model.config, plan["model"]
    for key in ARCHITECTURE:
        setattr(config, key, model[key])
    config.rotary_base = int(model["rope_theta"])
    config.kv_channels = model["head_size"]
    config.share_embeddings_and_output_weights = model["tied_embeddings"]
    config.add_qkv_bias = model["qkv_bias"]
    if model["rope_scaling_factor"]:
        config.scale_factor = model["rope_scaling_factor"]
    config.seq_length = recipe.data.seq_length = plan["seq_length"]
    # some of NeMo's recipes count embedding and loss as layers of the pipeline; the plan counts the layers alone
    config.account_for_embedding_in_pipeline_split = config.account_for_loss_in_pipeline_split = False


def _set_scheme(recipe: Any, plan: Plan) -> None:
    if plan["scheme"] == "lora":
        recipe.peft.dim = plan["lora"]["rank"]
        recipe.peft.alpha = plan["lora"]["alpha"]
        recipe.peft.dropout = plan["lora"]["dropout"]
        recipe.peft.target_modules = plan["lora"]["targets"]


def _set_optimizer(recipe: Any, plan: Plan) -> None:
    recipe.optim.config.lr = plan["optimizer"]["learning_rate"]
    warmup = min(plan["optimizer"]["warmup_steps"], plan["max_steps"] - 1)  # the schedule refuses a longer one
    if warmup != plan["optimizer"]["warmup_steps"]:
        say(f"warmup: {warmup} steps, because max_steps = {plan['max_steps']}")
    recipe.optim.lr_scheduler.warmup_steps = warmup


def _set_parallelism(recipe: Any, plan: Plan) -> None:
    strategy, split = recipe.trainer.strategy, plan["parallelism"]
    for key in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "sequence_parallel",
    ):
        setattr(strategy, key, split[key])
    if split["context_parallel_size"] > 1:
        # A rank whose part of the sequence holds no answer has no loss of its own: NeMo insists on these two.
        recipe.model.config.calculate_per_token_loss = True
        strategy.ddp = ddp(recipe, average_in_collective=False)


def ddp(recipe: Any, **changes: Any) -> Any:
    """The recipe's settings of data parallelism, which may be a word, with changes."""
    settings = recipe.trainer.strategy.ddp
    if isinstance(settings, str):
        settings = run.Config(DistributedDataParallelConfig, check_for_nan_in_grad=True)
    for key, value in changes.items():
        setattr(settings, key, value)
    return settings


def _set_precision(recipe: Any, plan: Plan) -> None:
    if plan["precision"] == "fp8":
        recipe.trainer.plugins = bf16_with_fp8_mixed()
    recipe.trainer.plugins.grad_reduce_in_fp32 = False


def _set_data(recipe: Any, plan: Plan, files: Files) -> None:
    # The module is called SquadDataModule, and downloads nothing where training.jsonl exists.
    recipe.data.dataset_root = str(files.examples)
    recipe.data.seed = plan["seed"]
    recipe.data.global_batch_size = plan["global_batch_size"]
    recipe.data.micro_batch_size = plan["micro_batch_size"]
    if files.packed:
        recipe.data.packed_sequence_specs = run.Config(
            PackedSequenceSpecs,
            packed_sequence_size=plan["seq_length"],
            packed_train_data_path=str(files.packed / "training.npy"),
            packed_val_data_path=str(files.packed / "validation.npy"),
            packed_metadata_path=str(files.packed / "metadata.json"),
        )


def _set_trainer(recipe: Any, plan: Plan) -> None:
    trainer = recipe.trainer
    trainer.max_steps = plan["max_steps"]
    trainer.limit_val_batches = 0
    trainer.val_check_interval = None
    trainer.enable_checkpointing = False
    trainer.logger = False
    # Launchers differ in the variables that they set; the job's script sets torchrun's, whatever started it.
    trainer.plugins = [trainer.plugins, run.Config(TorchElasticEnvironment)]


def _for_the_cpu(recipe: Any) -> None:
    from runtime.engines.nemo import cpu

    for key, value in cpu.plain().items():
        setattr(recipe.model.config, key, value)
    trainer, optimizer = recipe.trainer, recipe.optim.config
    trainer.accelerator = "cpu"
    trainer.plugins = trainer.plugins[1:]  # no mixed precision
    trainer.callbacks = [callback for callback in trainer.callbacks if "CommOverlap" not in str(callback)]
    trainer.strategy.ddp = ddp(recipe, overlap_grad_reduce=False, overlap_param_gather=False)
    trainer.strategy.pipeline_dtype = None
    optimizer.bf16 = False
    optimizer.use_distributed_optimizer = False
    optimizer.clip_grad = 0.0  # its kernel is CUDA's
    recipe.data.num_workers = 0
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/train.py <<'END_OF_FTGEN_FILE'
"""The training: one process of it. In: a plan, and this process's rank in the environment. Out: NeMo's own step lines.

Environment: RANK, LOCAL_RANK, WORLD_SIZE, NODE_RANK, MASTER_ADDR, MASTER_PORT (alone: 0, 0, 1, 0, this machine, a free
port), FTGEN_RUN_DIR for what NeMo writes (default $STAGE_PATH/logs).
"""

import os
import socket
from pathlib import Path
from typing import Any

from runtime.data.prepare import prepare
from runtime.engines.nemo import convert, imports
from runtime.engines.nemo.optimizations import switch
from runtime.job import environment, profile
from runtime.job.errors import JobError
from runtime.job.progress import say, timed
from runtime.weights import read_ahead

Plan = dict[str, Any]


def train(plan: Plan) -> int:
    """Train plan["max_steps"] steps; 0. JobError: no checkpoint, the wrong number of processes, faulty data."""
    _settle_ranks(plan)
    profile.enter(plan)
    weights = convert.directory(plan)
    if not convert.converted(plan):
        raise JobError(f"there is no converted checkpoint in {weights}", "run the command convert first")
    read_ahead.begin(weights / "weights")
    with timed("importing NeMo"):
        _set_switches(plan)
        switch.before_imports(plan)
        imports.defer()
        import fiddle
        import torch

        from runtime.engines.nemo import recipe
    if plan["gpu"]["name"] == "cpu":
        from runtime.engines.nemo import cpu

        cpu.stand_in()
    elif not torch.cuda.is_available():
        raise JobError("PyTorch finds no GPU in this process", 'see nvidia-smi; gpu = "cpu" in the spec runs without')
    environment.tell(plan)
    files = prepare(plan, weights / "context" / "nemo_tokenizer")
    recipe_of_run = recipe.build(plan, weights, files, _log_directory())
    switch.apply(recipe_of_run, plan)
    profile.add(recipe_of_run, plan)
    training = fiddle.build(recipe_of_run)
    say(f"training: {plan['experiment']}, {plan['max_steps']} steps")
    training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _settle_ranks(plan: Plan) -> None:
    """Defaults for a process that is alone; PyTorch's name for the node's rank."""
    env = os.environ
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        env.setdefault(name, value)
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(_free_port())
    env["GROUP_RANK"] = env["NODE_RANK"]
    if int(env["WORLD_SIZE"]) != plan["gpus"]:
        raise JobError(
            f"{env['WORLD_SIZE']} processes train, and the plan has {plan['gpus']} GPUs",
            "start one process for each GPU: the job's script does",
        )


def _set_switches(plan: Plan) -> None:
    """What NeMo and Lightning read from the environment when they are imported or built."""
    os.environ["PL_GLOBAL_SEED"] = str(plan["seed"])
    if plan["gpu"]["name"] != "cpu":
        os.environ.setdefault("NEMO_LOG_MEMORY_USAGE", "1")


def _log_directory() -> Path:
    return Path(os.environ.get("FTGEN_RUN_DIR") or Path(os.environ.get("STAGE_PATH") or Path.cwd(), "logs"))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
END_OF_FTGEN_FILE
    cat >"$1"/runtime/guard/__init__.py <<'END_OF_FTGEN_FILE'
"""A folder is published once, whole, for all who ask.

In: a place, what identifies its content, and a function that builds it. Out: the folder. Start with `publish.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/guard/claim.py <<'END_OF_FTGEN_FILE'
"""Who may build a thing: numbered claims on a shared file system. In: a directory of claims. Out: the right to build.

Claim n is the directory `<claims>/<n>`; the highest number is the current one, and taking over from n is `mkdir n+1`,
which exactly one process can do anywhere (file locks succeed for everyone on many cluster file systems). No claim is
ever deleted, so that a number never means two owners. A claim holds

    owner.json   who has it: host, boot, pid namespace, pid and its start time, Slurm job and restart
    heartbeat    a counter that its owner raises every few seconds
    released     there once the owner is through, well or not

An owner counts as dead as soon as somebody can tell: its process is gone from this machine, or Slurm says that its job
has ended; and in any case when its heartbeat stands still, by the clock of the one who waits: clocks differ between
machines, so no time that another one wrote is ever compared. Taking over from an owner that was only asleep does no
harm: it finds that its number is no longer the highest (`is_current`).

Environment: FTGEN_STALE_S, seconds without a heartbeat after which an owner is dead (60); FTGEN_HOST, this machine's
name (for tests); SLURM_JOB_ID, SLURM_RESTART_COUNT.
"""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

STALE_S = 60.0
BEATS_PER_STALE = 12  # heartbeats that must fail before an owner is given up
SLURM_EVERY_S = 20.0  # between two questions to Slurm's controller
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
ENDED |= {"OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}


def stale_s() -> float:
    """Seconds without a heartbeat after which an owner is dead."""
    return float(os.environ.get("FTGEN_STALE_S") or STALE_S)


class Claim:
    """A claim that this process holds; its heart beats until `release`."""

    def __init__(self, claims: Path, generation: int) -> None:
        """Say who owns the claim that this process has just made, and start its heart."""
        self.claims, self.generation = claims, generation
        self.directory = claims / str(generation)
        self._pid = os.getpid()
        self._stop = threading.Event()
        _write(self.directory / "owner.json", json.dumps(this_process()))
        self._beat(0)
        threading.Thread(target=self._beat_until_released, daemon=True).start()

    def is_current(self) -> bool:
        """Whether nobody has taken over."""
        return highest(self.claims) == self.generation

    def release(self) -> None:
        """Let the next one begin at once; a forked child that ends does not speak for its parent."""
        if os.getpid() == self._pid and not self._stop.is_set():
            self._stop.set()
            _write(self.directory / "released", "")

    def _beat_until_released(self) -> None:
        # Signals are for the main thread: one that comes here would not wake it from a long call.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        count = 0
        while not self._stop.wait(stale_s() / BEATS_PER_STALE):
            count += 1
            self._beat(count)

    def _beat(self, count: int) -> None:
        # In place and of one length: a full disk must not stop the heart of the process that will make room on it.
        _write(self.directory / "heartbeat", f"{count:012d}\n", in_place=count > 0)


class Watch:
    """The current claim as one who waits sees it."""

    def __init__(self, claims: Path) -> None:
        """Begin to watch; nothing is read yet."""
        self.claims = claims
        self._seen: tuple[int, str] = (0, "")
        self._since = 0.0
        self._asked_slurm = float("-inf")

    def claim(self) -> Claim | None:
        """The next claim if the current one is free and no other process was faster, else None: ask again later."""
        current = highest(self.claims)
        if current and not self._is_free(current):
            return None
        try:
            (self.claims / str(current + 1)).mkdir()
        except FileExistsError:
            return None
        return Claim(self.claims, current + 1)

    def holder(self) -> str:
        """Who holds the current claim, in words."""
        owner = self._owner(highest(self.claims))
        if not owner:
            return "a process that has not said who it is"
        job = f", Slurm job {owner['slurm_job']}" if owner.get("slurm_job") else ""
        return f"process {owner.get('pid')} on {owner.get('host')}{job}"

    def _is_free(self, current: int) -> bool:
        if (self.claims / str(current) / "released").exists():
            return True
        owner = self._owner(current)
        return _process_is_gone(owner) or self._slurm_job_is_over(owner) or self._heart_stands_still(current)

    def _owner(self, current: int) -> dict[str, Any]:
        try:
            owner = json.loads((self.claims / str(current) / "owner.json").read_text())
        except (OSError, ValueError):
            return {}  # it died before it wrote it, or is about to: the heartbeat decides
        return owner if isinstance(owner, dict) else {}

    def _heart_stands_still(self, current: int) -> bool:
        try:
            beat = (self.claims / str(current) / "heartbeat").read_text()
        except OSError:
            beat = ""
        if self._seen != (current, beat):
            self._seen, self._since = (current, beat), time.monotonic()
        return time.monotonic() - self._since > stale_s()

    def _slurm_job_is_over(self, owner: dict[str, Any]) -> bool:
        job, here = owner.get("slurm_job"), this_process()
        if not job or time.monotonic() - self._asked_slurm < SLURM_EVERY_S:
            return False
        self._asked_slurm = time.monotonic()
        if job == here["slurm_job"]:
            return bool(owner.get("slurm_restart") != here["slurm_restart"])  # our job, before it was requeued
        return _slurm_state(job) in ENDED


def highest(claims: Path) -> int:
    """The number of the current claim, 0 before the first."""
    return max((int(path.name) for path in claims.iterdir() if path.name.isdigit()), default=0)


def this_process() -> dict[str, Any]:
    """What tells this process from every other one, on this machine or another."""
    return {
        "host": os.environ.get("FTGEN_HOST") or socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _pid_namespace(),  # in a container the same number is another process
        "pid": os.getpid(),
        "start": _process(os.getpid())[1],
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _process_is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner ran here and does no more; False where that cannot be told."""
    here = this_process()
    if not owner.get("start") or any(owner.get(key) != here[key] for key in ("host", "boot", "pid_namespace")):
        return False
    state, start = _process(int(owner["pid"]))
    return start != owner["start"] or state in {"Z", "X"}


def _process(pid: int) -> tuple[str, str]:
    """State and start time (clock ticks since boot) of a process; two empty strings when there is none."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()  # a process's name may hold anything, ")" too
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")


def _slurm_state(job: str) -> str:
    try:
        command = ["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""  # unknown jobs may be another cluster's


def _pid_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _write(path: Path, text: str, *, in_place: bool = False) -> None:
    try:
        if in_place:
            with path.open("r+") as file:
                file.write(text)
        else:
            path.write_text(text)
    except OSError:
        pass  # a full or absent file system: others will go by the heartbeat
END_OF_FTGEN_FILE
    cat >"$1"/runtime/guard/manifest.py <<'END_OF_FTGEN_FILE'
"""What a published directory is made of. In: a directory and what identifies it. Out: its manifest, or its first flaw.

manifest.json holds {"format", "source", "origin", "files": {path: {"size": bytes, "mtime": seconds, "sha256": hex}}}:
`source` identifies what was asked for and is compared, `origin` is what the build met and is not. A file is
taken for unchanged when it is small and its hash is right, or when its size and its time (in whole seconds: some file
systems forget the rest) are those of the manifest; a large file with another time is hashed again, so that a copied
directory stays good. `thorough` hashes every file. Files that the manifest does not name do not matter: frameworks
leave caches beside their data.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "manifest.json"
SMALL = 1 << 20  # bytes; reading less costs about as much as asking for its size on a shared file system

Source = dict[str, Any]


def write(directory: Path, source: Source, origin: Source) -> None:
    """Put a manifest into a finished directory, and everything in it onto the disk."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as pool:  # hashing releases the interpreter
        entries = list(pool.map(_entry, paths))
    files = {path.relative_to(directory).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}
    text = json.dumps({"format": FORMAT, "source": source, "origin": origin, "files": files}, indent=1, sort_keys=True)
    partial = directory / f".{NAME}"
    partial.write_text(text + "\n")
    sync(partial)
    partial.rename(directory / NAME)
    for folder in [directory, *(path for path in directory.rglob("*") if path.is_dir())]:
        sync(folder)


def flaw(directory: Path, source: Source, *, thorough: bool = False) -> str | None:
    """What is wrong with a published directory, None when it can be used; never raises for what it finds there."""
    try:
        document = json.loads((directory / NAME).read_text())
        if document["format"] != FORMAT or not document["files"]:
            return f"{NAME} is of another format"
        if difference := _difference(document["source"], json.loads(json.dumps(source))):
            return difference
        with ThreadPoolExecutor(4) as pool:
            flaws = pool.map(lambda item: _file_flaw(directory / item[0], item[1], thorough), document["files"].items())
        return next((found for found in flaws if found), None)
    except FileNotFoundError:
        return f"there is no {NAME}" if directory.exists() else "it does not exist"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} cannot be read: {error}"


def sync(path: Path) -> None:
    """Wait until a file's content or a directory's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _entry(path: Path) -> dict[str, Any]:
    sync(path)
    digest, status = sha256_of(path), path.stat()
    return {"size": status.st_size, "mtime": int(status.st_mtime), "sha256": digest}


def _difference(found: Source, wanted: Source) -> str | None:
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            return f"it was made with {key} = {found.get(key)!r}, not {wanted.get(key)!r}"
    return None


def _file_flaw(path: Path, entry: dict[str, Any], thorough: bool) -> str | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return f"{path.name} is missing"
    if status.st_size != entry["size"]:
        return f"{path.name} has {status.st_size} bytes, not {entry['size']}"
    unchanged = status.st_size > SMALL and int(status.st_mtime) == entry["mtime"]
    if (thorough or not unchanged) and sha256_of(path) != entry["sha256"]:
        return f"{path.name} has another content than when it was made"
    return None
END_OF_FTGEN_FILE
    cat >"$1"/runtime/guard/publish.py <<'END_OF_FTGEN_FILE'
"""A directory that is published once, for all who ask. In: its place and how to build it. Out: the directory, finished.

    ensure(place, source, build)

`build(staging)` fills a staging directory beside the place; it gets a manifest and reaches its place by one rename, so
that what stands there is whole or is not there. Only a directory whose manifest names the same source and the files as
they are is ever used; anything else found in the place is renamed aside, never deleted. One process builds (`claim`),
the others wait for it and use its result; where it died, the next one starts over.

In <parent of place>:  <name>/  .<name>.claims/<n>/  .<name>.staging-<n>/  <name>.untrusted-<time>/
"""

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from runtime.guard import manifest
from runtime.guard.claim import Claim, Watch
from runtime.guard.manifest import Source
from runtime.job.errors import JobError
from runtime.job.progress import say

REMIND_S = 60.0  # between two lines of one who waits
POLL_S = 2.0  # between two looks at the claim, once the first seconds are over
FULL = {errno.ENOSPC, errno.EDQUOT}
GIB = 1 << 30

Build = Callable[[Path], dict[str, Any] | None]


def ensure(place: Path, source: Source, build: Build, *, need_bytes: int | Callable[[], int] = 0) -> Path:
    """The directory `place`, made by `build` unless it is there already; `need_bytes` of room are asked for first.

    `build` may return what it learned of the origin: it is recorded in the manifest, and nothing is compared with it.
    JobError: the directory cannot be written, the disk is too small or fills up. SIGTERM meanwhile: SystemExit(143).
    """
    if manifest.flaw(place, source) is None:
        return place
    claims = place.parent / f".{place.name}.claims"
    _make_directory(claims)
    while claim := _next_claim(place, source, claims):
        with _held(claim):
            if manifest.flaw(place, source) is None or _make(place, source, build, need_bytes, claim):
                break
        say(f"another process took over while {place} was being made: waiting for it")
    return place


def require_space(directory: Path, need_bytes: int, what: str) -> None:
    """JobError unless the directory's file system has room for `need_bytes` (a quota shows only when it is hit)."""
    free = shutil.disk_usage(directory).free
    if free < need_bytes:
        raise JobError(
            f"{what} needs {need_bytes / GIB:.1f} GiB in {directory}, and {free / GIB:.1f} GiB are free",
            "make room there, or set STAGE_PATH to a directory on a larger file system",
        )


def staging_of(place: Path, generation: int) -> Path:
    """Where owner `generation` builds."""
    return place.parent / f".{place.name}.staging-{generation}"


def _next_claim(place: Path, source: Source, claims: Path) -> Claim | None:
    """Wait until it is our turn to build; None once somebody else has."""
    watch, begin = Watch(claims), time.monotonic()
    said: float | None = None
    while True:
        if claim := watch.claim():
            return claim
        now = time.monotonic()
        if said is None or now - said > REMIND_S:
            say(f"waiting for {place}: {watch.holder()} is making it ({now - begin:.0f} s so far)")
            said = now
        time.sleep(min(POLL_S, 0.05 + (now - begin) / 10))
        if (place / manifest.NAME).exists() and manifest.flaw(place, source) is None:
            return None


def _make(place: Path, source: Source, build: Build, need_bytes: int | Callable[[], int], claim: Claim) -> bool:
    """Build and publish; False when another process took over meanwhile."""
    _sweep(place, claim)
    staging = staging_of(place, claim.generation)
    try:
        with _plain_disk_errors(place.parent):
            set_aside(place, source)
            if need := need_bytes() if callable(need_bytes) else need_bytes:
                require_space(place.parent, need, place.name)
            staging.mkdir()
            origin = build(staging)
            manifest.write(staging, source, origin or {})
            return _publish(staging, place, source, claim)
    except Exception:
        if claim.is_current():
            raise
        return False  # the one who took over removed our staging directory under our feet: its result is as good
    finally:
        _remove(staging)


def _publish(staging: Path, place: Path, source: Source, claim: Claim) -> bool:
    while claim.is_current():
        try:
            staging.rename(place)  # fails when something is there
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}:
                raise
            if manifest.flaw(place, source) is None:
                return True  # an owner that we had given up woke and was faster
            set_aside(place, source)
        else:
            manifest.sync(place.parent)
            return True
    return False


def set_aside(place: Path, source: Source, *, thorough: bool = False) -> None:
    """Rename what is in the place and cannot be trusted, and say so; `thorough` reads all of it."""
    flaw = manifest.flaw(place, source, thorough=thorough)
    if flaw is None or not os.path.lexists(place):
        return
    aside = place.with_name(f"{place.name}.untrusted-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    place.rename(aside)
    if manifest.flaw(aside, source, thorough=thorough) is None:  # another owner published between the look and the rename
        aside.rename(place)
        return
    say(f"{place} is not used: {flaw}. It was moved to {aside}, which nothing needs any more", any_rank=True)


def _sweep(place: Path, claim: Claim) -> None:
    """Remove what dead owners were building."""
    for staging in place.parent.glob(f".{place.name}.staging-*"):
        number = staging.name.rpartition("-")[2]
        if number.isdigit() and int(number) < claim.generation:
            _remove(staging)
    for trash in place.parent.glob(f".{place.name}.trash-*"):
        shutil.rmtree(trash, ignore_errors=True)


def _remove(staging: Path) -> None:
    """Remove by way of a rename: an owner that wakes up halfway must not publish what is left."""
    trash = staging.with_name(f"{staging.name.replace('.staging-', '.trash-')}-{os.getpid()}")
    try:
        staging.rename(trash)
    except OSError:
        return
    shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def _held(claim: Claim) -> Iterator[None]:
    """The claim is released however the block ends, by SIGTERM too."""
    with _sigterm_ends_the_block():
        try:
            yield
        finally:
            claim.release()


@contextmanager
def _sigterm_ends_the_block() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def end(_signal: int, _frame: FrameType | None) -> None:
        if os.getpid() != owner:
            os._exit(143)  # a forked child has no right to clean up
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm may send several: none of them ends the cleaning up
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobError(
            f"{directory} cannot be made: {error.strerror}", "set STAGE_PATH to a directory that you can write to"
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise JobError(f"{directory} cannot be written to", "set STAGE_PATH to a directory that you can write to")


@contextmanager
def _plain_disk_errors(directory: Path) -> Iterator[None]:
    """A full disk is one line, however deep in a library it was met."""
    try:
        yield
    except Exception as error:
        if not any(isinstance(cause, OSError) and cause.errno in FULL for cause in _causes(error)):
            raise
        raise JobError(
            f"the disk of {directory} is full, or your quota there is used up",
            "make room there, or set STAGE_PATH to a directory on a larger file system",
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/__init__.py <<'END_OF_FTGEN_FILE'
"""The job itself: errors, progress, the environment it found, profiling.

In: a plan and the process environment. Out: lines in the log. Start with `progress.py` and `errors.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/environment.py <<'END_OF_FTGEN_FILE'
"""What the training found around it: versions, machine, job. Out: one line of JSON in the log, which the report shows."""

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "nemo_toolkit", "megatron-core", "transformer-engine", "lightning", "transformers", "numpy")
DRIVER = Path("/sys/module/nvidia/version")
JOB = {"job": "SLURM_JOB_ID", "nodes": "SLURM_JOB_NODELIST", "partition": "SLURM_JOB_PARTITION"}


def tell(plan: dict[str, Any]) -> None:
    """One line, of the first rank alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"ftgen environment: {json.dumps(found(plan))}", flush=True)


def found(plan: dict[str, Any]) -> dict[str, Any]:
    """Names and versions; what is not there is left out."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: number for name in PACKAGES if (number := _version(name))},
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        **{name: os.environ[variable] for name, variable in JOB.items() if os.environ.get(variable)},
    }
    return facts | (_gpu() if plan["gpu"]["name"] != "cpu" else {})


def _gpu() -> dict[str, Any]:
    import torch

    here = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": here.name,
        "gpu_memory_gib": round(here.total_memory / 2**30, 2),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "driver": DRIVER.read_text().strip() if DRIVER.is_file() else None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/errors.py <<'END_OF_FTGEN_FILE'
"""Errors that the user can mend, as data: what is wrong, and what to do about it."""


class JobError(Exception):
    """One thing the user must change; as text it is that line, and the hint on a line of its own. Exit status 1."""

    def __init__(self, what: str, hint: str = "") -> None:
        """`what` and `hint` are one line each."""
        super().__init__(what, hint)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        """Show the rule, then the hint."""
        return self.what + (f"\n  hint: {self.hint}" if self.hint else "")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/profile.py <<'END_OF_FTGEN_FILE'
"""Profiling some steps of some ranks. In: plan["profile"]. Out: a file for each rank in $FTGEN_RUN_DIR/profile.

"nsys": the process becomes a child of Nsight Systems, which records between cudaProfilerStart and cudaProfilerStop.
"pytorch": torch.profiler, written as a Chrome trace. Steps are counted as in the log, from 0.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from runtime.job.errors import JobError
from runtime.job.progress import say

Plan = dict[str, Any]
INSIDE = "FTGEN_INSIDE_NSYS"  # set for the process that Nsight Systems started


def wanted(plan: Plan) -> bool:
    """Whether this process is one of those to profile."""
    return bool(plan.get("profile")) and int(os.environ.get("RANK", "0")) in plan["profile"]["ranks"]


def file(plan: Plan) -> Path:
    """Where the profile of this rank goes, without its suffix."""
    run = os.environ.get("FTGEN_RUN_DIR") or Path(os.environ.get("STAGE_PATH") or Path.cwd(), "logs")
    steps = f"steps_{plan['profile']['first_step']}-{plan['profile']['last_step']}"
    return Path(run, "profile", f"{steps}_rank_{os.environ.get('RANK', '0')}")


def enter(plan: Plan) -> None:
    """Start this process again under Nsight Systems, if that is wanted and not done yet. JobError: there is no nsys."""
    if not wanted(plan) or plan["profile"]["tool"] != "nsys" or INSIDE in os.environ:
        return
    nsys = shutil.which("nsys")
    if not nsys:
        raise JobError("there is no nsys on this node", 'install Nsight Systems, or set profile.tool = "pytorch"')
    file(plan).parent.mkdir(parents=True, exist_ok=True)
    os.environ[INSIDE] = "1"
    options = ["--trace=cuda,nvtx", "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--force-overwrite=true"]
    command = [nsys, "profile", *options, f"--output={file(plan)}", sys.executable, *sys.argv]
    say("profiling: " + " ".join(command))
    sys.stdout.flush()
    os.execv(nsys, command)  # noqa: S606 - the profiler takes this process's place


def add(recipe: Any, plan: Plan) -> None:
    """Let the recipe's trainer start and stop the profiler."""
    if not wanted(plan):
        return
    import nemo_run as run

    asked = plan["profile"]
    callback = run.Config(_callback(), asked["tool"], asked["first_step"], asked["last_step"], str(file(plan)))
    recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), callback]


def _callback() -> Any:
    from runtime.job.profiler import Profiler

    return Profiler
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/profiler.py <<'END_OF_FTGEN_FILE'
"""The callback that records some steps. In: the tool, the steps, a file. Out: what the tool writes.

This module imports torch and Lightning: only a training that is profiled does.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from runtime.job.progress import say


class Profiler(Callback):  # type: ignore[misc]
    """Records from the start of `first_step` to the end of `last_step`, counted from 0."""

    def __init__(self, tool: str, first_step: int, last_step: int, file: str) -> None:
        self.tool, self.first_step, self.last_step, self.file = tool, first_step, last_step, Path(file)
        self.profile: Any = None

    def on_train_batch_start(self, trainer: Any, *_args: Any) -> None:
        """Start before the first step."""
        if trainer.global_step != self.first_step:
            return
        if self.tool == "nsys":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile = torch.profiler.profile(activities=activities, record_shapes=True)
        self.profile.start()

    def on_train_batch_end(self, trainer: Any, *_args: Any) -> None:
        """Stop after the last one."""
        if trainer.global_step != self.last_step + 1:  # Lightning has counted the step by now
            return
        if self.tool == "nsys":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        elif self.profile:
            self.profile.stop()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.profile.export_chrome_trace(f"{self.file}.json")
            say(f"profile: {self.file}.json")
            self.profile = None
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/progress.py <<'END_OF_FTGEN_FILE'
"""Lines that say what the job is doing, whole ones, as they happen; under several ranks the first alone speaks."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


def say(text: str, *, any_rank: bool = False) -> None:
    """Print `ftgen: text` at once; ranks other than 0 are silent, unless what they say happens in one rank alone."""
    if any_rank or os.environ.get("RANK", "0") == "0":
        print(f"ftgen: {text}", flush=True)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say `what` when it begins, and the seconds it took when it ends well."""
    say(f"{what} ...")
    begin = time.monotonic()
    yield
    say(f"{what}: done in {time.monotonic() - begin:.1f} s")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/__init__.py <<'END_OF_FTGEN_FILE'
"""Weights in Hugging Face format: downloaded, made at random, read ahead.

In: a plan. Out: a folder with safetensors. Start with `hub.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/hub.py <<'END_OF_FTGEN_FILE'
"""The Hugging Face hub, as far as a conversion needs it. In: a repository, a revision. Out: a directory, or JobError.

The token is huggingface_hub's own affair (HF_TOKEN, or the file HF_TOKEN_PATH): it is never passed on or shown.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.job.errors import JobError

# What the importer reads. Not Meta's own format, which many repositories carry too ("original/", *.pth).
PATTERNS = ["config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "*.safetensors*"]
OUTSIDE = ["*/*"]  # the patterns match in folders too


class UnreachableError(JobError):
    """There is no way to the hub from here."""


def download(repository: str, revision: str | None) -> Path:
    """The repository's files in $HF_HOME's cache, the newest of the revision; a broken download goes on."""
    from huggingface_hub import snapshot_download

    with _plain_errors(repository, revision):
        return Path(snapshot_download(repository, revision=revision, allow_patterns=PATTERNS, ignore_patterns=OUTSIDE))


def bytes_to_download(repository: str, revision: str | None) -> int:
    """Bytes of the files that `download` still lacks."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects

    try:
        with _plain_errors(repository, revision):
            info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except UnreachableError:
        return 0  # all may be in the cache: `download` tells
    wanted = filter_repo_objects(
        info.siblings or [], allow_patterns=PATTERNS, ignore_patterns=OUTSIDE, key=lambda file: str(file.rfilename)
    )
    missing = [
        file for file in wanted if not isinstance(try_to_load_from_cache(repository, file.rfilename, revision=info.sha), str)
    ]
    return sum(file.size or 0 for file in missing)


def has_token() -> bool:
    """Whether there is a token to show, in the environment or in a file."""
    from huggingface_hub import get_token

    return bool(get_token())


@contextmanager
def _plain_errors(repository: str, revision: str | None) -> Iterator[None]:
    from huggingface_hub import errors

    page = f"https://huggingface.co/{repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise JobError(
            f"{repository} is gated, and this token has no access to it" if has_token() else f"{repository} is gated",
            f"ask for access on {page}" + ("" if has_token() else ", then export HF_TOKEN=<your token>"),
        ) from error
    except errors.RevisionNotFoundError as error:
        raise JobError(f"{repository} has no revision {revision!r}", f"see {page}/tree/main") from error
    except errors.RepositoryNotFoundError as error:
        raise JobError(
            f"{repository} is not on the Hugging Face hub, or may not be seen with this token",
            f"look at {page}, and export HF_TOKEN=<your token> if it is private",
        ) from error
    except Exception as error:
        offline = isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError)
        if offline or any(word in type(error).__name__ for word in ("Connect", "Timeout")):
            raise UnreachableError(
                f"{repository} is not in the cache, and the Hugging Face hub cannot be reached from here",
                'convert on a node with network, or set checkpoint.source = "random" or "directory" in the spec',
            ) from error
        raise _refusal(repository, error) from error


def _refusal(repository: str, error: Exception) -> Exception:
    """What the hub answers, in one line; an error of another kind as it is."""
    status: Any = getattr(getattr(error, "response", None), "status_code", None)
    if status in {401, 403}:
        return JobError(f"the Hugging Face hub refuses {repository} ({status})", "export HF_TOKEN=<a token with access>")
    if status:
        return JobError(f"the Hugging Face hub answers {status} for {repository}", "try again: a broken download goes on")
    return error
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/random_llama.py <<'END_OF_FTGEN_FILE'
"""A Llama of the plan's shape with random weights, in Hugging Face format. In: a plan. Out: a directory to import.

It is for speed: it trains as fast as the real one, and no hub is needed. The tokenizer is a byte-level BPE of exactly
`vocab_size` entries. Weights are made and written shard by shard, several at a time: 8 billion of them need 5 GiB of
memory with eight threads (measured; 2.6 with two), not 16.
"""

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.data import synthetic_text

if TYPE_CHECKING:
    import torch

SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>"]
LARGE = 10**9  # parameters from which weights are kept in bfloat16, as published models keep them
# Of Llama-3 8B, embedding and head are one shard of 1.05 billion weights and each layer one of 0.22: with as many threads
# the first ends as the others do, and more would only need more memory.
THREADS = 8
STD = 0.02  # of the random weights, Llama's `initializer_range`


def write(plan: dict[str, Any], directory: Path) -> None:
    """Config, tokenizer and weights of plan["model"], made from plan["seed"]."""
    directory.mkdir(parents=True, exist_ok=True)
    model = plan["model"]
    dtype = "bfloat16" if model["parameters"] >= LARGE else "float32"
    (directory / "config.json").write_text(json.dumps(_config(model, dtype), indent=1))
    _write_tokenizer(model["vocab_size"], model["max_position_embeddings"], directory)
    _write_weights(model, dtype, plan["seed"], directory, min(len(os.sched_getaffinity(0)), THREADS))


def _config(model: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "head_dim": model["hidden_size"] // model["num_attention_heads"],
        "hidden_act": "silu",
        "hidden_size": model["hidden_size"],
        "initializer_range": STD,
        "intermediate_size": model["ffn_hidden_size"],
        "max_position_embeddings": model["max_position_embeddings"],
        "num_attention_heads": model["num_attention_heads"],
        "num_hidden_layers": model["num_layers"],
        "num_key_value_heads": model["num_query_groups"],
        "rms_norm_eps": 1e-5,
        "rope_theta": model["rope_theta"],
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "vocab_size": model["vocab_size"],
    }


def _write_tokenizer(vocab_size: int, max_length: int, directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(vocab_size), trainer)
    missing = vocab_size - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|reserved_special_token_{index}|>" for index in range(missing)])
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    settings = named | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (directory / "special_tokens_map.json").write_text(json.dumps(named, indent=1))


def _corpus(vocab_size: int) -> list[str]:
    """Text with enough different names to give as many tokens as are asked for."""
    rng = random.Random(vocab_size)  # noqa: S311
    examples = (synthetic_text.example(rng) for _ in range(400))
    names = [synthetic_text.name(rng) for _ in range(vocab_size // 2)]
    return [f"{example['input']} {example['output']}" for example in examples] + [f" {name}" for name in names]


def _write_weights(model: dict[str, Any], dtype: str, seed: int, directory: Path, threads: int) -> None:
    """The files, the same whatever the number of threads, and their index."""
    shards = _shards(model)
    files = [directory / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    seeds = [seed * 1000 + number for number in range(len(shards))]  # a shard can be made again by itself
    with ThreadPoolExecutor(threads) as pool:  # the first is the largest, and is begun first
        size = sum(pool.map(_write_shard, shards, files, seeds, [dtype] * len(shards)))
    index = {key: file.name for shapes, file in zip(shards, files, strict=True) for key in shapes}
    document = {"metadata": {"total_size": size}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(document, indent=1))


def _write_shard(shapes: dict[str, tuple[int, ...]], file: Path, seed: int, dtype: str) -> int:
    """One file; the bytes of its weights. The time goes into torch and safetensors, which let other threads run."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {key: _weight(shape, getattr(torch, dtype), generator) for key, shape in shapes.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _shards(model: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of every weight, by name, in as many files as there are layers, and one."""
    hidden, ffn, vocab = model["hidden_size"], model["ffn_hidden_size"], model["vocab_size"]
    kv = hidden // model["num_attention_heads"] * model["num_query_groups"]
    layer = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    ends: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    numbers = range(model["num_layers"])
    return [ends, *({f"model.layers.{number}.{key}": shape for key, shape in layer.items()} for number in numbers)]


def _weight(shape: tuple[int, ...], dtype: "torch.dtype", generator: "torch.Generator") -> "torch.Tensor":
    import torch

    mean = 1 if len(shape) == 1 else 0  # the norms
    return torch.empty(shape, dtype=dtype).normal_(mean, STD, generator=generator)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/read_ahead.py <<'END_OF_FTGEN_FILE'
"""The checkpoint's weights, read while NeMo is imported. In: a folder. Out: its files in the node's page cache, perhaps.

Loading then finds in memory what would come from a disk. Nothing depends on it: it stops at the first error, and leaves
alone what would fill more than half of the memory that is free.
"""

import contextlib
import os
import threading
from pathlib import Path

PIECE = 16 << 20  # bytes


def begin(folder: Path) -> threading.Thread | None:
    """Read the folder's files in a thread; None where another rank of this node does, or they are too large."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    try:
        files = sorted(path for path in folder.glob("*") if path.is_file())
        if sum(path.stat().st_size for path in files) > _free() // 2:
            return None
    except OSError:
        return None
    thread = threading.Thread(target=_read, args=(files,), name="read ahead", daemon=True)
    thread.start()
    return thread


def _read(files: list[Path]) -> None:
    """Plain reads, which let the interpreter go on: a shared file system may ignore advice."""
    buffer = bytearray(PIECE)
    with contextlib.suppress(OSError):
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def _free() -> int:
    """Bytes of memory that are available; 0 where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
END_OF_FTGEN_FILE
    cat >"$1"/sft_fp8_8.py <<'END_OF_FTGEN_FILE'
#!/usr/bin/env python3
"""sft_nemo_llama3_8b_fp8_8: what each task of the job runs.

Written by ftgen 0.1.0 from sft_fp8_8.toml. The job's script does this for you; by hand it is

    STAGE_PATH=/shared/folder python3 sft_fp8_8.py check|packages|converted|convert|verify|finetune

    check      say what is missing before anything is done
    packages   only whether this Python has the packages that it needs
    converted  exit 0 if the converted checkpoint is there, 1 if not
    convert    download the weights and convert them to NeMo's format, unless that has been done
    verify     read every byte of the converted checkpoint; one that is not as it was made is moved away
    finetune   train; one process for each GPU, told apart by RANK, LOCAL_RANK and WORLD_SIZE (or Slurm's own variables)
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
  "name": "sft_fp8_8",
  "experiment": "sft_nemo_llama3_8b_fp8_8",
  "spec_file": "sft_fp8_8.toml",
  "spec_sha256": "9f4f6e3b1426468bffe6c42e3b39ec676b0a0ab8f856c2eb1177fd5466683193",
  "point": {},
  "overrides": {},
  "scheme": "sft",
  "precision": "fp8",
  "model": {
    "name": "llama3_8b",
    "hf_id": "meta-llama/Meta-Llama-3-8B",
    "nemo_recipe": "llama3_8b",
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
    "peak_flops": 1979000000000000.0
  },
  "gpus": 8,
  "nodes": 1,
  "gpus_per_node": 8,
  "max_steps": 100,
  "global_batch_size": 32,
  "micro_batch_size": 1,
  "seq_length": 4096,
  "seed": 1234,
  "parallelism": {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": null,
    "sequence_parallel": false,
    "data_parallel_size": 8
  },
  "data": {
    "kind": "squad",
    "path": null,
    "examples": 14000,
    "packed": true
  },
  "optimizer": {
    "learning_rate": 5e-06,
    "warmup_steps": 50
  },
  "optimizations": {
    "cuda_graphs": true,
    "fused_cross_entropy": true,
    "loss_tokens_only": true,
    "scale_small_tensor": false,
    "fused_wgrad_accumulation": true,
    "skip_nan_check": true,
    "skip_shard_transposes": true,
    "short_padding": true,
    "fused_swiglu": false,
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
  "python": {
    "kind": "none",
    "path": null,
    "image": null,
    "image_from": null,
    "mounts": [],
    "writable": false,
    "mount_home": false
  },
  "slurm": {
    "partition": null,
    "account": null,
    "qos": null,
    "reservation": null,
    "constraint": null,
    "gpu_request": "none",
    "gpu_type": null,
    "mpi": "pmix",
    "exclusive": true,
    "mem": "0",
    "requeue": null,
    "end_before_limit_s": 120,
    "convert": "job",
    "convert_flags": [],
    "sbatch_flags": [],
    "srun_flags": [],
    "walltime_s": 1800,
    "convert_walltime_s": 7200
  }
}
""")

HERE = Path(__file__).resolve().parent


def find_runtime() -> None:
    """Put the folder that holds runtime/ on the path: beside this file in a run directory, above it in ftgen's sources."""
    for folder in (HERE, HERE.parent):
        if (folder / "runtime" / "check.py").is_file():
            sys.path.insert(0, str(folder))
            return
    sys.exit(f"ftgen: error: no runtime/ beside {__file__}\n  hint: bash {PLAN['name']}.sh --unpack FOLDER writes both")


def find_sources() -> None:
    """Put other sources of the framework first on the path; exits where they are not there as the plan wants them."""
    for source in PLAN["sources"]:
        folder = Path(os.environ["STAGE_PATH"], source["folder"])
        if not (folder / ".ftgen-commit").is_file():
            sys.exit(f"ftgen: error: there is no {folder}\n  hint: ftgen setup --site SITE {PLAN['name']}.toml clones it")
        sys.path.insert(0, str(folder))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def set_environment() -> None:
    """The variables of the recipe, set here too because a container's own would win over the script's."""
    env = os.environ
    stage = env.setdefault("STAGE_PATH", str(Path.cwd()))
    env.setdefault("FTGEN_RUN_DIR", str(Path(stage, "logs", "by_hand", PLAN["experiment"])))
    hugging_face = Path(env.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    env.setdefault("HF_TOKEN_PATH", str(hugging_face / "token"))
    env["NEMO_HOME"] = env["HF_HOME"] = str(Path(stage, "HF_ckpt"))
    env["NEMORUN_HOME"] = str(Path(stage, "logs"))
    env.update(PLAN["environment"])


def set_ranks() -> None:
    """Slurm's word for each task's place, under the names that PyTorch reads; it wins over what a shell or image left."""
    names = {"RANK": "PROCID", "LOCAL_RANK": "LOCALID", "NODE_RANK": "NODEID", "WORLD_SIZE": "STEP_NUM_TASKS"}
    if all(f"SLURM_{slurm}" in os.environ for slurm in names.values()):
        os.environ.update({name: os.environ[f"SLURM_{slurm}"] for name, slurm in names.items()})
        os.environ["LOCAL_WORLD_SIZE"] = str(PLAN["gpus_per_node"])
    tasks = int(os.environ.get("WORLD_SIZE", "1"))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(min(tasks, PLAN["gpus_per_node"])))


def finetune() -> int:
    """Train; where several ranks do, a failure says whose it is, on each line, however many fail at once."""
    from runtime.engines.nemo import train
    from runtime.job.errors import JobError

    try:
        return train.train(PLAN)
    except Exception as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        text = f"ftgen: error: {error}" if isinstance(error, JobError) else traceback.format_exc().rstrip()
        who = f"[rank {os.environ['RANK']} on {socket.gethostname()}] "
        print(textwrap.indent(text, who, lambda _line: True), file=sys.stderr, flush=True)
        return 1


def main(command: str) -> int:
    """Run one command; its exit status."""
    find_runtime()
    set_environment()
    find_sources()
    from runtime.job.errors import JobError

    try:
        if command == "finetune":
            set_ranks()
            return finetune()
        if command == "check":
            from runtime import check

            return check.check(PLAN)
        if command == "packages":
            from runtime import check

            return check.packages(PLAN)
        if command in {"converted", "convert", "verify"}:
            from runtime.engines.nemo import convert

            if command == "converted":
                return 0 if convert.converted(PLAN) else 1
            return convert.convert(PLAN) if command == "convert" else convert.verify(PLAN)
    except JobError as error:
        print(f"ftgen: error: {error}", file=sys.stderr, flush=True)
        return 1
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) == 2 else ""))
END_OF_FTGEN_FILE
}

main "$@"
