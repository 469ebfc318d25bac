#!/usr/bin/env bash
# sft_nemo_llama3_8b_bf16_32: SFT BF16 fine-tuning of llama3_8b on 4 nodes of 8 h100
# Written by ftgen 0.1.0 from spec.toml (sha256 4bebe0996a6bad87d6ecfedfc1e51d8fa6fab6a9fb78263ecd8f880354751858).
# Do not change this file: change the spec and compile it again.
#
#   sbatch spec.sh           on a Slurm cluster; if you name several scripts, they run one after the other
#   bash spec.sh             on this machine
#   bash spec.sh --unpack F  only write the entrypoint and the runtime files into folder F
#
# Reads: STAGE_PATH (folder of checkpoint, data and logs; default: the folder where you submit),
# HF_TOKEN (or the token file of huggingface_hub) if the model is gated, FTGEN_PYTHON (replaces the plan's interpreter).
#
#SBATCH --job-name=ftgen_llama3_8b
#SBATCH --dependency=singleton
#SBATCH --comment=sft_nemo_llama3_8b_bf16_32
#SBATCH --account=coreai
#SBATCH --partition=batch
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --mem=0
#SBATCH --output=sbatch_sft_nemo_llama3_8b_bf16_32_%j.out
#SBATCH --open-mode=append
#SBATCH --exclusive

# shellcheck disable=SC2016 # values from the spec are literal: bash expands nothing in them
set -euo pipefail

readonly name=spec
readonly experiment=sft_nemo_llama3_8b_bf16_32
readonly nodes=4 tasks_per_node=8 tasks=32
# Variables that this script sets. A job that it submits must not inherit them.
readonly ours=(STAGE_PATH FTGEN_RUN_DIR FTGEN_ENVIRONMENT MASTER_ADDR MASTER_PORT FTGEN_MASTER_ADDR FTGEN_MASTER_PORT PYTHONUNBUFFERED NCCL_IB_HCA NCCL_NVLS_ENABLE NVTE_ASYNC_AMAX_REDUCTION NVTE_DP_AMAX_REDUCE_INTERVAL NVTE_FLASH_ATTN NVTE_FUSED_ATTN TOKENIZERS_PARALLELISM TORCH_NCCL_AVOID_RECORD_STREAMS)

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
    trap 'stop 124 "the time limit is near: the run stops now and removes its unfinished files"' USR1
    trap 'stop 143 "SIGTERM: cancelled, pre-empted or requeued"' TERM
    trap 'stop 130 "interrupted"' INT
    find_places
    open_log $mode
    load_environment $mode
    find_python
    # from here on, a step that fails ends the job with its exit code
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
# Prints to Slurm's own output file too. A requeued job reads there which jobs it has submitted.
tell() {
    say "$*"
    say "$*" >&3
}
die() {
    printf 'ftgen: error: %s\n  hint: %s\n' "$1" "$2" >&2
    exit 1
}
is_batch_job() { [[ -n ${SLURM_JOB_ID:-} && ${SLURM_TASK_PID:-} == "$$" ]]; }

# `bash a.sh b.sh c.sh` runs the scripts one after the other. The exit code is that of the last script that failed.
run_all() {
    local script status=0
    if ((${#rest[@]} == 0)); then return; fi
    for script in "$0" "${rest[@]}"; do bash "$script" || status=$?; done
    exit "$status"
}

# submit_the_rest AFTER [ALL]: in `sbatch a.sh b.sh c.sh`, b.sh and c.sh are arguments of a.sh. This function submits them:
# b.sh runs after job AFTER, c.sh after b.sh, whether these fail or not. A job waits only for jobs with smaller numbers, so no
# job can wait for itself. ALL are the numbers of the earlier jobs.
submit_the_rest() {
    local after=$1 all=${2:-$1} script job number=1 total=$((${#rest[@]} + 1))
    # in a trap, `return` without a number would return the exit code of the job
    if ((total == 1)) || [[ -n ${rest_is_submitted:-} ]]; then return 0; fi
    rest_is_submitted=yes
    for script in "${rest[@]}"; do
        ((number += 1))
        job=$(sed -n "s/^ftgen: $number of $total: job \([0-9]*\) runs .*/\1/p" "/proc/$$/fd/3" 2>/dev/null | tail -n 1) || true
        if [[ -z $job ]]; then # otherwise it was submitted before this job was requeued
            if ! job=$(submit "$script" "--dependency=singleton,afterany:$after" "$script"); then
                tell "$number of $total: $script could not be submitted"
                continue
            fi
            tell "$number of $total: job $job runs $script after job $after"
        fi
        after=$job
        all+=" $job"
    done
    tell "to cancel all of them: scancel $all"
}

# submit LIKE WORDS...: runs `sbatch WORDS...` and prints the number of the new job. If the user overrode an option of this
# job's header, and the header of script LIKE has the same value as this header, the new job gets the same override.
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
    # restore the environment of the user; SLURM_ variables of this job would change the new job
    unset "${ours[@]}" "${site_variables[@]}"
    eval "$inherited"
    for variable in $(compgen -e SLURM_); do
        if [[ $variable != SLURM_CONF ]]; then unset "$variable"; fi
    done
    job=$(sbatch --parsable "${options[@]}" "$@") || return
    printf %s "${job%%;*}"
)

# header FILE OPTION: the value of the option in the #SBATCH lines of a script.
header() { sed -n -e '/^set /q' -e "s/^#SBATCH --$2=//p" "$1" 2>/dev/null; }

# The converted checkpoint does not exist: submit a small job that converts it, and a copy of this job that runs after it.
hand_over() {
    local job copy script=$code/convert.sh
    sed -E '1,/^set /{/^#SBATCH --(dependency|exclusive|gres|gpus-per-node|ntasks-per-node|segment|mem(-per-[cg]pu)?)(=|$)/d}' "$0" >"$script"
    if ! job=$(submit "$0" --job-name=ftgen_llama3_8b_convert --dependency=singleton --nodes=1 --ntasks=1 --gpus-per-node=1 --time=02:00:00 --mem=0 "$script" --convert); then
        say "cannot submit a job for the conversion: this job converts the checkpoint itself"
        return 1
    fi
    if ! copy=$(submit "$0" "--dependency=singleton,afterany:$job" "$0" --after "$job"); then
        scancel "$job" || true
        say "cannot submit a job that runs after the conversion: this job converts the checkpoint itself"
        return 1
    fi
    tell "the converted checkpoint does not exist: job $job converts it on one node, and job $copy runs this script after it"
    # this job was not a run: rename its log, so that nobody takes it for the log of a run
    mv "$log" "${log/"/log-"/"/submit-"}"
    submit_the_rest "$copy" "$job $copy"
}

# Sets STAGE_PATH and, below it, the recipe's layout: logs/experiments/<experiment>/<experiment>_<id>/<experiment>/log-….out
find_places() {
    local id=${SLURM_JOB_ID:-} runs
    export STAGE_PATH=${STAGE_PATH:-${SLURM_SUBMIT_DIR:-$PWD}}
    if [[ ! -d $STAGE_PATH ]]; then
        die "STAGE_PATH is not a folder: $STAGE_PATH" "create it with mkdir -p, or export STAGE_PATH=<a folder that all nodes share>"
    fi
    if [[ ! -w $STAGE_PATH ]]; then
        die "STAGE_PATH: you cannot write to $STAGE_PATH" "export STAGE_PATH=<a folder of yours that all nodes share>"
    fi
    STAGE_PATH=$(cd "$STAGE_PATH" && pwd)
    runs=$STAGE_PATH/logs/experiments/$experiment
    mkdir -p "$runs"
    if [[ -z $id ]]; then
        id=$(date +%s)
        until mkdir "$runs/${experiment}_$id" 2>/dev/null; do
            [[ -d $runs/${experiment}_$id ]] || die "cannot write to $runs" "check that the disk is not full and that the folder is yours"
            ((id += 1))
        done
    fi
    run_id=$id
    export FTGEN_RUN_DIR=$runs/${experiment}_$id/$experiment
    code=$FTGEN_RUN_DIR/code
    unpack "$code"
}

# Sends all further output to the log, whose first line is the plan. On a terminal, the output is also shown.
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
    # a background child that is killed right after its fork may still have this trap
    if [[ $BASHPID != "$$" ]]; then return 0; fi
    trap '' USR1 TERM INT
    # a job that failed early still submits the rest; a job that was stopped does not
    if [[ -z ${stopping:-} ]] && is_batch_job; then submit_the_rest "$SLURM_JOB_ID"; fi
    if [[ -n ${ender:-} ]]; then kill "$ender" 2>/dev/null || true; fi
    say "exit status $1"
    if [[ -n ${tee:-} ]]; then
        exec >/dev/null 2>&1 3>&1
        wait "$tee" || true
    fi
}

# stop CODE REASON: handles a signal. The running command is asked to end, and the job ends with exit code CODE.
stop() {
    if [[ -n ${stopping:-} ]]; then return 0; fi
    stopping=$1
    printf 'ftgen: error: %s\n' "$2" >&2
    if ((${#children[@]} == 0)); then exit "$1"; fi
}
children=()

end_children() {
    # when Slurm ends a job, it signals every process itself; do not signal them again at once
    if [[ -n ${SLURM_JOB_ID:-} ]] && ((stopping == 143)); then sleep 2; fi
    if [[ -n ${step:-} ]]; then
        scancel --signal=TERM "$SLURM_JOB_ID.$step" || true # signals the tasks; srun would kill them at once
    else
        kill "${children[@]}" || true
    fi
    sleep 20
    kill -KILL "${children[@]}"
}

# await COMMAND...: runs the command and returns its exit code. Signals are handled at once, not after the command.
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

# wait_for PID: a trapped signal ends bash's `wait` while the child still runs. If the same signal ended the child, bash can
# miss its end and wait for ever. So once the job has to stop, this function polls with `kill -0`.
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

# run_site_lines LINE...: runs lines of the site profile in a bash of their own, one after the other. There, a line may read
# variables that are not set, and define any variable, function or trap: it does not meet those of this script. This script
# then takes over the environment, the limits and the umask. They come through a pipe, because no file may have a secret.
run_site_lines() {
    local record line="" complete=""
    exec 4>&1
    while IFS= read -r -d '' record; do
        case $record in
            "line "*) line=${record#line } ;;
            "limit "*) ulimit -S "-${record:6:1}" "${record:8}" 2>/dev/null || true ;;
            "umask "*) umask "${record#umask }" ;;
            "names "*) drop_variables_except "${record#names }" ;;
            "export "*) take_variable "${record#export }" ;;
            "failed "*) break ;;
            complete) complete=yes && break ;; # not at the end of the pipe: a daemon that a line started may keep it open
        esac
    done < <(bash -c "$site_shell" site "$@")
    exec 4>&-
    if [[ -z $complete ]]; then
        die "this line of the site profile failed: $line" "correct it, or append || true to it if the job can run without it"
    fi
}

# Prints the records that run_site_lines reads: the line that runs, and at the end what all lines leave.
readonly site_shell='
for ftgen_line; do
    printf "line %s\0" "$ftgen_line"
    eval "$ftgen_line" >&4 3>&- 4>&- || { printf "failed %s\0" "$?"; exit 1; }
done
set +eux
IFS=" "
for ftgen_flag in c d e f i l m n q r s t u v x; do
    printf "limit %s %s\0" "$ftgen_flag" "$(ulimit -S "-$ftgen_flag" 2>/dev/null)"
done
printf "umask %s\0" "$(umask)"
mapfile -t ftgen_names < <(compgen -e)
printf "names %s\0" "${ftgen_names[*]}"
for ftgen_name in "${ftgen_names[@]}"; do printf "export %s=%s\0" "$ftgen_name" "${!ftgen_name}"; done
printf "complete\0"
'

# take_variable NAME=VALUE: exports a variable. Those of bash stay, and those of this script, which are not exported.
take_variable() {
    local variable=${1%%=*} now
    case $variable in _ | SHLVL | PWD | OLDPWD | PPID | UID | EUID | BASH* | SHELLOPTS) return ;; esac
    if [[ -n ${!variable+set} && ${!variable} == "${1#*=}" ]]; then return; fi
    now=$(declare -p "$variable" 2>/dev/null) || now=
    if [[ -n $now && $now != "declare -x "* ]]; then return; fi
    remember_variable "$variable"
    export "$variable=${1#*=}"
}

# drop_variables_except NAMES: unsets the exported variables that the lines have unset.
drop_variables_except() {
    local variable
    for variable in $(compgen -e); do
        if [[ " $1 " == *" $variable "* ]]; then continue; fi
        remember_variable "$variable"
        unset "$variable" 2>/dev/null || true
    done
}

# A job that this one submits runs the lines itself: it must not inherit what they have changed here.
remember_variable() {
    if [[ " ${ours[*]} " == *" $1 "* ]]; then return; fi
    site_variables+=("$1")
    inherited+=$'\n'$(declare -p "$1" 2>/dev/null) || true
}
site_variables=()


load_environment() {
    run_site_lines 'module load slurm' 'module load cuda/12.6'
    export NCCL_NVLS_ENABLE=0
    export NVTE_ASYNC_AMAX_REDUCTION=1
    export NVTE_DP_AMAX_REDUCE_INTERVAL=0
    export NVTE_FLASH_ATTN=1
    export NVTE_FUSED_ATTN=1
    export TOKENIZERS_PARALLELISM=False
    export TORCH_NCCL_AVOID_RECORD_STREAMS=1
    export NCCL_IB_HCA=mlx5
    unset FTGEN_ENVIRONMENT # the entrypoint expands variables inside the image
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
    # a batch script runs on the first node, where another program may use the port
    while (: <"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null; do ((MASTER_PORT += 1)); done
    export MASTER_ADDR MASTER_PORT
    # an image may have its own: the entrypoint takes these
    export FTGEN_MASTER_ADDR=$MASTER_ADDR FTGEN_MASTER_PORT=$MASTER_PORT
}

# SBATCH_ variables of the shell that submits override this script's header.
warn_of_variables() {
    local variable value
    while read -r variable value; do
        if [[ -n ${!variable+set} && ${!variable} != "$value" ]]; then
            tell "warning: $variable=${!variable} from the shell that submitted the job overrides this script (${value:-nothing})"
        fi
    done <<'END_OF_FTGEN_FILE'
SBATCH_ACCOUNT coreai
SBATCH_ARRAY_INX 
SBATCH_CLUSTERS 
SBATCH_CORE_SPEC 
SBATCH_CPUS_PER_GPU 
SBATCH_EXCLUSIVE 
SBATCH_GPUS 
SBATCH_GPUS_PER_NODE 8
SBATCH_GPUS_PER_TASK 
SBATCH_GRES 
SBATCH_JOB_NAME ftgen_llama3_8b
SBATCH_MEM_PER_CPU 
SBATCH_MEM_PER_GPU 
SBATCH_MEM_PER_NODE 0
SBATCH_NO_REQUEUE 
SBATCH_OPEN_MODE append
SBATCH_OUTPUT sbatch_sft_nemo_llama3_8b_bf16_32_%j.out
SBATCH_OVERCOMMIT 
SBATCH_PARTITION batch
SBATCH_REQUEUE 
SBATCH_SIGNAL B:USR1@120
SBATCH_THREADS_PER_CORE 
SBATCH_TIMELIMIT 00:30:00
END_OF_FTGEN_FILE
}

# Sets `python`, the command of the interpreter, and `srun_flags`, the options that srun needs for it.
find_python() {
    srun_flags=(--cpu-bind=none)
    local mounts=(
        "$STAGE_PATH:$STAGE_PATH"
        /datasets:/datasets:ro
        "${STAGE_PATH}/Megatron-LM:/opt/megatron-lm"
    )
    python=("${FTGEN_PYTHON:-python3}")
    if [[ -z ${SLURM_JOB_ID:-} ]]; then
        if [[ -z ${FTGEN_PYTHON:-} ]]; then
            die "only Slurm's srun can start the container" "sbatch $name.sh, or export FTGEN_PYTHON=<an interpreter>"
        fi
        return 0
    fi
    srun_flags+=(
        --container-image="${STAGE_PATH}/nvidia+nemo+24.12.sqsh"
        --container-mounts="$(IFS=, && printf %s "${mounts[*]}")"
        --no-container-mount-home
        --container-writable
    )
}

# run_once COMMAND: runs a command of the entrypoint in one task.
run_once() {
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        next_step
        await srun --nodes=1 --ntasks=1 --export=ALL "${srun_flags[@]}" "${python[@]}" "$code/$name.py" "$1"
        return
    fi
    await "${python[@]}" "$code/$name.py" "$1"
}

# Slurm numbers the steps of a job from 0.
next_step() { step=$((${step:--1} + 1)); }

# run_tasks COMMAND: runs a command of the entrypoint in one task per GPU.
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
        # the first task that fails gives the exit code; the other tasks would wait for it for ever
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

# first_failure FROM STATUS: prints the exit code of the task that failed first. srun's own STATUS is the highest of all tasks,
# often that of a task that srun killed. The log after byte FROM has srun's reports in order.
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

