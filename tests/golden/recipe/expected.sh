#!/usr/bin/env bash
# lora_nemo_llama3_8b_fp8_16: LoRA FP8 fine-tuning of llama3_8b on 2 nodes of 8 h100
# Written by ftgen 0.1.0 from spec.toml (sha256 8d46fb82e3ca211ce909a50a137d79ffef5b5cfcfa61f8999b180d070c4031a2).
# Change the spec and compile it again rather than this file.
#
#   sbatch spec.sh           on a Slurm cluster; several scripts after it run one after the other
#   bash spec.sh             on this machine
#   bash spec.sh --unpack F  only write the entrypoint and the runtime into folder F
#
# Reads: STAGE_PATH (where checkpoint, data and logs live; default: the folder it is submitted from),
# HF_TOKEN (or huggingface_hub's token file) where the model is gated, FTGEN_PYTHON (an interpreter to use instead).
#
#SBATCH --job-name=lora_nemo_llama3_8b_fp8_16
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --time=00:30:00
#SBATCH --mem=0
#SBATCH --output=sbatch_%x_%j.out
#SBATCH --exclusive

# shellcheck disable=SC2016 # what the spec says is literal: nothing in it is expanded
set -euo pipefail

readonly name=spec
readonly experiment=lora_nemo_llama3_8b_fp8_16
readonly nodes=2 tasks_per_node=8 tasks=16

main() {
    if [[ ${1:-} == --unpack ]]; then
        unpack "${2:?--unpack needs a folder}"
        return
    fi
    if (($# > 0)); then
        run_after_this "$@"
    fi
    find_places
    open_log
    load_environment
    find_python
    # from here on a failing step ends the job with its own status
    run_once check
    run_once convert
    run_tasks finetune
}

say() { printf 'ftgen: %s\n' "$*"; }
die() {
    printf 'ftgen: error: %s\n  hint: %s\n' "$1" "$2" >&2
    exit 1
}

# `sbatch a.sh b.sh c.sh` makes b.sh and c.sh arguments of a.sh: submit them, each after the one before.
# `bash a.sh b.sh c.sh` runs them, one after the other, and ends with the last failure.
run_after_this() {
    local script status=0 after=${SLURM_JOB_ID:-} variable inherited=()
    if [[ -z $after ]]; then
        for script in "$0" "$@"; do bash "$script" || status=$?; done
        exit "$status"
    fi
    if ((${SLURM_RESTART_COUNT:-0} > 0)); then return; fi
    # a job's own SLURM_ variables would reach into the jobs it submits
    for variable in $(compgen -e SLURM_); do
        if [[ $variable != SLURM_CONF ]]; then inherited+=(-u "$variable"); fi
    done
    for script in "$@"; do
        after=$(cd "$SLURM_SUBMIT_DIR" && env "${inherited[@]}" sbatch --parsable --dependency="afterany:$after" "$script")
        after=${after%%;*}
        say "submitted $script as job $after"
    done
}

# STAGE_PATH, and below it the recipe's layout: logs/experiments/<experiment>/<experiment>_<id>/<experiment>/log-….out
find_places() {
    local id=${SLURM_JOB_ID:-} account=${SLURM_JOB_ACCOUNT:-local} runs
    export STAGE_PATH=${STAGE_PATH:-${SLURM_SUBMIT_DIR:-$PWD}}
    if [[ ! -d $STAGE_PATH ]]; then
        die "STAGE_PATH is no folder: $STAGE_PATH" "mkdir -p it, or export STAGE_PATH=<a folder that all nodes share>"
    fi
    if [[ ! -w $STAGE_PATH ]]; then
        die "STAGE_PATH cannot be written to: $STAGE_PATH" "export STAGE_PATH=<a folder of yours that all nodes share>"
    fi
    STAGE_PATH=$(cd "$STAGE_PATH" && pwd)
    account=${account//[^A-Za-z0-9_-]/}
    runs=$STAGE_PATH/logs/experiments/$experiment
    mkdir -p "$runs"
    if [[ -z $id ]]; then
        id=$(date +%s)
        until mkdir "$runs/${experiment}_$id" 2>/dev/null; do
            [[ -d $runs/${experiment}_$id ]] || die "cannot write to $runs" "is the disk full, or the folder somebody else's?"
            ((id += 1))
        done
    fi
    export FTGEN_RUN_DIR=$runs/${experiment}_$id/$experiment
    code=$FTGEN_RUN_DIR/code
    log=$FTGEN_RUN_DIR/log-${account:-none}.${experiment}_${id}_${SLURM_RESTART_COUNT:-0}.out
    unpack "$code"
}

# Everything from here on goes to the log, whose first line is the plan; on a terminal it is shown as well.
open_log() {
    local plan
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
    trap 'finish $?' EXIT
}

finish() {
    say "exit status $1"
    if [[ -n ${tee:-} ]]; then
        exec >/dev/null 2>&1
        wait "$tee" || true
    fi
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
    MASTER_PORT=$((20000 + RANDOM % 20000))
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        if ((SLURM_JOB_NUM_NODES != nodes)); then
            die "the job has $SLURM_JOB_NUM_NODES nodes, the plan needs $nodes" "unset SBATCH_NODES, or drop --nodes"
        fi
        read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
    elif ((nodes > 1)); then
        die "this run needs $nodes nodes of $tasks_per_node GPUs" "submit it: sbatch $name.sh"
    fi
    export MASTER_ADDR MASTER_PORT
}

# The interpreter, and what srun needs for it.
find_python() {
    srun_flags=()
    python=${FTGEN_PYTHON:-python3}
    if ! command -v "$python" >/dev/null; then
        die "no Python: $python" "activate the environment that holds NeMo, or export FTGEN_PYTHON=<its interpreter>"
    fi
}

# One task: what the whole job needs once.
run_once() {
    "$python" "$code/$name.py" "$1"
}

# One task for each GPU.
run_tasks() {
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        srun --nodes="$nodes" --ntasks="$tasks" --ntasks-per-node="$tasks_per_node" --kill-on-bad-exit=1 \
            --mpi=pmix "${srun_flags[@]}" "$python" "$code/$name.py" "$1"
        return
    fi
    local rank status=0 pids=()
    for ((rank = 0; rank < tasks; rank++)); do
        RANK=$rank LOCAL_RANK=$rank NODE_RANK=0 WORLD_SIZE=$tasks "$python" "$code/$name.py" "$1" &
        pids+=($!)
    done
    trap 'kill "${pids[@]}" 2>/dev/null' INT TERM
    for ((rank = 0; rank < tasks; rank++)); do
        # the first task that fails decides; the others would wait for it for ever
        wait -n || status=$?
        if ((status)); then
            kill "${pids[@]}" 2>/dev/null || true
            wait "${pids[@]}" || true
            return "$status"
        fi
    done
}

