#!/usr/bin/env bash
# sft_nemo_llama3_8b_fp8_8: SFT FP8 fine-tuning of llama3_8b on 1 node of 8 h100
# Written by ftgen 0.1.0 from sft_fp8_8.toml (sha256 bae07fbec50a7d93e252755d1a15f42e5636549c1f3e0421e94d63ef0f537871).
# Do not change this file: change the spec and compile it again.
#
#   sbatch sft_fp8_8.sh           on a Slurm cluster; if you name several scripts, they run one after the other
#   bash sft_fp8_8.sh             on this machine
#   bash sft_fp8_8.sh --download  only download weights and data, where there is a network: needs Python 3.10 and huggingface_hub
#   bash sft_fp8_8.sh --unpack F  only write the entrypoint and the runtime files into folder F
#
# Reads: STAGE_PATH (folder of checkpoint, data and logs; default: the folder where you submit),
# HF_TOKEN (or the token file of huggingface_hub) if the model is gated, FTGEN_PYTHON (replaces the plan's interpreter),
# FTGEN_QUIET_S (seconds without output after which the log says where the job waits; default: 600).
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

# shellcheck disable=SC2016 # values from the spec are literal: bash expands nothing in them
set -euo pipefail

readonly name=sft_fp8_8
readonly experiment=sft_nemo_llama3_8b_fp8_8
readonly nodes=1 tasks_per_node=8 tasks=8
# Variables that this script sets. A job that it submits must not inherit them.
readonly ours=(STAGE_PATH FTGEN_RUN_DIR FTGEN_ENVIRONMENT HF_TOKEN_PATH FTGEN_HUB_CACHE MASTER_ADDR MASTER_PORT FTGEN_MASTER_ADDR FTGEN_MASTER_PORT PYTHONUNBUFFERED NCCL_NVLS_ENABLE NVTE_ASYNC_AMAX_REDUCTION NVTE_DP_AMAX_REDUCE_INTERVAL NVTE_FLASH_ATTN NVTE_FUSED_ATTN TOKENIZERS_PARALLELISM TORCH_NCCL_AVOID_RECORD_STREAMS)

main() {
    local mode=finetune
    local converted_by=
    case ${1:-} in
        --unpack)
            unpack "${2:?--unpack needs a folder}"
            return
            ;;
        --download)
            shift
            download "$@" # exits
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
    start_clean
    inherited=$(for variable in "${ours[@]}"; do [[ -z ${!variable+set} ]] || declare -p "$variable"; done)
    trap 'finish $?' EXIT
    trap 'stop 124 "the time limit is near: the run stops now and removes its unfinished files"' USR1
    trap 'stop 143 "SIGTERM: cancelled, pre-empted or requeued"' TERM
    trap 'stop 130 "interrupted"' INT
    find_places
    open_log $mode
    find_hub
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
# finish prints an error to Slurm's own output file too.
die() {
    printf 'ftgen: error: %s\n  hint: %s\n' "$1" "$2" >&2
    exit 1
}
is_batch_job() { [[ -n ${SLURM_JOB_ID:-} && ${SLURM_TASK_PID:-} == "$$" ]]; }

# drop_inherited: drops what the job inherits from the session in which `sbatch` was typed: salloc, srun --pty, Jupyter in a
# job. srun takes such variables for its options, and a framework takes them for its number of tasks. The rule: this script
# tells srun every option on its command line, so of SLURM_ only facts are kept, which Slurm sets anew for every job. Sets
# `dropped` to the names that are worth a word.
drop_inherited() {
    local variable
    for variable in $(compgen -e); do
        case $variable in
            # how to reach Slurm, and what its plugins set
            SLURM_CONF | SLURM_CONF_SERVER | SLURM_JWT | SLURM_CLUSTER_NAME | SLURM_WORKING_CLUSTER | SLURM_SPANK_*) ;;
            # facts of the job
            SLURM_JOB_* | SLURM_JOBID | SLURM_NNODES | SLURM_NODELIST | SLURM_NODE_ALIASES | SLURM_TOPOLOGY_*) ;;
            SLURM_RESTART_COUNT | SLURM_SUBMIT_* | SLURM_TASK_PID | SLURM_PRIO_PROCESS) ;;
            # Slurm sets these for any job: nothing to report
            SLURM_CPUS_ON_NODE | SLURM_CPUS_PER_TASK | SLURM_GET_USER_ENV | SLURM_GPUS_ON_NODE | SLURM_GPUS_PER_NODE | \
                SLURM_GTIDS | SLURM_LOCALID | SLURM_MEM_PER_CPU | SLURM_MEM_PER_NODE | SLURM_NODEID | SLURM_NPROCS | \
                SLURM_NTASKS | SLURM_NTASKS_PER_NODE | SLURM_OOM_KILL_STEP | SLURM_OPEN_MODE | SLURM_PROCID | SLURM_SCRIPT_CONTEXT | \
                SLURM_TASKS_PER_NODE)
                unset "$variable"
                ;;
            SLURM_* | SRUN_* | SLURMD_DEBUG | PMI_* | PMIX_* | OMPI_* | TORCHELASTIC_* | RANK | LOCAL_RANK | NODE_RANK | \
                GROUP_RANK | WORLD_SIZE | LOCAL_WORLD_SIZE)
                unset "$variable"
                dropped+=("$variable")
                ;;
        esac
    done
}
dropped=()

start_clean() {
    exported=${SLURM_EXPORT_ENV:-ALL}
    if [[ -z ${SLURM_JOB_ID:-} ]]; then return 0; fi
    # a step of a session that runs this script itself has the session's CPUs and GPUs: our steps must share them
    if [[ -n ${SLURM_STEP_ID:-} ]] && ! is_batch_job; then share_flags=(--overlap); fi
    drop_inherited
    # this job asks for no GPU, it has its nodes with all GPUs: a list of GPUs is that of the session
    if is_batch_job; then unset CUDA_VISIBLE_DEVICES GPU_DEVICE_ORDINAL ROCR_VISIBLE_DEVICES ZE_AFFINITY_MASK; fi
    if is_batch_job; then ask_slurm_of_this_job; fi
}
exported=ALL share_flags=()

# Slurm sets some facts only where there is something to say. Otherwise they are those of the session.
ask_slurm_of_this_job() {
    local record
    record=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null) || return 0
    unset SLURM_RESTART_COUNT SLURM_JOB_ACCOUNT
    if [[ $record =~ [[:space:]]Restarts=([1-9][0-9]*) ]]; then export SLURM_RESTART_COUNT=${BASH_REMATCH[1]}; fi
    if [[ $record =~ [[:space:]]Account=([^[:space:]]+) && ${BASH_REMATCH[1]} != "(null)" ]]; then
        export SLURM_JOB_ACCOUNT=${BASH_REMATCH[1]}
    fi
}

# Says which variables of the shell that submitted have no effect, and which have one that nobody may have meant.
warn_of_variables() {
    local variable value
    if ((${#dropped[@]})); then
        say "not used, because they are those of the session that submitted this job: ${dropped[*]}"
    fi
    if [[ ,$exported, != *,ALL,* ]]; then
        tell "warning: submitted with --export=$exported (or SBATCH_EXPORT): other variables of the shell, such as FTGEN_PYTHON and HF_TOKEN, did not reach this job"
    fi
    # SBATCH_ variables of the shell that submits override this script's header
    while read -r variable value; do
        if [[ -n ${!variable+set} && ${!variable} != "$value" ]]; then
            tell "warning: $variable=${!variable} from the shell that submitted the job overrides this script (${value:-nothing})"
        fi
    done <<'END_OF_FTGEN_FILE'
SBATCH_ARRAY_INX 
SBATCH_CLUSTERS 
SBATCH_CORE_SPEC 
SBATCH_CPUS_PER_GPU 
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
            if ! job=$(submit "$script" run "--dependency=singleton,afterany:$after" "$script"); then
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

# submit SCRIPT KIND WORDS...: runs `sbatch WORDS...` and prints the number of the new job. It gets the options that the user
# gave for this job: see find_options. They override those in `defaults`.
submit() (
    cd "$SLURM_SUBMIT_DIR" || return
    find_options "$1" "$2"
    shift 2
    # restore the environment of the user; SLURM_ variables of this job would change the new job
    unset "${ours[@]}"
    eval "$inherited"
    for variable in $(compgen -e SLURM_); do
        if [[ $variable != SLURM_CONF ]]; then unset "$variable"; fi
    done
    job=$(sbatch --parsable "${defaults[@]}" "${options[@]}" "$@") || return
    printf %s "${job%%;*}"
)
defaults=()

# The converted checkpoint does not exist: submit a small job that converts it, and a copy of this job that runs after it.
hand_over() {
    local job copy script=$code/convert.sh defaults=("--job-name=${SLURM_JOB_NAME}_convert" --dependency=singleton --nodes=1 --ntasks=1 --time=02:00:00 --mem=0)
    # without what asks for the nodes and GPUs of the run
    sed -E '1,/^set /{/^#SBATCH --(dependency|exclusive|gres|gpus-per-node|ntasks-per-node|segment|mem(-per-[cg]pu)?|contiguous|spread-job|switches|nodelist=.*[,[].*)(=|$)/d}' "$0" >"$script"
    if ! job=$(submit "$0" convert "$script" --convert); then
        say "cannot submit a job for the conversion: this job converts the checkpoint itself"
        return 1
    fi
    defaults=()
    if ! copy=$(submit "$0" run "--dependency=singleton,afterany:$job" "$0" --after "$job"); then
        scancel "$job" || true
        say "cannot submit a job that runs after the conversion: this job converts the checkpoint itself"
        return 1
    fi
    tell "the converted checkpoint does not exist: job $job converts it on one node, and job $copy runs this script after it"
    # this job was not a run: rename its log, so that nobody takes it for the log of a run
    mv "$log" "${log/"/log-"/"/submit-"}"
    submit_the_rest "$copy" "$job $copy"
}

# What the user said on sbatch's command line holds for every job that this script submits. Slurm does not keep the command
# line. So its words are found in the record of this job: a field that differs from the header of this script was said.

# Each line: a field of `scontrol show job`; the option of sbatch; the field without the option; the scripts that get the word
# too: all, those whose header is the same there, or none; whether the conversion job gets it (one: if it names one node); and
# "default" where Slurm fills in a field that nobody mentioned.
readonly options_of_fields='
Account        account          (null)  all   yes  default
Partition      partition        -       all   yes  default
QOS            qos              (null)  all   yes  default
Reservation    reservation      (null)  all   yes  -
Features       constraint       (null)  all   yes  -
ExcNodeList    exclude          -       all   yes  -
ReqNodeList    nodelist         -       same  one  -
Licenses       licenses         (null)  all   yes  -
Nice           nice             0       all   yes  -
WCKey          wckey            (null)  all   yes  default
MailUser       mail-user        (null)  all   yes  default
MailType       mail-type        NONE    all   yes  -
Comment        comment          (null)  all   yes  -
JobName        job-name         -       all   own  -
TimeLimit      time             -       all   no   -
TimeMin        time-min         N/A     all   no   -
Deadline       deadline         N/A     all   yes  -
Requeue        requeue          -       all   yes  default
OverSubscribe  exclusive        OK      all   no   default
MinMemoryNode  mem              -       same  yes  default
MinMemoryCPU   mem-per-cpu      -       same  yes  default
MemPerTres     mem-per-gpu      -       same  no   -
CPUs/Task      cpus-per-task    1       all   yes  -
CpusPerTres    cpus-per-gpu     -       all   no   -
MinTmpDiskNode tmp              0       all   yes  -
CoreSpec       core-spec        *       all   yes  -
ReqB:S:C:T     threads-per-core *       all   yes  -
Contiguous     contiguous       0       all   no   -
Switches       switches         -       all   no   -
Network        network          (null)  all   no   -
BurstBuffer    bb               (null)  all   yes  -
TresPerNode    gres             -       same  no   -
TresPerJob     gpus             -       none  no   -
TresPerTask    gpus-per-task    -       none  no   -
TresBind       gpu-bind         -       none  no   -
WorkDir        chdir            -       all   yes  -
StdOut         output           -       all   yes  -
StdErr         error            -       all   yes  -
'

# find_options SCRIPT KIND: sets `options` to the words that the new job gets too. KIND is "run" or "convert". Prints each word
# that it does not get, and why.
find_options() {
    local record field option unset_value scripts convert default got mine theirs why
    options=()
    record=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null) || record=
    while read -r field option unset_value scripts convert default; do
        got=$(value_in_record "$field")
        if [[ -z $got || $got == "$unset_value" ]]; then continue; fi
        mine=$(value_in_header "$0" "$option")
        # Slurm chooses one of several partitions
        if [[ $got == "$mine" || ($option == partition && ,$mine, == *,"$got",*) ]]; then continue; fi
        theirs=$(value_in_header "$1" "$option")
        if ! why=$(reason_against "$1" "$2"); then
            options+=("$(as_option)")
        elif [[ -n $why && ($default == - || -n $mine) ]]; then
            tell "$(as_option) of this job does not hold for $(name_of "$1" "$2"): $why" >&2
        fi
    done < <(grep . <<<"$options_of_fields")
}

# Why the new job does not get the word; nothing where there is nothing to say. Exit code 1 if it gets the word. Reads the
# variables of find_options.
reason_against() {
    if [[ $2 == convert ]]; then
        case $convert in
            own) return 0 ;;
            no) printf 'it has one node, one task, at most one GPU, and the time limit convert_walltime' ;;
            one) [[ $got == *,* ]] && printf 'it has one node' ;;
            *) return 1 ;;
        esac
    elif [[ $scripts == none ]]; then
        printf 'each script asks for the GPUs of its plan'
    elif [[ $scripts == same && $mine != "$theirs" ]]; then
        printf 'its header has %s, that of this job %s' "${theirs:-nothing}" "${mine:-nothing}"
    elif [[ $option == nodelist && $(header "$0" nodes) != "$(header "$1" nodes)" ]]; then
        printf 'it has another number of nodes'
    elif [[ $option == cpus-per-task && $(header "$0" ntasks-per-node) != "$(header "$1" ntasks-per-node)" ]]; then
        printf 'it has another number of tasks on a node'
    elif [[ $default == default && -z $mine && -n $theirs && $theirs != "$got" ]]; then
        printf 'its header has %s' "$theirs"
    else
        return 1
    fi
}

# The value of a field of the record, in the form of the option's value.
value_in_record() {
    local got=
    case $1 in
        Comment | WorkDir | StdOut | StdErr) got=$(sed -n "s/^ *$1=\(.*[^ ]\) *$/\1/p" <<<"$record") ;;
        *) if [[ $record =~ [[:space:]]$1=([^[:space:]]*) ]]; then got=${BASH_REMATCH[1]}; fi ;;
    esac
    case $1 in
        ReqNodeList | ExcNodeList) got=$(node_list "$got") ;;
        Min*) got=$(megabytes "$got") ;;
        MemPerTres) got=$(megabytes "${got##*:}") ;;
        CpusPerTres | ReqB:S:C:T) got=${got##*:} ;;
        Tres*) got=${got//gres:/} ;;
        StdOut | StdErr) # %j was expanded
            got=$(sed -E "s/(^|[^0-9])$SLURM_JOB_ID([^0-9]|$)/\1%j\2/g" <<<"$got")
            # without --error, both go to the same file
            if [[ $1 == StdErr && $got == "$(value_in_record StdOut)" ]]; then got=; fi
            ;;
    esac
    printf %s "$got"
}

# The value of an option in a script's header, in the form in which value_in_record gives it.
value_in_header() {
    local value
    value=$(header "$1" "$2")
    case $2 in
        requeue) if has_flag "$1" requeue; then value=1; elif has_flag "$1" no-requeue; then value=0; fi ;;
        exclusive) if has_flag "$1" exclusive; then value=NO; fi ;;
        contiguous) if has_flag "$1" contiguous; then value=1; fi ;;
        tmp) value=$(megabytes "$value") ;;
        mem*) # these options exclude each other
            local other
            value=$(megabytes "$value")
            for other in mem mem-per-cpu mem-per-gpu; do
                if [[ -z $value && -n $(header "$1" $other) ]]; then value="--$other=$(header "$1" $other)"; fi
            done
            ;;
        nodelist | exclude) value=$(node_list "$value") ;;
        threads-per-core) if [[ $(header "$1" hint) == nomultithread ]]; then value=1; fi ;;
        gres) if [[ -z $value && -n $(header "$1" gpus-per-node) ]]; then value=gpu:$(header "$1" gpus-per-node); fi ;;
        chdir) value=${value:-$SLURM_SUBMIT_DIR} ;;
        output)
            value=${value//%u/$SLURM_JOB_USER} value=${value//%x/$SLURM_JOB_NAME}
            if [[ $value != /* ]]; then value=$(value_in_record WorkDir)/$value; fi
            ;;
    esac
    printf %s "$value"
}

name_of() { if [[ $2 == convert ]]; then printf 'the conversion job'; else printf %s "${1##*/}"; fi; }
as_option() {
    case $option=$got in
        requeue=0) printf %s --no-requeue ;;
        exclusive=YES) printf %s --oversubscribe ;;
        requeue=* | exclusive=NO | contiguous=*) printf -- '--%s' "$option" ;;
        exclusive=*) printf -- '--exclusive=%s' "${got,,}" ;;
        *) printf -- '--%s=%s' "$option" "$got" ;;
    esac
}

# header FILE OPTION: the value of the option in the #SBATCH lines of a script.
header() {
    # sbatch reads quotes, and a backslash takes the next character as it is
    sed -n -e '/^set /q' -e "/^#SBATCH --$2=/{s///;s/^\"\(.*\)\"\$/\1/;s/\\\\\(.\)/\1/g;p}" "$1" 2>/dev/null
}
has_flag() { sed '/^set /q' "$1" 2>/dev/null | grep -qx -- "#SBATCH --$2"; }

# A list of nodes has many forms: node[1-2], or node1,node2.
node_list() { if [[ -n $1 && $1 != "(null)" ]]; then scontrol show hostnames "$1" | sort | paste -sd, || true; fi; }
megabytes() {
    case $1 in
        *[0-9]T) printf '%dM' $((${1%T} * 1048576)) ;;
        *[0-9]G) printf '%dM' $((${1%G} * 1024)) ;;
        0 | *[!0-9] | "") printf %s "$1" ;;
        *) printf '%sM' "$1" ;;
    esac
}

# Sets STAGE_PATH and, below it, the recipe's layout: logs/experiments/<experiment>/<experiment>_<id>/<experiment>/log-….out
find_places() {
    local id=${SLURM_JOB_ID:-} runs
    # without it, the job would silently work in another folder
    if [[ -z ${STAGE_PATH:-} && ,$exported, != *,ALL,* ]]; then
        die "STAGE_PATH did not reach this job: it was submitted with --export=$exported or SBATCH_EXPORT" \
            "submit with --export=ALL, or set stage_path in the site profile"
    fi
    export STAGE_PATH=${STAGE_PATH:-${SLURM_SUBMIT_DIR:-$PWD}}
    if [[ ! -d $STAGE_PATH ]]; then
        die "STAGE_PATH is not a folder: $STAGE_PATH" "create it with mkdir -p, or export STAGE_PATH=<a folder that all nodes share>"
    fi
    if [[ ! -w $STAGE_PATH ]]; then
        die "STAGE_PATH: you cannot write to $STAGE_PATH" "export STAGE_PATH=<a folder of yours that all nodes share>"
    fi
    STAGE_PATH=$(cd "$STAGE_PATH" && pwd)
    share_with_the_group
    if [[ ${1:-} == download ]]; then return; fi
    runs=$STAGE_PATH/logs/experiments/$experiment
    mkdir -p "$runs" 2>/dev/null || die_unwritable "$runs"
    if [[ -z $id ]]; then
        id=$(date +%s)
        until mkdir "$runs/${experiment}_$id" 2>/dev/null; do
            [[ -d $runs/${experiment}_$id ]] || die_unwritable "$runs"
            ((id += 1))
        done
    fi
    run_id=$id
    export FTGEN_RUN_DIR=$runs/${experiment}_$id/$experiment
    code=$FTGEN_RUN_DIR/code
    unpack "$code" || die_unwritable "$code"
}

# A STAGE_PATH that its group may write is a group's. Then what the job makes there must be so too, whatever the user's umask:
# the next job that needs the checkpoint or the folder of logs may be that of another member. Slurm gives the umask to all tasks.
share_with_the_group() {
    local mode group
    read -r mode group < <(stat -Lc '%A %G' "$STAGE_PATH")
    if [[ $mode != ?????w* ]]; then return 0; fi
    umask g=rwx
    if [[ $mode != ??????[sS]* && $group != "$(id -gn)" ]]; then
        tell "warning: what this job makes in $STAGE_PATH does not get the folder's group $group: run chmod g+s $STAGE_PATH"
    fi
}

# die_unwritable PATH: PATH cannot be made, or not be written.
die_unwritable() {
    local folder=$1 owner
    until [[ -d $folder ]]; do folder=$(dirname "$folder"); done
    if [[ -w $folder ]]; then
        die "cannot write to $folder: the disk is full, or your quota is used up" \
            "df -h $STAGE_PATH shows the disk. Free some space, or export STAGE_PATH=<a folder on another disk>"
    fi
    owner=$(stat -Lc %U "$folder")
    die "you cannot write to $folder, which belongs to $(stat -Lc '%U:%G (%A)' "$folder")" \
        "ask $owner to run: find $folder -type d -user $owner -exec chmod g+rwxs {} +. Or export STAGE_PATH=<a folder of yours>"
}

# Sends all further output to the log, whose first line is the plan. On a terminal, the output is also shown.
open_log() {
    local plan kind=log account=${SLURM_JOB_ACCOUNT:-local}
    if [[ $1 == convert ]]; then kind=convert; fi
    account=${account//[^A-Za-z0-9_-]/}
    log=$FTGEN_RUN_DIR/$kind-${account:-none}.${experiment}_${run_id}_${SLURM_RESTART_COUNT:-0}.out
    plan=$(sed -n '/^PLAN = /,/^""")$/{//!p;}' "$code/$name.py" | sed 's/^ *//' | tr -d '\n')
    if ! printf '%s\n' "$plan" 2>/dev/null >"$FTGEN_RUN_DIR/plan.json" || ! printf 'ftgen plan: %s\n' "$plan" 2>/dev/null >>"$log"; then
        die_unwritable "$FTGEN_RUN_DIR"
    fi
    say "log: $log"
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        exec >>"$log" 2>&1
    else
        exec > >(exec tee -i -a "$log") 2>&1
        tee=$!
    fi
    opened=yes
}

finish() {
    # a background child that is killed right after its fork may still have this trap
    if [[ $BASHPID != "$$" ]]; then return 0; fi
    trap '' USR1 TERM INT
    # a job that failed early still submits the rest; a job that was stopped does not
    if [[ -z ${stopping:-} ]] && is_batch_job; then submit_the_rest "$SLURM_JOB_ID"; fi
    end_watch
    if [[ -n ${ender:-} ]]; then kill "$ender" 2>/dev/null || true; fi
    say "exit status $1" || true # the disk may be full
    if [[ -n ${SLURM_JOB_ID:-} && -n ${opened:-} ]]; then report "$1" >&3; fi
    if [[ -n ${tee:-} ]]; then
        exec >/dev/null 2>&1 3>&1
        wait "$tee" || true
    fi
}

# Slurm's own output file is where a user looks first, and the log may be on a full disk: how the job ended is in both.
report() {
    if (($1)); then
        # the errors, or else what was said last
        grep -a -A1 'ftgen: error: ' "$log" | tail -n 6 | grep . || tail -n 6 "$log" || true
        if [[ $(df --output=avail "$STAGE_PATH" | tail -n 1) == *" 0" ]]; then
            say "the disk of $STAGE_PATH is full: the log may not have all lines"
        fi
    fi
    say "exit status $1"
}

# stop CODE REASON: handles a signal. The running command is asked to end, and the job ends with exit code CODE.
stop() {
    if [[ $BASHPID != "$$" ]]; then exit "$1"; fi
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
    begin_watch "$doing" "${children[0]}"
    status=0
    wait_for "${children[0]}" || status=$?
    end_watch
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

# A watch stands beside each step. It prints where the step waits, each time that the log has not grown for FTGEN_QUIET_S
# seconds. It ends nothing.

# begin_watch COMMAND PID: watches a command of the entrypoint. PID is its process, or the srun of its tasks.
begin_watch() {
    watch_step "$@" &
    watcher=$!
    disown # `wait -n` must not wait for it
}

end_watch() {
    if [[ -n ${watcher:-} ]]; then kill "$watcher" 2>/dev/null || true; fi
    watcher=
}

watch_step() {
    local quiet=${FTGEN_QUIET_S:-600} poll begin=$SECONDS since=$SECONDS next size last nap=
    poll=$(((quiet + 19) / 20)) next=$quiet
    trap - EXIT USR1 INT
    trap 'if [[ -n $nap ]]; then kill "$nap" 2>/dev/null; fi; exit 0' TERM
    last=$(log_size)
    while kill -0 "$2" 2>/dev/null; do
        sleep "$poll" >/dev/null 2>&1 3>&1 & # it must not keep the output open
        nap=$!
        wait "$nap" || true
        size=$(log_size)
        if ((size != last)); then
            last=$size since=$SECONDS next=$quiet
        elif ((SECONDS - since >= next)); then
            tell "no output for $((SECONDS - since)) s: waiting for $1, which began $((SECONDS - begin)) s ago ($(seen_from_outside "$2"))"
            print_stack "$1" "$poll"
            # these lines are not progress
            last=$(log_size)
            ((next += quiet))
        fi
    done
}

log_size() { stat -c %s "$log"; }

# The step in Slurm, or the process. A step that Slurm has not begun says so here.
seen_from_outside() {
    local state
    if [[ -n ${step:-} ]]; then
        state=$(squeue --noheader --steps="$SLURM_JOB_ID.$step" --format="on %N for %M" 2>/dev/null) || true
        printf 'step %s %s' "$SLURM_JOB_ID.$step" "${state:-has not begun}"
    else
        printf 'process %s' "$1"
    fi
}

# print_stack COMMAND POLL: asks all ranks for the calls that they are in (runtime/job/watchdog.py), and prints those of rank 0.
print_stack() {
    local folder=$FTGEN_RUN_DIR/stacks try
    mkdir -p "$folder" && rm -f "$folder/$1"_*.txt && date >"$folder/wanted" || return 0
    for ((try = 0; try < 6; try++)); do
        sleep $((1 + $2 / 2)) >/dev/null 2>&1 3>&1
        if [[ -s $folder/$1_0.txt ]]; then
            say "it is in these calls, the innermost first (other ranks: $folder)"
            sed 's/^/    /' "$folder/$1_0.txt"
            return
        fi
    done
    say "it does not say in which call: it has not reached Python yet, or waits outside of it"
}


load_environment() {
    if [[ ! ${FTGEN_QUIET_S:-600} =~ ^[1-9][0-9]*$ ]]; then
        die "FTGEN_QUIET_S must be a number of seconds, found $FTGEN_QUIET_S" "export FTGEN_QUIET_S=600"
    fi
    export NCCL_NVLS_ENABLE=0
    export NVTE_ASYNC_AMAX_REDUCTION=1
    export NVTE_DP_AMAX_REDUCE_INTERVAL=0
    export NVTE_FLASH_ATTN=1
    export NVTE_FUSED_ATTN=1
    export TOKENIZERS_PARALLELISM=False
    export TORCH_NCCL_AVOID_RECORD_STREAMS=1
    export FTGEN_ENVIRONMENT=set # the entrypoint must not expand them again
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

# Finds the user's token file and hub cache as huggingface_hub does, before the site's variables replace the user's. The home of a
# container is another one, so the script sets their paths, and `hub_mounts` mounts them. The token stays in its file: a variable
# would be a part of the job, which Slurm can store (AccountingStoreFlags=job_env).
find_hub() {
    local path home=${HF_HOME:-${XDG_CACHE_HOME:-~/.cache}/huggingface}
    export HF_TOKEN_PATH=${HF_TOKEN_PATH:-$home/token}
    export FTGEN_HUB_CACHE=${HF_HUB_CACHE:-${HUGGINGFACE_HUB_CACHE:-$home/hub}}
    hub_mounts=()
    for path in "$HF_TOKEN_PATH" "$FTGEN_HUB_CACHE"; do
        # a colon and a comma separate mounts; what is below STAGE_PATH is mounted with it
        if [[ -r $path && $path != *[:,]* && $path == /* && $path != "$STAGE_PATH"/* ]]; then hub_mounts+=("$path:$path:ro"); fi
    done
}

# download [SCRIPTS...]: downloads what jobs of this script, and of the others, read from the Hugging Face hub.
download() {
    local script status=0
    code=$(mktemp -d)
    trap 'rm -rf "$code"' EXIT
    trap 'stop 143 "SIGTERM: the same command continues the download"' TERM
    trap 'stop 130 "interrupted: the same command continues the download"' INT
    find_places download
    find_hub
    python=(python3)
    if [[ -n ${FTGEN_PYTHON:-} ]]; then
        python=("$FTGEN_PYTHON")
    elif ! command -v "${python[0]}" >/dev/null; then
        python=(python3) # the site's own is not set up yet, or not seen from here
    fi
    unpack "$code"
    await "${python[@]}" "$code/$name.py" download || status=$?
    for script in "$@"; do bash "$script" --download || status=$?; done
    exit "$status"
}

# Sets `python`, the command of the interpreter, and `srun_flags`, the options that srun needs for it.
find_python() {
    srun_flags=()
    python=(python3)
    if [[ -n ${FTGEN_PYTHON:-} ]]; then python=("$FTGEN_PYTHON"); fi
    if ! command -v "${python[0]}" >/dev/null; then
        die "there is no Python: ${python[0]}" "activate the environment that has NeMo, or export FTGEN_PYTHON=<its interpreter>"
    fi
}

# run_once COMMAND: runs a command of the entrypoint in one task.
run_once() {
    doing=$1
    await "${python[@]}" "$code/$name.py" "$1"
}

# Slurm numbers the steps of a job from 0.
next_step() { step=$((${step:--1} + 1)); }

# run_tasks COMMAND: runs a command of the entrypoint in one task per GPU.
run_tasks() {
    doing=$1
    if [[ -n ${SLURM_JOB_ID:-} ]]; then
        run_step "$1"
        return
    fi
    local rank status=0
    for ((rank = 0; rank < tasks; rank++)); do
        RANK=$rank LOCAL_RANK=$rank NODE_RANK=0 WORLD_SIZE=$tasks "${python[@]}" "$code/$name.py" "$1" &
        children+=($!)
    done
    begin_watch "$doing" "${children[0]}"
    for ((rank = 0; rank < tasks && status == 0; rank++)); do
        # the first task that fails gives the exit code; the other tasks would wait for it for ever
        wait -n || status=$?
    done
    if ((status)); then kill "${children[@]}" 2>/dev/null || true; fi
    for rank in "${children[@]}"; do wait_for "$rank" || true; done
    end_watch
    children=()
    return "${stopping:-$status}"
}

run_step() {
    local before status=0
    place_ranks
    before=$(wc -c <"$log")
    next_step
    await srun --nodes="$nodes" --ntasks="$tasks" --ntasks-per-node="$tasks_per_node" --distribution=block \
        --kill-on-bad-exit=1 --export=ALL --mpi=none "${share_flags[@]}" "${srun_flags[@]}" \
        "${python[@]}" "$code/$name.py" "$1" || status=$?
    if ((status)); then status=$(first_failure "$before" "$status"); fi
    return "$status"
}

# Ranks are in blocks, so that the tensor-parallel ranks of a group share a node. Prints who is where. Each rank compares its
# place with FTGEN_NODES (runtime/job/ranks.py).
place_ranks() {
    local hosts host rank=0 places=()
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    for host in "${hosts[@]}"; do
        places+=("$rank-$((rank + tasks_per_node - 1)) on $host")
        ((rank += tasks_per_node))
    done
    say "ranks $(printf '%s, ' "${places[@]}")as local ranks 0-$((tasks_per_node - 1)) of each node"
    export FTGEN_NODES=${hosts[*]}
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

# unpack FOLDER: writes the entrypoint and the runtime files.
unpack() {
    mkdir -p "$1"/runtime || return
    mkdir -p "$1"/runtime/data || return
    mkdir -p "$1"/runtime/engines || return
    mkdir -p "$1"/runtime/engines/nemo || return
    mkdir -p "$1"/runtime/engines/nemo/optimizations || return
    mkdir -p "$1"/runtime/guard || return
    mkdir -p "$1"/runtime/hub || return
    mkdir -p "$1"/runtime/job || return
    mkdir -p "$1"/runtime/weights || return
    cat >"$1"/runtime/__init__.py <<'END_OF_FTGEN_FILE' || return
"""The code that runs inside the job. It uses the standard library and the framework, but never ftgen.

In: the plan in the job's entrypoint. Out: a checkpoint, data, step lines in the log. Start with `check.py` and
`engines/nemo/train.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/check.py <<'END_OF_FTGEN_FILE' || return
"""Check that a job has all it needs, before it does anything: folders, packages, weights, data, GPUs.

In: a plan and the environment. Out: an exit code, and on stderr one error for each thing that is missing.

The check takes about a second, because it imports no framework: it looks into the files of the packages, and counts the
GPUs of this host by its driver.

Environment: STAGE_PATH, NEMO_HOME, HF_TOKEN, HF_TOKEN_PATH, HF_HOME, HF_HUB_OFFLINE, CUDA_VISIBLE_DEVICES,
SLURM_JOB_CPUS_PER_NODE.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime import download, engines
from runtime.data import jsonl
from runtime.hub import errors, find
from runtime.hub.token import has_token
from runtime.job.errors import JobError
from runtime.job.progress import say
from runtime.weights import checkpoint

Plan = dict[str, Any]
DRIVER = Path("/proc/driver/nvidia/gpus")


def check(plan: Plan) -> int:
    """Exit code 0 if the job can start. Otherwise 1, and on stderr an error and a hint for each thing that is missing."""
    say("packages: " + engines.module(plan, "packages").found())
    problems = [*_stage_path(), *_packages(plan), *_weights(plan), *_data(plan), *_hub(plan), *_gpus(plan)]
    for problem in problems:
        print(f"ftgen: error: {problem}", file=sys.stderr, flush=True)
    if not problems:
        say(f"nothing is missing for {plan['experiment']}")
    _warn_of_few_cpus(plan)
    return 1 if problems else 0


def packages(plan: Plan) -> int:
    """Check only the packages of this Python, which works on a login node too. Exit code 0 if they are right."""
    say("packages: " + engines.module(plan, "packages").found())
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
        yield JobError(f"STAGE_PATH: the folder {path} does not exist on this machine", hint)
    elif not os.access(path, os.W_OK | os.X_OK):
        yield JobError(f"STAGE_PATH: you cannot write to {path}", hint)


def _packages(plan: Plan) -> Iterator[JobError]:
    gpu = plan["gpu"]["name"] != "cpu"
    for what in engines.module(plan, "packages").missing([plan["model"][f"{plan['engine']}_recipe"]], gpu=gpu):
        yield JobError(what, _hint(plan, "gpu" if gpu else "runtime"))


def _hint(plan: Plan, extra: str) -> str:
    """What to do about packages. Nothing can be installed in an image that is read-only."""
    kind = plan["python"]["kind"]
    if kind in {"container", "apptainer", "singularity"}:
        return "set python.image in the site profile to another image: `ftgen list --images` says which fit"
    if kind == "venv":
        return "submit the script of `ftgen setup` again, which installs them"
    if plan["engine"] == "megatron_bridge":
        return f"install Megatron-Bridge for {sys.executable} as `make bridge` does, or set FTGEN_PYTHON to a Python with it"
    return f"install ftgen's extra {extra} for {sys.executable}, or set FTGEN_PYTHON to a Python that has them"


def _weights(plan: Plan) -> Iterator[JobError]:
    asked = plan["checkpoint"]
    if checkpoint.converted(plan):
        return
    if asked["source"] == "directory" and not (folder := checkpoint.user_directory(plan)).is_dir():
        yield JobError(f"checkpoint.path: the folder {folder} does not exist", "give the path of a Hugging Face checkpoint")


def _hub(plan: Plan) -> Iterator[JobError]:
    """What a job cannot get from the hub: it is offline, or there is no token. Whether it answers, the download shows."""
    for repository in download.missing(plan):
        if find.offline_variable():
            yield errors.offline(repository, plan["name"])
        elif repository.kind == "model" and plan["checkpoint"]["gated"] and not has_token():
            yield errors.no_token(repository, plan["name"])


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
            f"the plan needs {plan['gpus_per_node']} GPUs on each node, but this process can use only {count}",
            'set gpu_request in the site profile, or set gpus in the spec; gpu = "cpu" needs no GPU',
        )


def _warn_of_few_cpus(plan: Plan) -> None:
    """A job on a part of a node often gets one CPU for each task, unless it asks for more."""
    found = re.match("[0-9]+", os.environ.get("SLURM_JOB_CPUS_PER_NODE", ""))
    if found and plan["gpu"]["name"] != "cpu" and int(found[0]) < 2 * plan["gpus_per_node"]:
        say(f"warning: {found[0]} CPUs for {plan['gpus_per_node']} GPUs of a node: set cpus_per_gpu in the site profile")


def gpu_count() -> int | None:
    """The number of GPUs that this process may use. None if there is a driver, but nvidia-smi fails."""
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
    cat >"$1"/runtime/data/__init__.py <<'END_OF_FTGEN_FILE' || return
"""Prepare training data: SQuAD, synthetic examples, JSONL; packing.

In: a plan and a tokenizer. Out: folders below $STAGE_PATH/data. Start with `prepare.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/jsonl.py <<'END_OF_FTGEN_FILE' || return
"""Read the user's own examples from a JSONL file, one {"input", "output"} per line.

In: a plan with data.path. Out: training.jsonl and validation.jsonl.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.data.split import split
from runtime.guard.manifest import sha256_of
from runtime.job import variables
from runtime.job.errors import JobError

Plan = dict[str, Any]
SHOWN = 5  # number of faulty lines that an error shows


def identity(plan: Plan) -> dict[str, Any]:
    """What identifies the examples: the hash of the file."""
    return {"sha256": sha256_of(user_file(plan))}


def write(plan: Plan, folder: Path) -> None:
    """Write the examples of the file, split into training and validation."""
    split(read_jsonl(user_file(plan)), plan["seed"], folder)


def user_file(plan: Plan) -> Path:
    """Path of the file; a relative data.path is below STAGE_PATH. JobError: the file cannot be read."""
    path = Path(os.environ.get("STAGE_PATH") or Path.cwd(), variables.path_with_values("data.path", plan["data"]["path"]))
    if not path.is_file() or not os.access(path, os.R_OK):
        raise JobError(
            f"data.path: the file {path} does not exist or cannot be read",
            "give the path of a file that every node can read",
        )
    return path


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """The examples of a file. JobError: the first faulty lines, with their line numbers."""
    found = list(_lines(path))
    if faults := [example for example in found if isinstance(example, str)]:
        more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise JobError("; ".join(faults[:SHOWN]) + more, 'each line is {"input": "...", "output": "..."}')
    examples = [example for example in found if isinstance(example, dict)]
    if len(examples) < 2:
        raise JobError(
            f"{path}: has {len(examples)} examples, but at least 2 are needed", "add one for training, one for validation"
        )
    return examples


def _lines(path: Path) -> Iterator[dict[str, str] | str]:
    """For each line that is not empty: its example, or an error text."""
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
            return f'{where}: "{key}" has no text'
    return {key: document[key] for key in ("input", "output")}
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/packing.py <<'END_OF_FTGEN_FILE' || return
"""Pack examples into sequences of equal length, with NeMo.

In: a folder of examples and a tokenizer. Out: files for NeMo's data module.
"""

import inspect
from pathlib import Path
from typing import Any

from runtime.job.progress import timed


def index(folder: Path) -> None:
    """Write NeMo's line index of each .jsonl file. If trainings wrote it, several jobs could write one file at once."""
    try:
        from nemo.collections.llm.gpt.data.utils import build_index_files
    except ImportError:  # before NeMo 2.2
        from nemo.collections.nlp.data.language_modeling.text_memmap_dataset import build_index_files

    build_index_files([str(path) for path in sorted(folder.glob("*.jsonl"))], newline_int=ord("\n"), workers=1)


def pack(plan: dict[str, Any], examples: Path, tokenizer: Path, staging: Path) -> None:
    """Tokenize and pack training.jsonl and validation.jsonl into sequences of plan["seq_length"] tokens."""
    import numpy as np
    from nemo.collections.common.tokenizers import AutoTokenizer
    from nemo.collections.llm.gpt.data.packed_sequence import prepare_packed_sequence_data

    known = inspect.signature(prepare_packed_sequence_data).parameters
    # NeMo 2.1 writes no metadata, and has no arguments for its dataset before 2.4
    optional = {"output_metadata_path": staging / "metadata.json", "dataset_kwargs": {"pad_to_max_length": True}}
    with timed(f"packing the data into sequences of {plan['seq_length']} tokens"):
        for name in ("training", "validation"):
            np.random.seed(plan["seed"])  # NeMo shuffles with NumPy's global generator, and leaves its own `seed` unused
            prepare_packed_sequence_data(
                input_path=examples / f"{name}.jsonl",
                output_path=staging / f"{name}.npy",
                packed_sequence_size=plan["seq_length"],
                tokenizer=AutoTokenizer(str(tokenizer)),
                max_seq_length=plan["seq_length"],
                seed=plan["seed"],
                **{key: value for key, value in optional.items() if key in known},
            )
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/prepare.py <<'END_OF_FTGEN_FILE' || return
"""Prepare the training data, once for all jobs.

In: a plan and a tokenizer. Out: a folder with training.jsonl and validation.jsonl, one {"input", "output"} per line.
If the plan packs its data, also a folder with these examples, tokenized and packed into sequences of seq_length
tokens.

The guard publishes both folders below $STAGE_PATH/data, so ranks, nodes and jobs that start together prepare them
once. Each kind of data is a file of this package with two functions: `identity(plan)` gives what identifies its
examples, `write(plan, folder)` writes them. A kind that reads the Hugging Face hub has a third: `repositories(plan)`.
"""

import json
import os
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from runtime.data import packing
from runtime.guard import manifest, publish
from runtime.guard.manifest import sha256_of
from runtime.hub.fetch import fetch
from runtime.hub.repository import Repository
from runtime.job.progress import timed

Plan = dict[str, Any]
FORMAT = 1  # version of the examples' format: part of their identity


class Files(NamedTuple):
    """The folders of the data."""

    examples: Path  # training.jsonl, validation.jsonl
    packed: Path | None  # training.npy, validation.npy, metadata.json; of Megatron-Bridge *.idx.parquet


def prepare(plan: Plan, tokenizer: Path, packing: Any = packing) -> Files:
    """Prepare what does not exist yet. `tokenizer` is the folder of a Hugging Face tokenizer. JobError: faulty data.

    `packing` has the functions `index` and `pack` of the engine, as packing.py has NeMo's.
    """
    examples = identity(plan)
    folder = _folder(plan["data"]["kind"], examples)
    publish.ensure(folder, examples, lambda staging: _build(plan, staging, packing))
    if not plan["data"]["packed"]:
        return Files(folder, None)
    packed = {
        "kind": "packed examples",
        "examples": examples,
        "tokenizer": sha256_of(tokenizer / "tokenizer.json"),
        "seq_length": plan["seq_length"],
        "seed": plan["seed"],
    }
    if (ranks := plan["parallelism"]["context_parallel_size"]) > 1:
        packed["context_parallel_size"] = ranks  # examples are padded so that these ranks can share each
    packed_folder = _folder(f"{plan['data']['kind']}-packed-{plan['seq_length']}", packed)
    publish.ensure(packed_folder, packed, lambda staging: packing.pack(plan, folder, tokenizer, staging))
    return Files(folder, packed_folder)


def repositories(plan: Plan) -> list[Repository]:
    """What the examples are made of, on the Hugging Face hub. Nothing, if the examples exist."""
    module = _module(plan["data"]["kind"])
    if not hasattr(module, "repositories"):
        return []
    examples = identity(plan)
    exist = manifest.flaw(_folder(plan["data"]["kind"], examples), examples) is None
    return [] if exist else list(module.repositories(plan))


def download(plan: Plan) -> None:
    """Have in STAGE_PATH what the examples are made of. A job does this in one task, before its ranks prepare the data.

    So not every rank waits for the hub, and no rank needs a hub cache that its node does not see.
    """
    for repository in repositories(plan):
        fetch(repository, plan["name"], into_home=True)


def identity(plan: Plan) -> dict[str, Any]:
    """What identifies the examples: two plans with the same identity use the same folder."""
    kind = plan["data"]["kind"]
    own: dict[str, Any] = _module(kind).identity(plan)
    engine = {} if plan["engine"] == "nemo" else {"engine": plan["engine"]}  # the index of the lines is the engine's
    return {"kind": f"{kind} examples", "format": FORMAT, "seed": plan["seed"]} | engine | own


def _folder(name: str, identity: dict[str, Any]) -> Path:
    short = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return Path(os.environ.get("STAGE_PATH") or Path.cwd(), "data", f"{name}-{short}")


def _build(plan: Plan, staging: Path, packing: Any) -> None:
    kind = plan["data"]["kind"]
    with timed(f"preparing the data: {kind}"):
        _module(kind).write(plan, staging)
        packing.index(staging)


def _module(kind: str) -> Any:
    return import_module(f"runtime.data.{kind}")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/split.py <<'END_OF_FTGEN_FILE' || return
"""Split examples into training and validation.

In: a list of examples. Out: training.jsonl and validation.jsonl.
"""

import json
import random
from pathlib import Path

VALIDATION = 0.05  # fraction of all examples, the same as in NeMo's SQuAD module


def split(examples: list[dict[str, str]], seed: int, folder: Path) -> None:
    """Write both files. Each keeps the order of the examples."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)  # noqa: S311
    count = max(1, round(len(examples) * VALIDATION))
    for name, numbers in (("validation", order[:count]), ("training", order[count:])):
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(examples[number]) + "\n" for number in sorted(numbers))
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/squad.py <<'END_OF_FTGEN_FILE' || return
"""Download SQuAD and split it, with NeMo.

In: a plan. Out: training.jsonl and validation.jsonl.
"""

from pathlib import Path
from typing import Any

from runtime.hub.fetch import fetch
from runtime.hub.repository import Repository

FILES = {"train": "plain_text/train-*.parquet", "validation": "plain_text/validation-*.parquet"}
SQUAD = Repository("rajpurkar/squad", "dataset", "main", tuple(FILES.values()), tuple(FILES.values()))


def identity(_plan: dict[str, Any]) -> dict[str, Any]:
    """Nothing: kind and seed, which prepare.py adds, are enough."""
    return {}


def repositories(_plan: dict[str, Any]) -> list[Repository]:
    """What `write` reads from the hub."""
    return [SQUAD]


def write(plan: dict[str, Any], folder: Path) -> None:
    """Download, unless that is done, and split as NeMo's SQuAD module does. JobError: the download failed."""
    from datasets import load_dataset
    from nemo.collections.llm import SquadDataModule

    source = fetch(SQUAD, plan["name"])
    files = {split: [str(path) for path in sorted(source.glob(pattern))] for split, pattern in FILES.items()}
    examples = load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache"))
    SquadDataModule(dataset_root=folder, seed=plan["seed"])._preprocess_and_split_data(examples)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/synthetic.py <<'END_OF_FTGEN_FILE' || return
"""Generate synthetic examples that are as long as those of SQuAD.

In: a plan with data.examples and a seed. Out: training.jsonl and validation.jsonl.
"""

import random
from pathlib import Path
from typing import Any

from runtime.data import synthetic_text
from runtime.data.split import split


def identity(plan: dict[str, Any]) -> dict[str, Any]:
    """What identifies the examples, beside the seed: their number."""
    return {"examples": plan["data"]["examples"]}


def write(plan: dict[str, Any], folder: Path) -> None:
    """Generate plan["data"]["examples"] examples from the seed."""
    rng = random.Random(plan["seed"])  # noqa: S311
    split([synthetic_text.example(rng) for _ in range(plan["data"]["examples"])], plan["seed"], folder)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/synthetic_text.py <<'END_OF_FTGEN_FILE' || return
"""Generate random text that is as long as that of SQuAD: contexts, questions, answers.

In: a random.Random. Out: words, or an example {"input", "output"}.

Most words are common English words, drawn by Zipf's law, so a real tokenizer makes about as many tokens as from real
text. The other words are invented names, so a tokenizer of any vocabulary size can be trained on the text.
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
NAME_SHARE = 0.06  # fraction of a context's words that are names
CONTEXT_WORDS, CONTEXT_SPREAD = 140, 45  # mean and standard deviation; an example has about 160 words in all
_WEIGHTS = list(accumulate(1 / (rank + 2) for rank in range(len(COMMON))))


def name(rng: random.Random) -> str:
    """An invented name of one to four syllables."""
    syllables = rng.choice((1, 2, 2, 3, 3, 4))
    letters = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) for _ in range(syllables))
    return letters.capitalize()


def words(rng: random.Random, count: int, names: list[str]) -> list[str]:
    """`count` common words, drawn by their frequency; some are replaced by one of `names`."""
    drawn = rng.choices(COMMON, cum_weights=_WEIGHTS, k=count)
    return [rng.choice(names) if rng.random() < NAME_SHARE else word for word in drawn]


def context(rng: random.Random, names: list[str]) -> list[str]:
    """The words of a paragraph, with capitals and full stops for sentences."""
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
    """One example in NeMo's format of SQuAD: the answer is a span of the context."""
    paragraph = context(rng, [name(rng) for _ in range(3)])
    length = rng.choice((1, 1, 2, 2, 3, 4, 6))
    start = rng.randrange(len(paragraph) - length)
    question = f"{rng.choice(QUESTIONS)} {' '.join(words(rng, rng.randint(6, 12), paragraph[start : start + 1]))}?"
    return {
        "input": f"Context: {' '.join(paragraph)} Question: {question} Answer:",
        "output": " ".join(paragraph[start : start + length]).rstrip("."),
    }
END_OF_FTGEN_FILE
    cat >"$1"/runtime/download.py <<'END_OF_FTGEN_FILE' || return
"""Download what a job reads from the Hugging Face hub, before it runs, where there is a network.

In: a plan. Out: folders below $STAGE_PATH/HF_ckpt/downloads, and lines that say what is where.

This needs Python 3.10 and huggingface_hub: no framework, no GPU, no Slurm. What it downloads, all jobs find: they need
neither a token nor a network. What is made of it (a converted checkpoint, examples) counts too: then nothing is missing.
"""

import json
import os
from pathlib import Path
from typing import Any

from runtime.data import prepare
from runtime.guard import manifest
from runtime.hub import find
from runtime.hub.fetch import fetch
from runtime.hub.repository import Repository
from runtime.hub.transfer import GB
from runtime.job.progress import say
from runtime.weights import checkpoint, hub

Plan = dict[str, Any]


def download(plan: Plan) -> int:
    """Download what is missing; exit code 0. JobError: no access, no network, no room."""
    while variable := find.offline_variable():
        say(f"{variable} is set: that holds for jobs, not for a download")
        del os.environ[variable]
    lines = [*_weights(plan), *_data(plan)]
    for line in lines:
        say(line)
    say(f"jobs of {plan['name']}.sh need neither a token nor a network for weights and data")
    return 0


def tell_missing(plan: Plan) -> int:
    """Print a line for each repository that is missing. Exit code 1 if there is one."""
    lacking = missing(plan)
    for repository in lacking:
        print(f"{repository.kind} {repository.name} {repository.revision}: {find.what_is_missing(repository)}", flush=True)
    return 1 if lacking else 0


def missing(plan: Plan) -> list[Repository]:
    """The repositories that a job of the plan would have to download."""
    return [repository for repository in _repositories(plan) if not find.find(repository)]


def _repositories(plan: Plan) -> list[Repository]:
    """What a job of the plan reads from the hub."""
    from_hub = plan["checkpoint"]["source"] == "hub" and not checkpoint.converted(plan)
    return [*([hub.repository(plan)] if from_hub else []), *prepare.repositories(plan)]


def _weights(plan: Plan) -> list[str]:
    kind = plan["checkpoint"]["source"]
    if checkpoint.converted(plan):
        return [f"weights: the converted checkpoint exists: {checkpoint.directory(plan)}"]
    if kind == "random":
        return ["weights: random, the job makes them: nothing to download"]
    if kind == "directory":
        folder = checkpoint.user_directory(plan)
        known = "" if folder.is_dir() else ", which does not exist on this machine"
        return [f"weights: the directory {folder}{known}: nothing to download"]
    return [_fetched("weights", hub.repository(plan), plan)]


def _data(plan: Plan) -> list[str]:
    wanted = prepare.repositories(plan)
    if not wanted:
        return [f"data: {plan['data']['kind']}: nothing to download"]
    return [_fetched("data", repository, plan) for repository in wanted]


def _fetched(what: str, repository: Repository, plan: Plan) -> str:
    """Download one repository. Returns a line with its commit, number of files, size and folder."""
    there = find.find(repository)
    folder = fetch(repository, plan["name"], into_home=True)
    sizes = _sizes(folder)
    how = {True: "was there", False: "copied from your hub cache" if there else "downloaded"}[folder == there]
    commit = find.commit(folder)[:12]
    return f"{what}: {repository} ({commit}): {how}: {len(sizes)} files, {sum(sizes) / GB:.3f} GB in {folder}"


def _sizes(folder: Path) -> list[int]:
    """Sizes of the files that the hub has."""
    file = folder / manifest.NAME
    if file.is_file():
        return [entry["size"] for entry in json.loads(file.read_text())["files"].values()]
    return [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/__init__.py <<'END_OF_FTGEN_FILE' || return
"""The training frameworks, one folder each, with the same file names in each.

In: a plan, weights, data. Out: step lines and checkpoints. Start with `nemo/train.py`.

A plan names its engine, and a script carries only the folder of that engine. What the rest of the runtime uses of it:

    convert.convert(plan)           convert the checkpoint; exit code
    train.train(plan)               train on this rank; exit code
    packages.found()                what is installed, as a text
    packages.missing(models, gpu=)  a sentence for each thing that is missing

What both engines need is in the files beside these folders, and in `runtime/weights` and `runtime/data`.
"""

from importlib import import_module
from typing import Any


def module(plan: dict[str, Any], name: str) -> Any:
    """A module of the plan's engine, such as "convert"."""
    return import_module(f"runtime.engines.{plan['engine']}.{name}")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/adapters.py <<'END_OF_FTGEN_FILE' || return
"""The forward pass of a LoRA adapter, with its scale on the small tensor. Both engines' adapters have the same parts.

In: an adapter. Out: its output.
"""

from typing import Any

import torch


def forward(self: Any, x: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    """Multiply [tokens, rank] by alpha / rank, instead of the adapter's output [tokens, features].

    The result has the same bits if alpha / rank is a power of two. Requires TP = 1 and no dropout.
    """
    x, _ = self.linear_in(x)
    x, _ = self.linear_out(self.activation(x) * (self.alpha / self.dim))
    return x
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/installed.py <<'END_OF_FTGEN_FILE' || return
"""Find the packages that `import` would take, without importing them.

In: sys.path. Out: folders, versions.

It uses no other module of the runtime, because the set-up job contains its text.
"""

import importlib.util
import re
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path


def folder(package: str) -> Path | None:
    """The folder that `import` would take the package from. The package is not imported, but those around it are."""
    try:
        spec = importlib.util.find_spec(package)
    except ImportError:
        return None
    return next((Path(place) for place in spec.submodule_search_locations or ()), None) if spec else None


def release(package: Path) -> str:
    """The version in package_info.py, as NeMo and Megatron-Core have it; "" if there is no such file."""
    info = package / "package_info.py"
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    parts = [re.search(rf"^{key} = ['\"]?(\w*)", text, re.MULTILINE) for key in ("MAJOR", "MINOR", "PATCH", "PRE_RELEASE")]
    number = ".".join(part[1] for part in parts[:3] if part)
    return number + (parts[3][1] if parts[3] else "")


def named(name: str, package: Path) -> str:
    """The name with its version and its folder."""
    return " ".join(filter(None, (name, release(package), "in", str(package))))


def is_there(package: str) -> bool:
    """Whether `import` finds the package."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False


def version(package: str) -> str:
    """The version of a package, by the name that pip knows; "" if it is not installed."""
    try:
        return version_of(package)
    except PackageNotFoundError:
        return ""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/loss_rows.py <<'END_OF_FTGEN_FILE' || return
"""Compute the LM head and the loss only for tokens that have a loss, in Megatron-Core's GPTModel.

In: the loss mask of a batch, while it is on the CPU. Out: a loss that is zero for all other tokens.

The engines differ only in the step that calls `rows_of` and `give`. Nothing waits for the GPU. Each row of logits is the
same sum as before, but a GEMM with another number of rows may add in another order.
"""

from typing import Any

import torch

ROWS = 128  # the number of tokens is rounded up to a multiple, so that few shapes occur


def install() -> None:
    """Make Megatron-Core's GPTModel look for the rows, in this process. Requires TP = PP = CP = 1."""
    from megatron.core.models.gpt import GPTModel

    GPTModel._postprocess = _postprocess_with(GPTModel._postprocess)


def rows_of(loss_mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Flat indices into [batch, sequence] of the tokens with a loss, padded, on the GPU; and their number."""
    rows = loss_mask.flatten().nonzero().flatten()
    height = max(1, -(-len(rows) // ROWS)) * ROWS
    padded = torch.zeros(height, dtype=torch.long, pin_memory=torch.cuda.is_available())
    padded[: len(rows)] = rows
    return padded.cuda(non_blocking=True), len(rows)


def give(model: Any, rows: torch.Tensor, count: int) -> None:
    """Give the rows of the next forward pass to the GPTModel inside of `model`."""
    while hasattr(model, "module"):
        model = model.module
    model.loss_rows, model.loss_count = rows, count


def _postprocess_with(whole: Any) -> Any:
    def postprocess(self: Any, hidden_states: torch.Tensor, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """Loss [batch, sequence], zero for tokens without a loss, from hidden states [sequence, batch, hidden]."""
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
    cat >"$1"/runtime/engines/needs.py <<'END_OF_FTGEN_FILE' || return
"""Find out whether the installed packages have what an optimization uses.

In: names, such as "megatron.core.optimizer:OptimizerConfig.lr". Out: the first one that is not there, as a phrase.

A name is module:object.attribute. An attribute may also be the field of a dataclass or, written object(name), the
parameter of a function or a class. Versions are not looked at: images have versions between two releases.
"""

import inspect
from importlib import import_module
from typing import Any


def missing(*names: str) -> str:
    """What is missing of these names, such as "megatron.core.optimizer has no Muon"; "" if nothing is missing."""
    return next((phrase for name in names if (phrase := _missing(name))), "")


def _missing(name: str) -> str:
    module, _, path = name.partition(":")
    path, _, parameter = path.rstrip(")").partition("(")
    try:
        found: Any = import_module(module)
    except ImportError as error:
        return f"{module} cannot be imported ({error})"
    for attribute in path.split("."):
        if not has(found, attribute):
            return f"{module} has no {path}"
        found = getattr(found, attribute, None)
    if parameter and parameter not in inspect.signature(found).parameters:
        return f"{module}.{path} has no parameter {parameter}"
    return ""


def has(owner: Any, attribute: str) -> bool:
    """Whether an object has the attribute, or a dataclass the field."""
    fields = [key for kind in getattr(owner, "__mro__", ()) for key in vars(kind).get("__annotations__", ())]
    return getattr(owner, attribute, None) is not None or attribute in fields
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/__init__.py <<'END_OF_FTGEN_FILE' || return
"""NeMo 2 with Megatron-Core.

In: a plan. Out: a converted checkpoint (`convert.py`), training (`train.py`). Start with `train.py`, then `recipe.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/compatibility.py <<'END_OF_FTGEN_FILE' || return
"""Make older and newer versions of NeMo and Megatron-Core work together, and with this runtime.

In: the installed packages. Out: stand-ins for what NeMo asks of Megatron-Core and Megatron-Core no longer has.

Each function looks at the package that is installed, not at its version: images have versions between two releases.
"""

import functools
import importlib.util
import inspect
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

# The reader of checkpoints in zarr, which Megatron-Core has up to 0.15. NeMo 2.7 cannot be imported without it. No
# checkpoint of ftgen is in zarr.
ZARR_READER = "megatron.core.dist_checkpointing.strategies.tensorstore"
# Arguments that NeMo passes to get_megatron_optimizer, and their values if nothing is asked for. Megatron-Core 0.16 has
# config_overrides in their place. Without it, it exempts biases and norms from weight decay, as it did before.
NOTHING_ASKED = {"no_weight_decay_cond": None, "scale_lr_cond": None, "lr_mult": 1.0}

# Modules in which NeMo up to 2.4 reads its indices of examples, in a pool of forked processes. The pool ends its processes
# by SIGTERM. They have inherited Lightning's handler, which ignores it, so that the training waits for ever.
INDICES = ("nemo.collections.llm.gpt.data.utils", "nemo.collections.nlp.data.language_modeling.text_memmap_dataset")


def before_imports() -> None:
    """Stand in for modules. Call it before NeMo is imported."""
    if not source(ZARR_READER):
        stand_in(ZARR_READER, TensorStoreLoadShardedStrategy=None)


def after_imports() -> None:
    """Change functions of NeMo and Megatron-Core. Call it once, after NeMo was imported."""
    from megatron.core import optimizer

    known = inspect.signature(optimizer.get_megatron_optimizer).parameters
    if gone := NOTHING_ASKED.keys() - known.keys():
        optimizer.get_megatron_optimizer = _without(gone, optimizer.get_megatron_optimizer)
    for module in filter(None, map(sys.modules.get, INDICES)):
        if not hasattr(module, "safe_map"):  # which has its own way to end its processes
            module.mp = SimpleNamespace(get_context=lambda _method: SimpleNamespace(Pool=ThreadPool))  # type: ignore[attr-defined]


def source(module: str) -> str:
    """The text of a module of megatron.core, without importing it; "" if there is no such module."""
    inner = module.removeprefix("megatron.core.").split(".")
    core = importlib.util.find_spec("megatron.core")
    folders = (core.submodule_search_locations or ()) if core else ()
    files = (Path(folder, *inner).with_suffix(".py") for folder in folders)
    return next((file.read_text(encoding="utf-8") for file in files if file.is_file()), "")


def stand_in(module: str, **names: Any) -> None:
    """Make an object with these names importable as the module, unless it is imported already."""
    instead = ModuleType(module)
    vars(instead).update(names)
    sys.modules.setdefault(module, instead)


def _without(gone: set[str], function: Any) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nothing = {name for name in gone & kwargs.keys() if kwargs[name] == NOTHING_ASKED[name]}
        return function(*args, **{name: value for name, value in kwargs.items() if name not in nothing})

    return call
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/convert.py <<'END_OF_FTGEN_FILE' || return
"""Convert a Hugging Face checkpoint with NeMo's own importer. runtime/weights/checkpoint.py has what both engines share.

In: a plan. Out: $NEMO_HOME/models/<place>/{context,weights}.

If the converted checkpoint exists, this module does not import NeMo.
"""

from pathlib import Path
from typing import Any

from runtime.engines.nemo import imports
from runtime.job.progress import timed
from runtime.weights import checkpoint
from runtime.weights.checkpoint import converted, directory, source, user_directory, verify

__all__ = ["convert", "converted", "directory", "source", "user_directory", "verify"]


def convert(plan: dict[str, Any]) -> int:
    """Convert the checkpoint unless that is done; exit code 0. JobError: no access, network or disk space; wrong shape."""
    return checkpoint.convert(plan, _import)


def _import(weights: Path, staging: Path) -> dict[str, Any]:
    with timed("importing NeMo"):
        imports.defer()
        from runtime.engines.nemo.importer import import_directory
    with timed(f"converting {weights}"):
        layers = import_directory(weights, staging, staging / "tokenizer")
    return {"layers": layers} | checkpoint.versions("nemo_toolkit", "megatron-core", "torch", "transformers")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/cpu.py <<'END_OF_FTGEN_FILE' || return
"""Make NeMo and Megatron-Core run on a machine without a GPU. This is for tests, not for measurements.

In: a process that has not used NeMo yet. Out: `stand_in()` changes torch.cuda for this process; `plain()` gives settings.

`stand_in()` replaces the functions of torch.cuda that NeMo and Megatron-Core always call by functions that do
nothing, and puts tensors for "cuda" on the CPU. `plain()` switches off the fused kernels and selects Megatron's own
layers instead of Transformer Engine's. Both kinds of layers have the same names in a checkpoint, so GPUs can train a
checkpoint that was converted on a CPU.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from runtime.engines import no_gpu, packed_attention

# Names of the norms in Megatron's own layers. Transformer Engine fuses them into the next linear layer.
NORMS = {
    "model.layers.*.input_layernorm.weight": "decoder.layers.*.input_layernorm.weight",
    "model.layers.*.post_attention_layernorm.weight": "decoder.layers.*.pre_mlp_layernorm.weight",
}


def plain() -> dict[str, Any]:
    """Settings of a model's config that need no GPU."""
    from nemo.collections.llm.gpt.model.base import local_layer_spec

    return dict.fromkeys(no_gpu.FUSIONS, False) | {"transformer_layer_spec": local_layer_spec}


def stand_in() -> None:
    """Replace functions of torch.cuda and NeMo for the rest of this process. A second call does nothing."""
    if no_gpu.is_done():
        return
    from nemo.collections.llm.peft import lora
    from nemo.collections.llm.peft import utils as lora_layers
    from nemo.lightning import megatron_init
    from nemo.lightning.io import pl as nemo_checkpoints

    if not getattr(lora, "HAVE_TE", True):  # NeMo 2.1 does not ask
        lora.te = types.SimpleNamespace(Linear=None)  # LoRA tests whether a layer is a te.Linear
        lora_layers.HAVE_TE = False  # NeMo 2.7 sets it to True here though Transformer Engine is not installed
    megatron_init._set_random_seed = no_gpu.with_a_device(megatron_init._set_random_seed)
    nemo_checkpoints._fix_tensors_device = no_gpu.same  # it moves loaded tensors between GPUs
    packed_attention.install()
    no_gpu.stand_in()


@contextlib.contextmanager
def plain_import() -> Iterator[None]:
    """In this block, NeMo's importers of Hugging Face checkpoints build a model with `plain()` and find its norms."""
    from nemo.collections.llm.gpt.model import llama, mistral, qwen2
    from nemo.lightning import io

    with contextlib.ExitStack() as stack:
        for config in (llama.LlamaConfig, llama.Llama31Config, mistral.MistralConfig7B, qwen2.Qwen2Config):
            stack.enter_context(no_gpu.replaced(config, "__init__", _with_defaults(config.__init__, plain())))
        stack.enter_context(no_gpu.replaced(io, "apply_transforms", _with_norms(io.apply_transforms)))
        yield


def _with_defaults(init: Callable[..., None], defaults: dict[str, Any]) -> Callable[..., None]:
    @functools.wraps(init)
    def with_defaults(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **(defaults | kwargs))

    return with_defaults


def _with_norms(apply_transforms: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(apply_transforms)
    def with_norms(source: Any, target: Any, mapping: dict[str, str], *args: Any, **kwargs: Any) -> Any:
        return apply_transforms(source, target, mapping | NORMS, *args, **kwargs)

    return with_norms
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/importer.py <<'END_OF_FTGEN_FILE' || return
"""Run NeMo's own importer of Hugging Face checkpoints, so that it writes only into one directory.

In: a directory in Hugging Face format. Out: a directory in NeMo's format.

This module imports NeMo (15-40 s), so only a conversion imports it.
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
from megatron.core.dist_checkpointing.strategies import base, filesystem_async
from nemo.collections.llm.gpt.model.llama import HFLlamaImporter
from nemo.collections.llm.gpt.model.mistral import HFMistralImporter
from nemo.collections.llm.gpt.model.qwen2 import HFQwen2Importer
from transformers import AutoTokenizer

from runtime.engines.nemo import cpu
from runtime.job.errors import JobError

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None)
# By the `model_type` of a config.json.
IMPORTERS = {"llama": HFLlamaImporter, "mistral": HFMistralImporter, "qwen2": HFQwen2Importer}


class OneDirectory:
    """Changes two things of NeMo's importer: it uses no shared folder in /tmp, and no second process to save."""

    tokenizer_directory: Path

    def save_hf_tokenizer_assets(self, tokenizer_name_or_path: str, save_path: str = "") -> str:
        """Save the tokenizer in our own folder. NeMo copies the folder, with its name, into the checkpoint."""
        target = save_path or str(self.tokenizer_directory)
        # from_pretrained does not run code of the model's repository
        AutoTokenizer.from_pretrained(tokenizer_name_or_path).save_pretrained(target)
        return target

    def nemo_setup(self, model: Any, trainer: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Save in this process. A second process would import everything again, and could outlive this one."""
        return super().nemo_setup(model, trainer, *args, ckpt_async_save=False, **kwargs)  # type: ignore[misc]


class SavesHere:
    """Stands in for Megatron-Core's queue of asynchronous saves. Before 0.15, it forks a process for every save."""

    def schedule_async_request(self, request: Any) -> None:
        """Save and finish."""
        arguments = list(request.async_fn_args)
        if preload := getattr(request, "preload_fn", None):
            arguments[1] = preload()  # the tensors, on the CPU
        if request.async_fn:
            request.async_fn(*arguments, **getattr(request, "async_fn_kwargs", {}))
        torch.distributed.barrier()
        for finish in request.finalize_fns:
            finish()

    def maybe_finalize_async_calls(self, *_args: Any, **_kwargs: Any) -> None:
        """Do nothing: it is done."""


def importer_of(source: Path) -> Any:
    """NeMo's importer for a Hugging Face directory, changed as in `OneDirectory`. JobError: unknown model type."""
    kind = json.loads((source / "config.json").read_text()).get("model_type")
    if kind not in IMPORTERS:
        raise JobError(f"cannot convert a checkpoint of model_type {kind}", f"use one of {', '.join(IMPORTERS)}")
    return type("Importer", (OneDirectory, IMPORTERS[kind]), {})(str(source))


def import_directory(source: Path, output: Path, scratch: Path) -> str:
    """Convert the Hugging Face directory `source` to `output`/{context,weights}. Returns whose layers it was converted with.

    `scratch` is the name of a new directory for the tokenizer, which is removed at the end.
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
    """Make Megatron's forked processes end with this one. Otherwise they would keep our memory and our output open.

    Saving is not asynchronous here, so a plain queue replaces Megatron-Core's, which needs a server process (two
    seconds to start).
    """
    base.async_calls = SavesHere()
    filesystem_async._results_queue = queue.Queue()
    os.register_at_fork(after_in_child=_die_with_the_parent)


def _die_with_the_parent() -> None:
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/imports.py <<'END_OF_FTGEN_FILE' || return
"""Import NeMo faster: packages that a fine-tune does not use are imported only when something uses them.

In: a process that has not imported NeMo. Out: an import hook for the packages in `DEFERRED`.

NeMo and Megatron-Core import many packages that a training never calls: clients of clouds, loggers, quantization. For
a package in `DEFERRED`, `import` gives a stand-in. Each name of a stand-in is a class, which other code can import,
annotate with and derive from. When other code calls it, reads one of its values or iterates over it, the real package
is imported. So a package that is used after all is only imported later. A package that is not installed cannot be
imported, as usual.

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

from runtime.engines.nemo import compatibility

OFF = "FTGEN_IMPORT_ALL"
# Package: who imports it, and what for. Names of these packages must not be compared: a stand-in is equal only to itself.
DEFERRED = {
    "accelerate": "transformers: models on several devices, which Megatron does here",
    "datasets": "NeMo: downloads of data sets, where runtime/data writes the files; with aiohttp",
    "leptonai": "nemo_run: a cloud's client; with fastapi, httpx, trio",
    "modelopt": "NeMo: quantization, pruning and distillation; with transformers' trainer",
    "nemo.collections.llm.modelopt": "NeMo: the same",
    "pandas": "NeMo: a tokenizer of tables",
    "paramiko": "nemo_run: tunnels to other machines; with cryptography",
    "pytorch_lightning": "NeMo: a reranker; a second copy of `lightning`",
    "scipy": "torchmetrics, transformers: metrics of audio, the loss of object detection",
    "sklearn": "transformers: a metric of assisted decoding",
    "torch.utils.tensorboard": "Megatron-Core: a logger; with tensorboard",
    "wandb": "Megatron-Core: a logger",
}
# Functions of NeMo's modelopt that every training calls, and that do nothing here: no checkpoint of ftgen has a state
# of modelopt, and no model is distilled.
NOTHING_TO_DO = {
    "nemo.collections.llm.modelopt.set_modelopt_spec_if_exists_in_ckpt",
    "nemo.collections.llm.modelopt.model_utils.restore_modelopt_state",
    "nemo.collections.llm.modelopt.model_utils.save_modelopt_state",
    "nemo.collections.llm.modelopt.distill.utils.get_tensor_shapes_adjust_fn_for_distillation",
}
# Megatron-Core's memory for inference. In 0.15, its import compiles a CUDA extension and initializes CUDA, in every
# process, to set has_unified_memory. 0.14 has no such module, and in 0.16 its import does neither.
MANAGED_MEMORY = "megatron.core.inference.unified_memory"


def defer() -> None:
    """Defer the packages in `DEFERRED` from now on. A package that is already imported stays as it is."""
    compatibility.before_imports()
    if os.environ.get(OFF, "0") in {"", "0"} and not any(isinstance(finder, Deferring) for finder in sys.meta_path):
        sys.meta_path.insert(0, Deferring(DEFERRED))
        if "has_unified_memory" in compatibility.source(MANAGED_MEMORY):
            compatibility.stand_in(MANAGED_MEMORY, has_unified_memory=False, create_unified_mempool=None)


class Deferring(MetaPathFinder, Loader):
    """Import hook: gives stand-ins for modules of packages that are installed and not used yet."""

    def __init__(self, packages: Iterable[str]) -> None:
        self.waiting = {package for package in packages if package not in sys.modules}
        self.written: list[tuple[str, str, Any]] = []  # assignments to names of stand-ins: module, name, value
        self.lock = threading.Lock()

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The real module's spec, with this object as the loader."""
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
        """Create the stand-in."""
        return StandIn(spec.name, self, str(spec.loader_state))

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: executing the real module is what takes time."""

    def real(self, package: str, module: str, key: str) -> Any:
        """The real object behind `key` ("a" or "a.b") of the module. The real package replaces the stand-in."""
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
    """Like getattr. Also finds a sub-module that was imported as a stand-in, but not yet for real."""
    if isinstance(owner, ModuleType) and not hasattr(owner, key):
        with contextlib.suppress(ModuleNotFoundError):
            return importlib.import_module(f"{owner.__name__}.{key}")
    return getattr(owner, key)


def _is_in(package: str, name: str) -> bool:
    return name == package or name.startswith(f"{package}.")


class StandIn(ModuleType):
    """Stands in for a module. It has every name."""

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
            if key not in {"__version__", "__all__"}:  # inspect and warnings read other special names of every module
                raise AttributeError(f"module {self.__name__!r} has no attribute {key!r}")
        return finder.real(package, self.__name__, key)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing, as the real function does here."""


def _is_special(key: str) -> bool:
    return key.startswith("__") and key.endswith("__")


def _name(finder: Deferring, package: str, module: str, key: str) -> type:
    return Name(key.rpartition(".")[2], (), {"__module__": module, "_stands_for": (finder, package, module, key)})


class Name(type):
    """Metaclass of the classes that stand in for names of a deferred package, and of classes derived from them."""

    def _real(cls) -> Any:
        if "_stands_for" not in cls.__dict__:
            base = next(base for base in cls.__mro__ if "_stands_for" in base.__dict__)
            raise RuntimeError(
                f"{cls.__module__}.{cls.__name__} cannot be used: it is derived from {base.__module__}.{base.__name__}, "
                f"which ftgen does not import for a fine-tune. export {OFF}=1 imports it"
            )
        finder, package, module, key = cls.__dict__["_stands_for"]
        return finder.real(package, module, key)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Call the real object. RuntimeError: this class is derived from a stand-in."""
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
    cat >"$1"/runtime/engines/nemo/optimizations/__init__.py <<'END_OF_FTGEN_FILE' || return
"""Optimizations that make a step faster than the stock recipe, one file each.

In: a recipe and a plan. Out: the recipe, changed. Start with `switch.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/cuda_graphs.py <<'END_OF_FTGEN_FILE' || return
"""Run each layer as a local CUDA graph of Megatron-Core, and correct two errors of these graphs in FP8.

In: a recipe. Out: the recipe with graphs on, and Megatron-Core changed for this process.

1. Transposed weights. Transformer Engine keeps a transposed copy of each FP8 weight for the backward pass. The
forward pass renews the copy if the optimizer has marked it as old. The copy was fresh during the capture, so the
captured forward pass does not renew it: every replay would use the transposes of the first step, and the gradients
would be wrong. Here the old copies are renewed in place before the graph of a layer is replayed.

2. Scales of a fused MLP. Before Megatron-Core captures a layer, it runs the layer on whatever its buffers contain,
and then restores the amax history and the scales of Transformer Engine. It misses those of a fused MLP, which is not
a submodule. Here they are restored too.
"""

import functools
import os
from collections.abc import Iterator
from typing import Any

from runtime.engines.nemo.optimizations import needs


def missing(recipe: Any, plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing. In FP8, also what the corrections change."""
    fp8 = (
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Tensor._create_transpose",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Tensor._transpose_invalid",
        "transformer_engine.pytorch.ops.op:BasicOperation._save_fp8_metas",
        "transformer_engine.pytorch.ops.op:BasicOperation._load_fp8_metas",
    )
    return needs.missing_in_config(recipe, "cuda_graph_impl") or needs.missing(
        "megatron.core.transformer.cuda_graphs:_CudaGraphRunner.replay_graph_capture",
        "megatron.core.transformer.cuda_graphs:_CudaGraphRunner.create_fwd_graph",
        "nemo.lightning:MegatronStrategy(use_te_rng_tracker)",
        "nemo.collections.llm.gpt.data.packed_sequence:PackedSequenceSpecs.pad_cu_seqlens",
        *(fp8 if plan["precision"] == "fp8" else ()),
    )


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch local graphs on."""
    if "expandable_segments" in os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""):
        os.environ.pop("PYTORCH_CUDA_ALLOC_CONF")  # Megatron-Core allows no graphs with it
    recipe.model.config.cuda_graph_impl = "local"
    recipe.trainer.strategy.use_te_rng_tracker = True
    recipe.data.packed_sequence_specs.pad_cu_seqlens = True
    correct_fp8()


def correct_fp8() -> None:
    """Correct both errors. Call it once, before the model is built."""
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
    """The FP8 weights of the module that have a transposed copy."""
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
    """The operations of a layer's fused MLP, which Megatron-Core keeps in the tuple `_fused_impl`."""
    for module in layer.modules():
        for fused in getattr(module, "_fused_impl", None) or ():
            yield from (operation for operation in fused.modules() if hasattr(operation, "_save_fp8_metas"))
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/fused_cross_entropy.py <<'END_OF_FTGEN_FILE' || return
"""Use Transformer Engine's fused cross entropy.

In: a recipe. Out: the recipe with another loss in its model's config.
"""

from typing import Any

from runtime.engines.nemo.optimizations import needs


def missing(recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing_in_config(recipe, "cross_entropy_fusion_impl") or needs.missing(
        "megatron.core.extensions.transformer_engine:te_parallel_cross_entropy"
    )


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch the fused loss on. It is correct only with micro_batch_size = 1 (Transformer Engine 2.9)."""
    recipe.model.config.cross_entropy_loss_fusion = True
    recipe.model.config.cross_entropy_fusion_impl = "te"
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/fused_swiglu.py <<'END_OF_FTGEN_FILE' || return
"""Use Transformer Engine's fused SwiGLU, which in FP8 includes the cast.

In: a recipe. Out: the recipe with the op fuser on for the MLP.
"""

from typing import Any

from runtime.engines.nemo.optimizations import op_fuser


def missing(recipe: Any, plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return op_fuser.missing(recipe, plan)


def apply(recipe: Any, plan: dict[str, Any]) -> None:
    """Switch the op fuser on for the MLP. Adapters are not fused, unless the plan also has op_fuser on."""
    recipe.model.config.use_transformer_engine_op_fuser = True
    if not plan["optimizations"]["op_fuser"]:
        from nemo.collections.llm.peft import lora

        lora.HAVE_TE_FUSED_LORA = False  # otherwise the setting would also fuse the adapters, which rounds their input
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/fused_wgrad_accumulation.py <<'END_OF_FTGEN_FILE' || return
"""Accumulate weight gradients in the GEMM that computes them, without APEX.

In: a recipe. Out: the recipe with the fusion on.

runtime/engines/wgrad.py stands in for APEX's extension, without which Megatron-Core and NeMo do not use the fusion.
"""

from typing import Any

from runtime.engines import wgrad
from runtime.engines.nemo.optimizations import needs


def missing(recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing_in_config(recipe, "gradient_accumulation_fusion") or needs.missing(
        "megatron.core.tensor_parallel.layers:_grad_accum_fusion_available"
    )


def before_imports() -> None:
    """Stand in for APEX's extension."""
    wgrad.stand_in_for_apex()


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch the fusion on."""
    recipe.model.config.gradient_accumulation_fusion = True
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/loss_tokens_only.py <<'END_OF_FTGEN_FILE' || return
"""Compute the LM head and the loss only for tokens that have a loss.

In: a recipe. Out: the recipe, with steps that pick those tokens.

In a fine-tune, only the tokens of the answers have a loss. For every other token, the stock recipe computes the LM
head and the cross entropy and multiplies the result by zero. Here the loss mask is read while the batch is still on
the CPU. runtime/engines/loss_rows.py has the rest.
"""

from collections.abc import Iterator
from typing import Any

import torch

from runtime.engines import loss_rows
from runtime.engines.nemo.optimizations import needs


def missing(recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing_in_config(recipe, "data_step_fn", "forward_step_fn") or needs.missing(
        "megatron.core.models.gpt:GPTModel._postprocess(labels)",
        "megatron.core.models.gpt:GPTModel.compute_language_model_loss",
        "megatron.core.models.gpt:GPTModel.shared_embedding_or_output_weight",
        "nemo.collections.llm.gpt.model.base:gpt_data_step",
        "nemo.collections.llm.gpt.model.base:gpt_forward_step",
    )


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Make the recipe's steps pick the tokens with a loss."""
    install(recipe.model.config)


def install(config: Any) -> None:
    """Make the steps of a GPTConfig pick the tokens with a loss. Requires TP = PP = CP = 1."""
    config.data_step_fn = data_step
    config.forward_step_fn = forward_step
    loss_rows.install()


def data_step(dataloader_iter: Iterator[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """NeMo's data step. Adds `loss_rows` [n] to the batch: flat indices into [batch, sequence], padded; and `loss_count`."""
    from nemo.collections.llm.gpt.model.base import gpt_data_step

    batch = next(dataloader_iter)
    rows, count = loss_rows.rows_of((batch[0] if isinstance(batch, tuple) else batch)["loss_mask"])
    step: dict[str, Any] = gpt_data_step(iter([batch]), *args, **kwargs)
    return step | {"loss_rows": rows, "loss_count": count}


def forward_step(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """NeMo's forward step, after giving the model the rows with a loss."""
    from nemo.collections.llm.gpt.model.base import gpt_forward_step

    loss_rows.give(model, batch["loss_rows"], batch["loss_count"])
    return gpt_forward_step(model, batch)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/merge_micro_batches.py <<'END_OF_FTGEN_FILE' || return
"""Run all packs of a step as one micro-batch.

In: a recipe with packed data. Out: the recipe, with a data module that gives a step's whole batch and a data step
that merges it.

The stock recipe runs one micro-batch after the other, each with one pack. Here the batch of a step, [packs, length],
is reshaped to [1, packs * length]. The boundaries of the examples (cu_seqlens) are kept, so attention stays inside
each example. The gradient equals the stock gradient, which averages the mean losses of the packs: the loss of each
token gets a weight to that end. The logged loss is the mean over all tokens, as before.
"""

import inspect
from typing import Any, get_args

import torch

from runtime.engines.nemo.optimizations import needs
from runtime.engines.nemo.optimizations.packs import ChangedStep, cu_seqlens, ends_of


def missing(recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    lacking = needs.missing_in_config(recipe, "data_step_fn") or needs.missing(
        "nemo.collections.llm.gpt.data.fine_tuning:FineTuningDataModule.validate_batch_size_for_packed_sequence",
        "nemo.lightning.megatron_parallel:MaskedTokenLossReduction.forward",
    )
    if lacking:
        return lacking
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

    returned = get_args(inspect.signature(MaskedTokenLossReduction.forward).return_annotation)
    return "" if len(returned) == 3 else "NeMo's loss does not come with its number of tokens"


def apply(recipe: Any, plan: dict[str, Any]) -> None:
    """Merge the micro-batches of a step. Requires packed data and CP = PP = 1."""
    packs = plan["global_batch_size"] // plan["parallelism"]["data_parallel_size"]
    install(recipe.data, recipe.model.config, packs)


def install(data: Any, config: Any, packs: int) -> None:
    """Make NeMo's data module give `packs` packs at a time, and the data step of a GPTConfig merge them."""
    from nemo.collections.llm.gpt.data.fine_tuning import FineTuningDataModule
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

    FineTuningDataModule.validate_batch_size_for_packed_sequence = lambda _self: None  # NeMo allows one pack only
    data.micro_batch_size = packs
    config.data_step_fn = ChangedStep(config.data_step_fn, merge)
    MaskedTokenLossReduction.forward = _weighted(MaskedTokenLossReduction.forward)


def merge(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch [packs, length] of NeMo's packed dataset, reshaped to [1, packs * length], and with `loss_weights`."""
    _, length = batch["tokens"].shape
    rows = ends_of(batch)
    ends = sorted({0} | {pack * length + end for pack, row in enumerate(rows) for end in row})
    count = sum(len(row) - 1 for row in rows) + 1  # the same for every batch if NeMo pads cu_seqlens
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
    """Weights [packs, length], float32, which make the mean of all tokens' losses the mean of the packs' mean losses."""
    tokens = loss_mask.sum(dim=1, keepdim=True, dtype=torch.float32)
    return (tokens.sum() / (len(loss_mask) * tokens.clamp(min=1))).expand(loss_mask.shape)


def _weighted(stock: Any) -> Any:
    def forward(self: Any, batch: dict[str, Any], loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """NeMo's reduction, with a weighted sum of the losses for the gradient. The logged loss is not weighted."""
        total, tokens, logged = stock(self, batch, loss)
        if batch.get("loss_weights") is not None:
            total = (loss.float() * batch["loss_mask"] * batch["loss_weights"]).sum()
        return total, tokens, logged

    return forward
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/needs.py <<'END_OF_FTGEN_FILE' || return
"""Find out whether the installed packages and the recipe have what an optimization uses. See runtime/engines/needs.py.

In: names. Out: the first one that is not there, as a phrase.
"""

from typing import Any

from runtime.engines.needs import has, missing

__all__ = ["missing", "missing_in_config"]


def missing_in_config(recipe: Any, *fields: str) -> str:
    """What is missing of these fields in the config of the recipe's model, which differs from model to model."""
    config = recipe.model.config.__fn_or_cls__
    lacking = [field for field in fields if not has(config, field)]
    return f"NeMo's {config.__name__} has no {lacking[0]}" if lacking else ""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/op_fuser.py <<'END_OF_FTGEN_FILE' || return
"""Use Transformer Engine's op fuser for the MLP and the LoRA adapters. It rounds differently.

In: a recipe. Out: the recipe with the op fuser on.
"""

from typing import Any

from runtime.engines.nemo.optimizations import needs


def missing(recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing_in_config(recipe, "use_transformer_engine_op_fuser") or needs.missing(
        "megatron.core.extensions.transformer_engine:TEFusedMLP._make_fused_impl"
    )


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch the op fuser on."""
    recipe.model.config.use_transformer_engine_op_fuser = True
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/packs.py <<'END_OF_FTGEN_FILE' || return
"""Change batches in a data step, and find the boundaries of packed sequences, for several optimizations.

In: NeMo's data step and its batches on the CPU. Out: a data step and batches that are changed.
"""

from collections.abc import Iterator
from typing import Any

import torch


class ChangedStep:
    """A data step that changes each batch on the CPU and then calls the step that it replaces."""

    def __init__(self, step: Any, change: Any) -> None:
        self.step, self.change = step, change

    def __call__(self, dataloader_iter: Iterator[Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The result of the replaced step for the changed batch; `loss_weights` is kept if the change adds it."""
        batch = next(dataloader_iter)
        changed = self.change(batch[0] if isinstance(batch, tuple) else batch)
        step: dict[str, Any] = self.step(iter([changed]), *args, **kwargs)
        if "loss_weights" in changed and step.get("loss_weights") is None:  # NeMo's step drops unknown keys
            step["loss_weights"] = changed["loss_weights"].cuda(non_blocking=True)
        return step


def ends_of(batch: dict[str, Any]) -> list[list[int]]:
    """The boundaries of the sequences in each row, starting with 0, without the -1 that pads NeMo's cu_seqlens."""
    lengths = batch["cu_seqlens_argmin"].flatten().tolist()
    return [row[:length] for row, length in zip(batch["cu_seqlens"].tolist(), lengths, strict=True)]


def cu_seqlens(ends: list[int]) -> dict[str, torch.Tensor]:
    """The boundaries of one row, as the tensors that NeMo's forward step reads."""
    return {
        "cu_seqlens": torch.tensor([[*ends, -1]], dtype=torch.int32),
        "cu_seqlens_argmin": torch.tensor([[len(ends)]]),
    }
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/scale_small_tensor.py <<'END_OF_FTGEN_FILE' || return
"""Apply LoRA's scale to the small tensor between the adapter's two matrices.

In: a recipe, which stays as it is. Out: NeMo's adapter class, changed for this process.
"""

from typing import Any

from runtime.engines import adapters
from runtime.engines.nemo.optimizations import needs


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing("nemo.collections.llm.peft.utils:ParallelLinearAdapter.forward")


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Scale the small tensor in this process. Requires TP = 1 and no dropout."""
    from nemo.collections.llm.peft.utils import ParallelLinearAdapter

    ParallelLinearAdapter.forward = adapters.forward
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/short_padding.py <<'END_OF_FTGEN_FILE' || return
"""Cut the padding of each pack into several short sequences.

In: a recipe with packed data. Out: the recipe, with a data step that cuts the padding.

For attention and rotary embedding, the padding at the end of a pack is one more sequence. In a pack with few
examples, it is much longer than any example. With padded cu_seqlens, the kernels then treat every sequence as if it
were that long. This optimization cuts the padding into sequences that are no longer than the longest example.
"""

from pathlib import Path
from typing import Any

import torch

from runtime.engines import padding
from runtime.engines.nemo.optimizations import needs
from runtime.engines.nemo.optimizations.packs import ChangedStep, cu_seqlens, ends_of


def missing(recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing_in_config(recipe, "data_step_fn") or needs.missing(
        "nemo.collections.llm.gpt.data.packed_sequence:PackedSequenceSpecs.packed_metadata_path"
    )


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Make the recipe's data step cut the padding. Requires packed data and CP = 1."""
    install(recipe.data, recipe.model.config)


def install(data: Any, config: Any) -> None:
    """Change the data step of a GPTConfig. The packs' metadata has the length of the longest example."""
    limit = padding.longest_sequence(Path(data.packed_sequence_specs.packed_metadata_path))
    config.data_step_fn = ChangedStep(config.data_step_fn, lambda batch: cut_padding(batch, limit))


def cut_padding(batch: dict[str, Any], longest: int) -> dict[str, Any]:
    """The batch (one row) with sequences cut to at most `longest` tokens. No example is longer: only padding is cut.

    cu_seqlens [1, n] always gets as many entries as the longest possible padding needs, because CUDA graphs need a
    fixed shape.
    """
    cut = padding.cut(ends_of(batch)[0], longest)
    return batch | cu_seqlens(cut) | {"max_seqlen": torch.tensor([[longest]], dtype=torch.int32)}
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/skip_nan_check.py <<'END_OF_FTGEN_FILE' || return
"""Do not check the gradients of each step for NaN.

In: a recipe. Out: the recipe with other data-parallel settings.
"""

from typing import Any

from runtime.engines.nemo.optimizations import needs
from runtime.engines.nemo.recipe import ddp


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing("megatron.core.distributed:DistributedDataParallelConfig.check_for_nan_in_grad")


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Switch the check off."""
    recipe.trainer.strategy.ddp = ddp(recipe, check_for_nan_in_grad=False)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/skip_shard_transposes.py <<'END_OF_FTGEN_FILE' || return
"""Do not transpose the shards of FP8 weights after the optimizer's step.

In: a recipe, which stays as it is. Out: Transformer Engine, changed for this process.

With a distributed optimizer, each rank casts its shard of every weight to FP8, as a matrix with one row. Transformer
Engine also writes a transpose of that row, which takes far longer than the cast. Nothing reads that transpose: once
all shards are gathered, Transformer Engine transposes the whole weight.
"""

from typing import Any

from runtime.engines.nemo.optimizations import needs


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "transformer_engine.pytorch.tensor.utils:_cast_master_weights_to_fp8_delayed_scaling",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Tensor._get_quantizer",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Quantizer.set_usage(columnwise)",
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Leave out the transposes in this process."""
    skip_transposes()


def skip_transposes() -> None:
    """Leave out the transposes of shards. Call it once, before the optimizer is built. The weights keep the same bits."""
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
    cat >"$1"/runtime/engines/nemo/optimizations/switch.py <<'END_OF_FTGEN_FILE' || return
"""Switch on the optimizations that the plan selects, in NeMo's recipe. See runtime/engines/switching.py.

In: a recipe and a plan. Out: the recipe, changed.
"""

from typing import Any

from runtime.engines import switching

Plan = dict[str, Any]
BEFORE_IMPORTS = ("fused_wgrad_accumulation",)  # Megatron-Core decides about these while it is imported


def before_imports(plan: Plan) -> None:
    """Prepare those optimizations that need it before NeMo and Megatron-Core are imported."""
    for name in BEFORE_IMPORTS:
        if plan["optimizations"][name]:
            switching.module(str(__package__), name).before_imports()


def unavailable(recipe: Any, plan: Plan) -> dict[str, str]:
    """Those optimizations of the plan that the installed packages cannot do, and what they lack."""
    return switching.unavailable(str(__package__), recipe, plan)


def apply(recipe: Any, plan: Plan, off: dict[str, str]) -> None:
    """Apply every optimization of the plan, except those that are `unavailable`."""
    switching.apply(str(__package__), recipe, plan, off)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/packages.py <<'END_OF_FTGEN_FILE' || return
"""Find out whether the installed packages can convert and train, without importing them.

In: sys.path. Out: what is found, and a sentence for each thing that is missing.

`import nemo` takes half a minute. This module finds the packages that `import` would take, and reads their files: so
sources that come first on sys.path count, and versions of packages do not. NeMo and Megatron-Core fit together if
Megatron-Core has every name that NeMo imports from it. It uses no other module of the runtime but installed.py, because the
set-up job contains the text of both.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from runtime.engines.installed import folder, is_there, named, version

# Packages, by the names that pip knows.
OTHERS = {
    "torch": "torch",
    "lightning": "lightning",
    "transformers": "transformers",
    "huggingface_hub": "huggingface_hub",
    "nemo_run": "nemo_run",
    "fiddle": "fiddle",
}
ON_A_GPU = {"transformer_engine": "transformer-engine"}
IMPORTERS = ("collections/llm", "lightning")  # folders of NeMo that a training imports
IMPORT = re.compile(r"^from (megatron\.core[\w.]*) import (?:\(([^)]*)\)|([^\n(]*))", re.MULTILINE)
NAME = re.compile(r"(\w+)(?: as \w+)?\s*(?:,|$)", re.MULTILINE)
COMMENT = re.compile(r"#.*")


def found() -> str:
    """What is there, such as "NeMo 2.7.3 in /opt/NeMo/nemo, PyTorch 2.9.0"."""
    places = (("NeMo", folder("nemo")), ("Megatron-Core", folder("megatron.core")))
    there = [named(name, place) for name, place in places if place]
    others = (("Transformer Engine", version("transformer-engine")), ("PyTorch", version("torch")))
    return ", ".join(there + [f"{name} {number}" for name, number in others if number]) or "no NeMo and no PyTorch"


def missing(recipes: list[str], *, gpu: bool) -> Iterator[str]:
    """A sentence for each thing that is missing. `recipes`: modules in nemo.collections.llm.recipes."""
    for package, name in (OTHERS | (ON_A_GPU if gpu else {})).items():
        if not is_there(package):
            yield f"the package {name} is not installed"
    nemo, core = folder("nemo"), folder("megatron.core")
    for place, name in ((nemo, "nemo_toolkit"), (core, "megatron-core")):
        if not place:
            yield f"the package {name} is not installed" + (", only Megatron-Bridge" if is_there("megatron.bridge") else "")
    if nemo:
        yield from _missing_in_nemo(nemo, recipes)
    if nemo and core:
        yield from _missing_in_megatron(nemo, core)


def _missing_in_nemo(nemo: Path, recipes: list[str]) -> Iterator[str]:
    library = nemo / "collections" / "llm"
    if not library.is_dir():
        yield f"{named('NeMo', nemo)} has no nemo.collections.llm; versions 2.1 to 2.7 have it"
        return
    for recipe in recipes:
        if not (library / "recipes" / f"{recipe}.py").is_file():
            yield f"{named('NeMo', nemo)} has no recipe {recipe}, which this model needs"


def _missing_in_megatron(nemo: Path, core: Path) -> Iterator[str]:
    lacking = dict.fromkeys(name for name in _imported(nemo) if not _has(core, *name))
    if lacking:
        names = ", ".join(f"{module}.{name}" for module, name in list(lacking)[:3]) + (", ..." if len(lacking) > 3 else "")
        yield f"{named('NeMo', nemo)} does not fit {named('Megatron-Core', core)}, which lacks {names}"


def _imported(nemo: Path) -> Iterator[tuple[str, str]]:
    """Module and name of what NeMo imports from Megatron-Core, except inside of `try` and of functions."""
    for place in IMPORTERS:
        for file in sorted((nemo / place).rglob("*.py")):
            for module, several, few in IMPORT.findall(file.read_text(encoding="utf-8", errors="replace")):
                yield from ((module, name) for name in NAME.findall(COMMENT.sub("", several or few)))


def _has(core: Path, module: str, name: str) -> bool:
    place = core.joinpath(*module.split(".")[2:])
    if (place / f"{name}.py").is_file() or (place / name).is_dir():
        return True
    file = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
    return file.is_file() and bool(re.search(rf"\b{name}\b", file.read_text(encoding="utf-8", errors="replace")))
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/profiling.py <<'END_OF_FTGEN_FILE' || return
"""Profile steps of a NeMo training, with a Lightning callback.

In: a recipe and a plan. Out: the recipe with the callback.

This module imports Lightning, so only a training imports it.
"""

from typing import Any

import nemo_run as run
from lightning.pytorch.callbacks import Callback

from runtime.job import profile
from runtime.job.profiler import Profiler

Plan = dict[str, Any]


def add(recipe: Any, plan: Plan) -> None:
    """Add the callback, if the plan profiles this rank."""
    if profile.wanted(plan):
        callback = run.Config(ProfileSteps, *profile.arguments(plan))
        recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), callback]


class ProfileSteps(Callback):  # type: ignore[misc]
    """Tells the profiler which step begins and ends."""

    def __init__(self, tool: str, first_step: int, last_step: int, file: str) -> None:
        self.profiler = Profiler(tool, first_step, last_step, file)

    def on_train_batch_start(self, trainer: Any, *_args: Any) -> None:
        """Before a step."""
        self.profiler.before_step(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_args: Any) -> None:
        """After a step, which Lightning has already counted."""
        self.profiler.after_step(trainer.global_step - 1)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/recipe.py <<'END_OF_FTGEN_FILE' || return
"""Build NeMo's own fine-tuning recipe, with the numbers of the plan.

In: a plan, a checkpoint, data. Out: a recipe, as a `run.Partial`.

This module imports NeMo (15-40 s), so only a training imports it.
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
from nemo.collections.llm.gpt.data.fine_tuning import FineTuningDataModule
from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_with_fp8_mixed
from nemo.lightning import _strategy_lib

from runtime.data.prepare import Files
from runtime.job.progress import say

Plan = dict[str, Any]
ARCHITECTURE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


def build(plan: Plan, checkpoint: Path, files: Files, log_directory: Path) -> Any:
    """The recipe; `fiddle.build(recipe)()` trains. It writes only into `log_directory`."""
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
    # NeMo has no setting for the seed of adapters and dropout: it is only a default argument of this function.
    _strategy_lib.init_parallel_ranks = functools.partial(_strategy_lib.init_parallel_ranks, seed=plan["seed"])
    return recipe


def stock(plan: Plan, log_directory: Path) -> Any:
    """NeMo's own recipe of the model. It gets those of our arguments that it has; they differ between models."""
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
    accepted = inspect.signature(library.finetune_recipe).parameters
    vars(library)["default_finetune_recipe"] = _with_a_list_of_callbacks(library.default_finetune_recipe)
    return library.finetune_recipe(**{key: value for key, value in arguments.items() if key in accepted})


def _with_a_list_of_callbacks(default: Any) -> Any:
    """NeMo 2.1 appends to the callbacks of its default recipe, which has none."""

    @functools.wraps(default)
    def with_a_list(*args: Any, **kwargs: Any) -> Any:
        recipe = default(*args, **kwargs)
        recipe.trainer.callbacks = recipe.trainer.callbacks or []
        return recipe

    return with_a_list


def set_model(recipe: Any, plan: Plan) -> None:
    """Set the plan's architecture in the recipe's model."""
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
    # some of NeMo's recipes count embedding and loss as pipeline layers; the plan counts only transformer layers
    for key in ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"):
        if hasattr(config, key):  # since NeMo 2.2
            setattr(config, key, False)


def _set_scheme(recipe: Any, plan: Plan) -> None:
    if plan["scheme"] == "lora":
        recipe.peft.dim = plan["lora"]["rank"]
        recipe.peft.alpha = plan["lora"]["alpha"]
        recipe.peft.dropout = plan["lora"]["dropout"]
        recipe.peft.target_modules = plan["lora"]["targets"]


def _set_optimizer(recipe: Any, plan: Plan) -> None:
    recipe.optim.config.lr = plan["optimizer"]["learning_rate"]
    # the scheduler requires fewer warmup steps than steps
    warmup = min(plan["optimizer"]["warmup_steps"], plan["max_steps"] - 1)
    if warmup != plan["optimizer"]["warmup_steps"]:
        say(f"warmup is shortened to {warmup} steps, because max_steps = {plan['max_steps']}")
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
        # A rank whose part of the sequence has no answer tokens has no loss. NeMo then requires these two settings.
        recipe.model.config.calculate_per_token_loss = True
        strategy.ddp = ddp(recipe, average_in_collective=False)


def ddp(recipe: Any, **changes: Any) -> Any:
    """The recipe's data-parallel settings with changes. In some recipes they are only the name of a strategy."""
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
    # The recipe's data module is SquadDataModule. It downloads nothing if training.jsonl exists. In NeMo 2.1, it takes no
    # folder; the class that it derives from does.
    if not hasattr(recipe.data, "dataset_root"):
        recipe.data = run.Config(FineTuningDataModule, **recipe.data.__arguments__)
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
        )
        if (files.packed / "metadata.json").is_file():  # since NeMo 2.2
            recipe.data.packed_sequence_specs.packed_metadata_path = str(files.packed / "metadata.json")


def _set_trainer(recipe: Any, plan: Plan) -> None:
    trainer = recipe.trainer
    trainer.max_steps = plan["max_steps"]
    trainer.limit_val_batches = 0
    trainer.val_check_interval = None
    trainer.enable_checkpointing = False
    trainer.logger = False
    # Slurm and torchrun set different variables. The entrypoint always sets those of torchrun.
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
    optimizer.clip_grad = 0.0  # its kernel needs CUDA
    recipe.data.num_workers = 0
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/train.py <<'END_OF_FTGEN_FILE' || return
"""Train: one process per rank.

In: a plan, and the rank of this process in the environment. Out: NeMo's own step lines on stdout.

Environment: RANK, LOCAL_RANK, WORLD_SIZE, NODE_RANK, MASTER_ADDR, MASTER_PORT (defaults for a single process: 0, 0,
1, 0, this machine, a free port); FTGEN_RUN_DIR, where NeMo writes (default $STAGE_PATH/logs).
"""

import os
from typing import Any

from runtime.data.prepare import prepare
from runtime.engines.nemo import compatibility, convert, imports
from runtime.engines.nemo.optimizations import switch
from runtime.job import environment, profile, ranks
from runtime.job.errors import JobError
from runtime.job.places import run_directory
from runtime.job.progress import say, timed
from runtime.weights import read_ahead

Plan = dict[str, Any]


def train(plan: Plan) -> int:
    """Train plan["max_steps"] steps; exit code 0. JobError: no checkpoint, no GPU, a wrong WORLD_SIZE, faulty data."""
    ranks.set_defaults(plan)
    profile.enter(plan)
    weights = convert.directory(plan)
    if not convert.converted(plan):
        raise JobError(f"there is no converted checkpoint in {weights}", "run the command convert first")
    read_ahead.begin(weights / "weights")
    with timed("importing NeMo"):
        _set_variables(plan)
        switch.before_imports(plan)
        imports.defer()
        import fiddle
        import torch

        from runtime.engines.nemo import profiling, recipe

        compatibility.after_imports()
    if plan["gpu"]["name"] == "cpu":
        from runtime.engines.nemo import cpu

        cpu.stand_in()
    elif not torch.cuda.is_available():
        raise JobError("PyTorch finds no GPU in this process", 'see nvidia-smi; gpu = "cpu" in the spec needs no GPU')
    off = switch.unavailable(recipe.stock(plan, run_directory()), plan)
    environment.tell(plan, off)
    files = prepare(plan, weights / "context" / "nemo_tokenizer")
    recipe_of_run = recipe.build(plan, weights, files, run_directory())
    switch.apply(recipe_of_run, plan, off)
    profiling.add(recipe_of_run, plan)
    training = fiddle.build(recipe_of_run)
    say(f"training: {plan['experiment']}, {plan['max_steps']} steps")
    training()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def _set_variables(plan: Plan) -> None:
    """Set the variables that NeMo and Lightning read when they are imported or built."""
    os.environ["PL_GLOBAL_SEED"] = str(plan["seed"])
    if plan["gpu"]["name"] != "cpu":
        os.environ.setdefault("NEMO_LOG_MEMORY_USAGE", "1")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/no_gpu.py <<'END_OF_FTGEN_FILE' || return
"""Stand in for torch.cuda on a machine without a GPU. This is for tests, not for measurements.

In: a process that has not used Megatron-Core yet. Out: torch.cuda is changed for this process.

The functions of torch.cuda that Megatron-Core always calls do nothing here, and tensors for "cuda" are on the CPU. Each
engine's cpu.py adds what its framework needs.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Settings of a model's config that need fused kernels.
FUSIONS = (
    "apply_rope_fusion",
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
)


def is_done() -> bool:
    """Whether there is nothing to stand in for: there is a GPU, or `stand_in` was called before."""
    return torch.cuda.is_available() or torch.cuda.Stream is _Idle


def stand_in() -> None:
    """Replace functions of torch.cuda for the rest of this process. Call it once."""
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron requires it, also without a GPU
    for name, value in _stand_ins().items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = torch.cuda.get_rng_state
    torch.cuda.random.set_rng_state = torch.cuda.set_rng_state
    torch.Tensor.cuda = same
    torch.nn.Module.cuda = same
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._set_cuda_rng_state = torch.cuda.set_rng_state
    megatron_random._get_cuda_rng_state = torch.cuda.get_rng_state
    # CPU and GPU share one random generator here. Megatron would warn each time that the CPU's state changes.
    logging.getLogger(megatron_random.__name__).setLevel(logging.ERROR)
    _OnTheCpu().__enter__()  # never exited


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """In this block, the attribute has another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def with_a_device(set_random_seed: Callable[[int], None]) -> Callable[[int], None]:
    """A function that seeds the generator of the weights only if there is a GPU, as if there were one."""

    def with_a_device(seed: int) -> None:
        with replaced(torch.cuda, "device_count", lambda: 1):
            set_random_seed(seed)

    return with_a_device


class _Idle:
    """Stands in for a CUDA stream or event: every method does nothing."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return nothing


class _OnTheCpu(TorchFunctionMode):  # type: ignore[misc]
    """Creates tensors for "cuda" on the CPU, and leaves tensors on the CPU that are moved to "cuda"."""

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
        "manual_seed": nothing,
        "set_device": nothing,
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        "stream": lambda _stream: contextlib.nullcontext(),
        "synchronize": nothing,
        "_lazy_call": nothing,
        "_lazy_init": nothing,
    }


def nothing(*_args: Any, **_kwargs: Any) -> None:
    """Do nothing."""


def decorates_nothing(function: Any) -> Any:
    """The function itself, as a decorator."""
    return function


def same(self: Any, *_args: Any, **_kwargs: Any) -> Any:
    """The object itself."""
    return self


def _is_cuda(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/packed_attention.py <<'END_OF_FTGEN_FILE' || return
"""Let Megatron-Core's own attention take packed sequences, on a CPU. Its kernel for them needs a GPU.

In: Megatron-Core. Out: its DotProductAttention, changed for this process.
"""

from itertools import pairwise
from typing import Any

import torch


def install() -> None:
    """Compute the attention of each packed sequence by itself."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    stock = DotProductAttention.forward

    def forward(
        self: Any, query: Any, key: Any, value: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Any:
        """Attention of query [tokens, heads, size] or [tokens, 1, heads, size]; Megatron-Core's own if nothing is packed."""
        if packed_seq_params is None:
            return stock(self, query, key, value, *args, **kwargs)
        ends = packed_seq_params.cu_seqlens_q.flatten().tolist()
        return attention(query, key, value, ends, self.softmax_scale)

    DotProductAttention.forward = forward


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: list[int], scale: float) -> torch.Tensor:
    """Causal attention within each sequence: [tokens, heads * size], or [tokens, 1, heads * size] if query has a batch."""
    has_batch = query.dim() == 4
    q, k, v = ((each.squeeze(1) if has_batch else each).transpose(0, 1) for each in (query, key, value))
    groups = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
    attend = torch.nn.functional.scaled_dot_product_attention
    parts = [attend(q[:, b:e], k[:, b:e], v[:, b:e], is_causal=True, scale=scale) for b, e in pairwise(ends) if e > b]
    whole = torch.cat(parts, 1).transpose(0, 1).flatten(1)
    return whole.unsqueeze(1) if has_batch else whole
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/padding.py <<'END_OF_FTGEN_FILE' || return
"""Cut the padding of a pack into several short sequences.

In: the boundaries of a pack's sequences. Out: boundaries with more of them.

For attention and rotary embedding, the padding at the end of a pack is one more sequence. In a pack with few examples, it is
much longer than any example. The engines differ in the tensors that have the boundaries.
"""

import json
from itertools import pairwise
from pathlib import Path

MULTIPLE = 64  # tokens in a tile of the attention kernel; the longest sequence is rounded up to a multiple


def longest_sequence(metadata: Path) -> int:
    """The length of the longest example in the packs' metadata, rounded up."""
    longest = max(split["dataset_max_seqlen"] for split in json.loads(metadata.read_text()))
    return -(-int(longest) // MULTIPLE) * MULTIPLE


def cut(ends: list[int], longest: int) -> list[int]:
    """The boundaries with no sequence longer than `longest` tokens. No example is longer: only padding is cut.

    There are always as many as the longest possible padding needs, because CUDA graphs need a fixed shape.
    """
    short = [0]
    for begin, end in pairwise(ends):
        short += [*range(begin + longest, end, longest), end]
    count = len(ends) + ends[-1] // longest
    return short + [ends[-1]] * (count - len(short))
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/switching.py <<'END_OF_FTGEN_FILE' || return
"""Switch on the optimizations that the plan selects.

In: an engine's package of optimizations, a recipe and a plan. Out: the recipe, changed.

Each optimization is a file of the package with two functions: `missing(recipe, plan)` says what the installed packages
lack for it, `apply(recipe, plan)` switches it on. If it is off, the stock recipe stays as it is. The catalogue's
optimizations.toml describes the measured effect and the numerics of each.
"""

from importlib import import_module
from typing import Any

from runtime.job.progress import say

Plan = dict[str, Any]


def unavailable(package: str, recipe: Any, plan: Plan) -> dict[str, str]:
    """Those optimizations of the plan that the installed packages cannot do, and what they lack."""
    lacking = {name: module(package, name).missing(recipe, plan) for name in _selected(plan)}
    return {name: phrase for name, phrase in lacking.items() if phrase}


def apply(package: str, recipe: Any, plan: Plan, off: dict[str, str]) -> None:
    """Apply every optimization of the plan, except those that are `unavailable`."""
    on = [name for name in _selected(plan) if name not in off]
    say(f"optimizations: {', '.join(on) or 'none, the stock recipe'}")
    for name, lacking in off.items():
        say(f"warning: the optimization {name} is off: {lacking}")
    for name in on:
        module(package, name).apply(recipe, plan)


def module(package: str, name: str) -> Any:
    """The module of an optimization."""
    return import_module(f"{package}.{name}")


def _selected(plan: Plan) -> list[str]:
    return [name for name, is_on in plan["optimizations"].items() if is_on]
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/wgrad.py <<'END_OF_FTGEN_FILE' || return
"""Stand in for APEX's extension that accumulates weight gradients in the GEMM that computes them.

In: a process that has not imported Megatron-Core. Out: `fused_weight_gradient_mlp_cuda` can be imported.

Megatron-Core, NeMo and Megatron-Bridge use the fusion only if they can import the extension. With the stand-in, the GEMMs
of Transformer Engine accumulate into main_grad, and the two functions below do the same for Megatron's LM head.
"""

import sys

import torch

EXTENSION = "fused_weight_gradient_mlp_cuda"


def stand_in_for_apex() -> None:
    """Make this module importable as the extension, before Megatron-Core looks for it."""
    sys.modules.setdefault(EXTENSION, sys.modules[__name__])


def is_stand_in() -> bool:
    """Whether this module stands in for the extension."""
    return sys.modules.get(EXTENSION) is sys.modules[__name__]


def wgrad_gemm_accum_fp16(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] += grad_outputᵀ [out, n] @ inputs [n, in]; all have the same 16-bit type."""
    main_grad.addmm_(grad_output.t(), inputs)


def wgrad_gemm_accum_fp32(inputs: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] (float32) += grad_outputᵀ [out, n] @ inputs [n, in]."""
    main_grad.add_(grad_output.t() @ inputs)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/guard/__init__.py <<'END_OF_FTGEN_FILE' || return
"""Build a folder once, however many jobs and ranks need it, and publish it only when it is complete.

In: a path, what identifies its content, and a function that builds it. Out: the folder. Start with `publish.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/guard/claim.py <<'END_OF_FTGEN_FILE' || return
"""Decide which of many processes builds a folder, by numbered claims on a shared file system.

In: a directory of claims. Out: a `Claim`, the right to build, for one process at a time.

Claim n is the directory `<claims>/<n>`. The claim with the highest number is the current one. A process takes over
from n by `mkdir n+1`, which succeeds for exactly one process of all machines. (File locks are no alternative: on many
cluster file systems they succeed for every process.) A claim is never deleted, so a number never has two owners. A
claim contains

    owner.json   its owner: user, host, boot, pid namespace, pid and its start time, Slurm job and restart
    heartbeat    a counter that the owner increases every few seconds
    released     exists once the owner has finished or failed

An owner counts as dead in three cases: it ran on this machine and its process has ended; Slurm says that its job has
ended; its heartbeat has not changed for FTGEN_STALE_S. The waiting process measures that time with its own clock and
never compares a time that another machine wrote, because clocks differ between machines. Taking over from an owner
that was only suspended does no harm: when it wakes, its number is no longer the highest (`is_current`), and it
publishes nothing.

Environment: FTGEN_STALE_S, seconds without a heartbeat after which an owner counts as dead (60); FTGEN_HOST, the name
of this machine (for tests); SLURM_JOB_ID, SLURM_RESTART_COUNT.
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

from runtime.job.sharing import user_name

STALE_S = 60.0
BEATS_PER_STALE = 12  # heartbeats that an owner must miss to count as dead
SLURM_EVERY_S = 20.0  # between two calls of squeue
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"}
ENDED |= {"OUT_OF_MEMORY", "PREEMPTED", "TIMEOUT"}


def stale_s() -> float:
    """Seconds without a heartbeat after which an owner counts as dead."""
    return float(os.environ.get("FTGEN_STALE_S") or STALE_S)


class Claim:
    """A claim that this process owns. A thread writes the heartbeat until `release`."""

    def __init__(self, claims: Path, generation: int) -> None:
        """Write the owner into the claim directory, which this process has just made, and start the heartbeat."""
        self.claims, self.generation = claims, generation
        self.directory = claims / str(generation)
        self._pid = os.getpid()
        self._stop = threading.Event()
        _write(self.directory / "owner.json", json.dumps(this_process()))
        self._beat(0)
        threading.Thread(target=self._beat_until_released, daemon=True).start()

    def is_current(self) -> bool:
        """Whether no other process has taken over."""
        return highest(self.claims) == self.generation

    def release(self) -> None:
        """Let the next process take over at once. In a forked child this does nothing: the parent still owns the claim."""
        if os.getpid() == self._pid and not self._stop.is_set():
            self._stop.set()
            _write(self.directory / "released", "")

    def _beat_until_released(self) -> None:
        # The main thread handles signals: a signal delivered to this thread would not interrupt a long call of the
        # main thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        count = 0
        while not self._stop.wait(stale_s() / BEATS_PER_STALE):
            count += 1
            self._beat(count)

    def _beat(self, count: int) -> None:
        # Overwritten in place with the same length, so that the heartbeat goes on when the disk is full.
        _write(self.directory / "heartbeat", f"{count:012d}\n", in_place=count > 0)


class Watch:
    """The current claim, as a waiting process sees it."""

    def __init__(self, claims: Path) -> None:
        """Nothing is read yet."""
        self.claims = claims
        self._seen: tuple[int, str] = (0, "")
        self._since = 0.0
        self._asked_slurm = float("-inf")

    def claim(self) -> Claim | None:
        """The next claim, if the current one is free and no other process was faster. Otherwise None: try again later."""
        current = highest(self.claims)
        if current and not self._is_free(current):
            return None
        try:
            (self.claims / str(current + 1)).mkdir()
        except FileExistsError:
            return None
        return Claim(self.claims, current + 1)

    def holder(self) -> str:
        """The owner of the current claim, as text for the log."""
        owner = self._owner(highest(self.claims))
        if not owner:
            return "an unknown process"
        job = f", Slurm job {owner['slurm_job']}" if owner.get("slurm_job") else ""
        return f"process {owner.get('pid')} on {owner.get('host')}{job}, user {owner.get('user', 'unknown')},"

    def _is_free(self, current: int) -> bool:
        if (self.claims / str(current) / "released").exists():
            return True
        owner = self._owner(current)
        return _process_is_gone(owner) or self._slurm_job_is_over(owner) or self._heartbeat_has_stopped(current)

    def _owner(self, current: int) -> dict[str, Any]:
        try:
            owner = json.loads((self.claims / str(current) / "owner.json").read_text())
        except (OSError, ValueError):
            return {}  # the owner has not written it yet, or died before: the heartbeat decides
        return owner if isinstance(owner, dict) else {}

    def _heartbeat_has_stopped(self, current: int) -> bool:
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
            # the owner may be an earlier run of this job, before Slurm requeued it
            return bool(owner.get("slurm_restart") != here["slurm_restart"])
        return _slurm_state(job) in ENDED


def highest(claims: Path) -> int:
    """The number of the current claim, 0 before the first."""
    return max((int(path.name) for path in claims.iterdir() if path.name.isdigit()), default=0)


def this_process() -> dict[str, Any]:
    """What identifies this process among all processes of all machines."""
    return {
        "user": user_name(),
        "host": os.environ.get("FTGEN_HOST") or socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "pid_namespace": _pid_namespace(),  # a pid in a container is not the same process outside
        "pid": os.getpid(),
        "start": _process(os.getpid())[1],
        "slurm_job": os.environ.get("SLURM_JOB_ID", ""),
        "slurm_restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _process_is_gone(owner: dict[str, Any]) -> bool:
    """Whether the owner ran on this machine and has ended. False if it ran elsewhere."""
    here = this_process()
    if not owner.get("start") or any(owner.get(key) != here[key] for key in ("host", "boot", "pid_namespace")):
        return False
    state, start = _process(int(owner["pid"]))
    return start != owner["start"] or state in {"Z", "X"}


def _process(pid: int) -> tuple[str, str]:
    """State and start time (clock ticks since boot) of a process; two empty strings if it does not exist."""
    # the name of a process can contain any character, also ")"
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")


def _slurm_state(job: str) -> str:
    try:
        command = ["squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""  # an unknown job may belong to another cluster


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
        pass  # the file system is full or gone: other processes rely on the heartbeat
END_OF_FTGEN_FILE
    cat >"$1"/runtime/guard/manifest.py <<'END_OF_FTGEN_FILE' || return
"""Write and check the manifest of a published directory.

In: a directory and the source that it must have. Out: manifest.json in the directory, or the first flaw as text.

manifest.json contains {"format", "source", "origin", "files": {path: {"size": bytes, "mtime": seconds, "sha256":
hex}}}. `source` is what the plan asked for, and is compared. `origin` is what the build found (a commit, versions),
and is not compared.

Size and hash of every file must be those of the manifest. A large file is hashed only if its modification time has
changed, as it does when a directory is copied; times are compared in whole seconds, because some file systems store
no more. `thorough` hashes every file. Files that the manifest does not name are ignored, because frameworks write
caches beside their data.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

FORMAT = 1
NAME = "manifest.json"
SMALL = 1 << 20  # bytes; on a shared file system, reading a smaller file takes about as long as asking for its size

Source = dict[str, Any]


def write(directory: Path, source: Source, origin: Source) -> None:
    """Write the manifest of a finished directory, and sync all its files to the disk."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL
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
    """The first thing that is wrong with a published directory, or None. Never raises, whatever the directory contains."""
    try:
        document = json.loads((directory / NAME).read_text())
        if document["format"] != FORMAT or not document["files"]:
            return f"{NAME} has another format"
        if difference := _difference(document["source"], json.loads(json.dumps(source))):
            return difference
        with ThreadPoolExecutor(4) as pool:
            flaws = pool.map(lambda item: _file_flaw(directory / item[0], item[1], thorough), document["files"].items())
        return next((found for found in flaws if found), None)
    except FileNotFoundError:
        return f"it has no {NAME}" if directory.exists() else "it does not exist"
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
            return f"it was built with {key} = {found.get(key)!r}, not {wanted.get(key)!r}"
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
        return f"{path.name} has changed since it was built"
    return None
END_OF_FTGEN_FILE
    cat >"$1"/runtime/guard/publish.py <<'END_OF_FTGEN_FILE' || return
"""Build a directory once, however many jobs and ranks need it, and publish it only when it is complete.

In: its path (`place`), its source, and a function that builds it. Out: the path of the finished directory.

    ensure(place, source, build)

`build(staging)` fills a staging directory beside `place`. The staging directory gets a manifest and is renamed to
`place`, so a directory at `place` is always complete. It is used only if its manifest has the same source and its
files are unchanged; otherwise it is renamed, never deleted. One process builds (see claim.py). The others wait and
use the result. If the builder dies, the next process starts again.

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
from runtime.job import sharing
from runtime.job.errors import JobError, causes
from runtime.job.progress import say

REMIND_S = 60.0  # between two progress lines of a waiting process
POLL_S = 2.0  # longest time between two looks at the claim
FULL = {errno.ENOSPC, errno.EDQUOT}
DENIED = {errno.EACCES, errno.EPERM}
GIB = 1 << 30

Build = Callable[[Path], dict[str, Any] | None]


def ensure(place: Path, source: Source, build: Build, *, need_bytes: int | Callable[[], int] = 0) -> Path:
    """The directory `place`; `build` makes it unless it already exists. Before, `need_bytes` must be free on the disk.

    `build` may return its origin, which the manifest records but nothing compares. JobError: the directory cannot be
    written, or the disk is full. SIGTERM while building: SystemExit(143).
    """
    if manifest.flaw(place, source) is None:
        return place
    claims = place.parent / f".{place.name}.claims"
    _make_directory(claims)
    while claim := _next_claim(place, source, claims):
        with _held(claim):
            if manifest.flaw(place, source) is None or _make(place, source, build, need_bytes, claim):
                break
        say(f"another process took over while this one was building {place}: waiting for it")
    return place


def require_space(directory: Path, need_bytes: int, what: str) -> None:
    """JobError unless `need_bytes` are free on the file system. A quota is not seen here; writing fails later."""
    free = shutil.disk_usage(directory).free
    if free < need_bytes:
        raise JobError(
            f"{what} needs {need_bytes / GIB:.1f} GiB in {directory}, but only {free / GIB:.1f} GiB are free",
            "free some space there, or set STAGE_PATH to a directory on a larger file system",
        )


def staging_of(place: Path, generation: int) -> Path:
    """The staging directory of claim number `generation`."""
    return place.parent / f".{place.name}.staging-{generation}"


def _next_claim(place: Path, source: Source, claims: Path) -> Claim | None:
    """Wait for the claim to build. None if another process has built the directory meanwhile."""
    watch, begin = Watch(claims), time.monotonic()
    said: float | None = None
    while True:
        if claim := watch.claim():
            return claim
        now = time.monotonic()
        if said is None or now - said > REMIND_S:
            say(f"waiting for {place}: {watch.holder()} is building it ({now - begin:.0f} s so far)")
            said = now
        time.sleep(min(POLL_S, 0.05 + (now - begin) / 10))
        if (place / manifest.NAME).exists() and manifest.flaw(place, source) is None:
            return None


def _make(place: Path, source: Source, build: Build, need_bytes: int | Callable[[], int], claim: Claim) -> bool:
    """Build and publish. False if another process took over meanwhile."""
    _sweep(place, claim)
    staging = staging_of(place, claim.generation)
    try:
        with _plain_disk_errors(place.parent):
            set_aside(place, source)
            if need := need_bytes() if callable(need_bytes) else need_bytes:
                require_space(place.parent, need, place.name)
            staging.mkdir()
            origin = build(staging)
            manifest.write(staging, source, {"user": sharing.user_name()} | (origin or {}))
            sharing.share_tree(staging)
            return _publish(staging, place, source, claim)
    except Exception:
        if claim.is_current():
            raise
        return False  # the process that took over has removed our staging directory, and builds the same
    finally:
        _remove(staging)


def _publish(staging: Path, place: Path, source: Source, claim: Claim) -> bool:
    while claim.is_current():
        try:
            staging.rename(place)  # fails if `place` exists
        except OSError as error:
            if error.errno not in {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}:
                raise
            if manifest.flaw(place, source) is None:
                return True  # an owner that counted as dead woke up and was faster
            set_aside(place, source)
        else:
            manifest.sync(place.parent)
            return True
    return False


def set_aside(place: Path, source: Source, *, thorough: bool = False) -> None:
    """If the directory at `place` has a flaw, rename it and print why. `thorough` reads every byte."""
    flaw = manifest.flaw(place, source, thorough=thorough)
    if flaw is None or not os.path.lexists(place):
        return
    aside = place.with_name(f"{place.name}.untrusted-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    place.rename(aside)
    if manifest.flaw(aside, source, thorough=thorough) is None:  # another process published a good one meanwhile
        aside.rename(place)
        return
    say(f"{place} is not used: {flaw}. It was moved to {aside}, which you can delete", any_rank=True)


def _sweep(place: Path, claim: Claim) -> None:
    """Remove the staging directories of dead owners."""
    for staging in place.parent.glob(f".{place.name}.staging-*"):
        number = staging.name.rpartition("-")[2]
        if number.isdigit() and int(number) < claim.generation:
            _remove(staging)
    for trash in place.parent.glob(f".{place.name}.trash-*"):
        shutil.rmtree(trash, ignore_errors=True)


def _remove(staging: Path) -> None:
    """Rename, then remove: an owner that wakes up meanwhile must not publish a half-removed directory."""
    trash = staging.with_name(f"{staging.name.replace('.staging-', '.trash-')}-{os.getpid()}")
    try:
        staging.rename(trash)
    except OSError:
        return
    shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def _held(claim: Claim) -> Iterator[None]:
    """Release the claim at the end of the block, also after an exception or SIGTERM."""
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
            os._exit(143)  # a forked child must not clean up
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm may send several; they must not interrupt the clean-up
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
        raise _cannot_create(directory, error) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise _cannot_create(directory / "1", PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def _cannot_create(path: Path, error: OSError) -> JobError:
    """The error for a path that this user cannot make or change. It names whose folder that is."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    what, hint = f"cannot create {path}: {error.strerror}", "set STAGE_PATH to a directory that you can write to"
    owner = sharing.owner_of(folder)
    if error.errno in DENIED and owner != sharing.user_name():
        what += f": {folder} belongs to {owner}"
        hint = f"ask {owner} to run: find {folder} -type d -user {owner} -exec chmod g+rwxs {{}} +. Or {hint}"
    return JobError(what, hint)


@contextmanager
def _plain_disk_errors(directory: Path) -> Iterator[None]:
    """Turn an error for a full disk, or for a folder of another user, into a JobError, however deep it was raised."""
    try:
        yield
    except Exception as error:
        failed = [cause for cause in causes(error) if isinstance(cause, OSError)]
        if any(cause.errno in FULL for cause in failed):
            raise JobError(
                f"the disk of {directory} is full, or your quota is used up",
                "free some space there, or set STAGE_PATH to a directory on a larger file system",
            ) from error
        denied = [cause for cause in failed if cause.errno in DENIED and str(cause.filename).startswith(str(directory))]
        if denied:
            raise _cannot_create(Path(denied[0].filename), denied[0]) from error
        raise
END_OF_FTGEN_FILE
    cat >"$1"/runtime/hub/__init__.py <<'END_OF_FTGEN_FILE' || return
"""Repositories of the Hugging Face hub: find them on this machine, or download them once for all jobs.

In: a `Repository`. Out: a folder with its files. Start with `fetch.py`; `find.py` uses neither a network nor a package.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/hub/errors.py <<'END_OF_FTGEN_FILE' || return
"""Turn the errors of huggingface_hub into one line and a hint.

In: an exception of huggingface_hub, of whatever version, requests or httpx below it. Out: a `JobError`.

The text of such an exception can have a URL with a signature, or words of a server that repeats what it was sent. So no
text of an exception is passed on: only its type, the status, and the name of the host.

Environment: HF_ENDPOINT, HTTPS_PROXY and so on, for the texts.
"""

import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from runtime.guard.publish import FULL
from runtime.hub import find
from runtime.hub.repository import Repository
from runtime.hub.token import has_token, token_file
from runtime.job.errors import JobError, causes

TOKENS = "https://huggingface.co/settings/tokens"
AGAIN = "try again: the download continues where it stopped"
# Words in the names of exceptions that requests, urllib3, httpx and the standard library raise if a connection fails.
NETWORK = ("Connect", "Timeout", "Proxy", "SSL", "Protocol", "Network", "Transport", "ChunkedEncoding", "gaierror")


class UnreachableError(JobError):
    """The hub cannot be reached from this machine."""


def command(script: str) -> str:
    """The command that downloads what the script's jobs need."""
    return f"where there is a network: bash {script}.sh --download"


@contextmanager
def plain_errors(repository: Repository, script: str) -> Iterator[None]:
    """Turn what huggingface_hub raises in the block into a JobError. A full disk stays an OSError, for the guard."""
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        if any(isinstance(cause, OSError) and cause.errno in FULL for cause in causes(error)):
            raise
        raise explain(error, repository, script) from error


def explain(error: Exception, repository: Repository, script: str) -> JobError:
    """What the exception means for the user."""
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    page = f"https://huggingface.co/{'datasets/' if repository.kind == 'dataset' else ''}{repository.name}"
    if isinstance(error, GatedRepoError):
        return _gated(repository, status, page)
    if isinstance(error, RevisionNotFoundError):
        return JobError(f"{repository.name} has no revision {repository.revision!r}", f"see {page}/tree/main")
    if isinstance(error, RepositoryNotFoundError):
        return _unknown(repository, status, page)
    if status:
        return _refused(repository, status)
    if any(word in kind.__name__ for cause in causes(error) for kind in type(cause).__mro__ for word in NETWORK):
        return UnreachableError(f"{repository} cannot be downloaded: {_reason(error)}", command(script))
    return JobError(f"{repository}: the download failed with {type(error).__name__}", AGAIN)


def offline(repository: Repository, script: str) -> JobError:
    """The error for a repository that is not on this machine, where a variable forbids the hub."""
    what = f"{find.offline_variable()} is set, and {repository} is not on this machine: {find.what_is_missing(repository)}"
    return JobError(what, command(script))


def no_token(repository: Repository, script: str) -> JobError:
    """The error for a gated repository without a token."""
    return JobError(
        f"{repository.name} is gated, and there is no Hugging Face token",
        f"run hf auth login, which writes {token_file()}, or export HF_TOKEN=<your token>; or {command(script)}",
    )


def _gated(repository: Repository, status: int | None, page: str) -> JobError:
    if status == 403:
        return JobError(
            f"{repository.name} is gated, and the account of this token has no access to it (403)",
            f"request access on {page} and wait until you have it; a fine-grained token also needs the permission to "
            "read gated repositories",
        )
    if has_token():
        return _bad_token(repository)
    return JobError(
        f"{repository.name} is gated, and there is no Hugging Face token (401)",
        f"request access on {page}, then run hf auth login or export HF_TOKEN=<your token>",
    )


def _unknown(repository: Repository, status: int | None, page: str) -> JobError:
    if status == 401 and not has_token():
        return JobError(
            f"{repository.name} is not public or does not exist, and there is no Hugging Face token (401)",
            f"look at {page}; if it is private, run hf auth login or export HF_TOKEN=<your token>",
        )
    return JobError(f"{repository.name} is not on the hub, or this token has no access to it ({status})", f"look at {page}")


def _bad_token(repository: Repository) -> JobError:
    where = "HF_TOKEN" if os.environ.get("HF_TOKEN") else str(token_file())
    return JobError(
        f"{repository.name}: the hub does not accept the token of {where} (401)",
        f"create a token on {TOKENS}, then run hf auth login or export HF_TOKEN=<your token>",
    )


def _refused(repository: Repository, status: int) -> JobError:
    if status == 401:
        return _bad_token(repository)
    if status == 403:
        return JobError(f"{repository.name}: the hub refuses this token (403)", f"see its permissions on {TOKENS}")
    if status == 404:
        return JobError(f"{repository.name}: {_endpoint()} does not have it (404)", "correct HF_ENDPOINT")
    if status == 407:
        return JobError(
            f"{repository.name}: the proxy {_proxy(_endpoint())} wants a password (407)", "export it in HTTPS_PROXY"
        )
    if status == 429:
        return JobError(f"{repository.name}: too many requests to the hub (429)", f"wait some minutes, then {AGAIN}")
    return JobError(f"{repository.name}: the hub answers {status}", AGAIN)


def _reason(error: BaseException) -> str:
    """Which host does not answer, and why."""
    url, chain = _url(error), list(causes(error))
    host, proxy = _host(url), _proxy(url)
    refused = any(isinstance(cause, ConnectionRefusedError | socket.gaierror) for cause in chain)
    if any("Proxy" in type(cause).__name__ for cause in chain) or (proxy and refused):
        return f"the proxy {proxy} gives no way to {host}"
    if any(isinstance(cause, ssl.SSLError) or type(cause).__name__ == "SSLError" for cause in chain):
        return f"the certificate of {host} is not accepted; for a proxy's own, see SSL_CERT_FILE and REQUESTS_CA_BUNDLE"
    if any(isinstance(cause, socket.gaierror) for cause in chain):
        return f"the name {host} cannot be resolved"
    if refused:
        return f"{host} refuses the connection"
    through = f" through the proxy {proxy}" if proxy else ""
    if any(isinstance(cause, TimeoutError) or "Timeout" in type(cause).__name__ for cause in chain):
        return f"{host} does not answer{through}"
    return f"the connection to {host}{through} fails"


def _url(error: BaseException) -> str:
    """The address of the request that failed: of the hub, or where the hub redirects to for large files."""
    for cause in causes(error):
        try:
            return str(cause.request.url)  # type: ignore[attr-defined]
        except (AttributeError, RuntimeError):  # httpx raises the latter if an exception has no request
            continue
    return _endpoint()


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _proxy(url: str) -> str:
    """The proxy for an address, or an empty text."""
    proxies = getproxies()
    if proxy_bypass(urlsplit(url).hostname or ""):
        return ""
    return _host(proxies.get(urlsplit(url).scheme) or proxies.get("all") or "")


def _host(url: str) -> str:
    """Host and port, without the user and password that the address of a proxy can have."""
    return urlsplit(url).netloc.rpartition("@")[2]
END_OF_FTGEN_FILE
    cat >"$1"/runtime/hub/fetch.py <<'END_OF_FTGEN_FILE' || return
"""Download a repository from the Hugging Face hub, once for all jobs.

In: a `Repository`. Out: a folder with its files, or a JobError.

The guard publishes the folder, so of many jobs and ranks one downloads and the others wait. The bytes go into a folder
beside it, which stays if the download is interrupted, so the next one continues it (see transfer.py).

Environment: what huggingface_hub reads, such as HF_TOKEN, HF_TOKEN_PATH, HF_ENDPOINT, HTTPS_PROXY.
"""

import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from runtime.guard import publish
from runtime.hub import errors, find, transfer
from runtime.hub.repository import Repository
from runtime.job.errors import JobError
from runtime.job.progress import timed

ANSWER_S = 10.0  # longest time until the hub answers a request
LISTING_S = 20.0  # longest time until the list of the files is there, with all addresses of the hub that are tried


class Listing(NamedTuple):
    """The files of a repository that a job reads, at one commit."""

    commit: str
    files: tuple[transfer.File, ...]


def fetch(repository: Repository, script: str, *, into_home: bool = False) -> Path:
    """A folder with the repository's files. It is downloaded if it is not on this machine.

    `script` is the name of the job's script, for hints. `into_home` copies from a hub cache that other machines may not
    see. JobError: no access, no network, no room, a file with another checksum.
    """
    found = find.find(repository)
    if found and (not into_home or found.is_relative_to(find.home())):
        return found
    place = find.place(repository)
    if found:
        files = [path for path in found.rglob("*") if repository.wants(path.relative_to(found).as_posix())]
        need = sum(path.stat().st_size for path in files)
        publish.ensure(place, find.source(repository), lambda staging: _copy(found, files, staging), need_bytes=need)
        return place
    publish.ensure(
        place,
        find.source(repository),
        lambda staging: _build(repository, script, place, staging),
        need_bytes=lambda: bytes_to_download(repository, script),
    )
    for partial in _partials(place):
        shutil.rmtree(partial, ignore_errors=True)
    return place


def bytes_to_download(repository: Repository, script: str) -> int:
    """Bytes that `fetch` still has to download. JobError: the hub does not tell."""
    if find.find(repository):
        return 0
    listing = _listing(repository, script)
    partial = _partial(find.place(repository), listing)
    there = transfer.size_of(partial) if partial.exists() else 0
    return max(0, sum(file.size or 0 for file in listing.files) - there)


@cache
def _listing(repository: Repository, script: str) -> Listing:
    """Ask the hub for the commit and the files. It is asked once: a commit that comes meanwhile must not matter."""
    if find.offline_variable():
        raise errors.offline(repository, script)
    hub = _huggingface_hub()
    with errors.plain_errors(repository, script):
        info = _within(
            LISTING_S,
            lambda: hub.HfApi().repo_info(
                repository.name,
                repo_type=repository.kind,
                revision=repository.revision,
                files_metadata=True,
                timeout=ANSWER_S,
            ),
        )
    files = tuple(_file(sibling) for sibling in info.siblings or [] if repository.wants(sibling.rfilename))
    return Listing(str(info.sha), files)


def _huggingface_hub() -> Any:
    """The package, without its progress bars and warnings: those have URLs with signatures."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ["HF_HUB_ENABLE_HF_TRANSFER"] = "0"  # its unfinished files have holes, and the size of finished ones
    try:
        import huggingface_hub
    except ImportError as error:
        raise JobError(
            f"{sys.executable} has no huggingface_hub",
            "python3 -m venv FOLDER && FOLDER/bin/pip install huggingface_hub, then export FTGEN_PYTHON=FOLDER/bin/python",
        ) from error
    huggingface_hub.logging.set_verbosity_error()
    return huggingface_hub


def _within(seconds: float, ask: Callable[[], Any]) -> Any:
    """The answer of `ask`. TimeoutError: it takes longer. A library's own limit holds for each address of a host anew."""
    answers: queue.Queue[Any] = queue.Queue()

    def work() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if error:
        raise error
    return answer


def _file(sibling: Any) -> transfer.File:
    lfs = sibling.lfs or {}
    return transfer.File(sibling.rfilename, sibling.size, lfs.get("sha256"), None if lfs else sibling.blob_id)


def _build(repository: Repository, script: str, place: Path, staging: Path) -> dict[str, Any]:
    """Download into the partial folder, and link its files into the staging folder. Returns the commit."""
    listing = _listing(repository, script)
    partial = _partial(place, listing)
    partial.mkdir(parents=True, exist_ok=True)
    size = sum(file.size or 0 for file in listing.files)
    with timed(f"downloading {repository}: {len(listing.files)} files, {size / transfer.GB:.1f} GB"):
        transfer.download(repository, script, listing.commit, listing.files, partial)
    if lacking := repository.missing(partial):
        raise JobError(f"{repository} has no {', '.join(lacking)}", "use another repository or revision")
    for file in listing.files:
        _link(partial / file.path, staging / file.path)
    return {"commit": listing.commit}


def _link(source: Path, target: Path) -> None:
    """A second name, so that the partial folder stays whole until the folder is published. A move, where links fail."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:
        source.rename(target)


def _copy(snapshot: Path, files: list[Path], staging: Path) -> dict[str, Any]:
    """Copy files of a hub cache, where they are links."""
    with timed(f"copying {snapshot}"):
        for file in files:
            target = staging / file.relative_to(snapshot)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    return {"commit": snapshot.name}


def _partial(place: Path, listing: Listing) -> Path:
    return place.parent / f".{place.name}.partial-{listing.commit[:12]}"


def _partials(place: Path) -> list[Path]:
    return list(place.parent.glob(f".{place.name}.partial-*"))
END_OF_FTGEN_FILE
    cat >"$1"/runtime/hub/find.py <<'END_OF_FTGEN_FILE' || return
"""Find a repository of the hub on this machine, without a network, a token or huggingface_hub.

In: a `Repository`. Out: a folder with its files, or what is missing.

Two kinds of places are looked at: the folder that `fetch` publishes, and hub caches, whose layout huggingface_hub
documents as <cache>/models--org--name/{refs/<revision>,snapshots/<commit>/<file>}. A snapshot is used only if it has
all that a job reads, because an interrupted download leaves a snapshot with some of the files.

Environment: HF_HOME (in a job $STAGE_PATH/HF_ckpt), STAGE_PATH, HF_HUB_CACHE; FTGEN_HUB_CACHE, the hub cache of the
user who submitted the job; HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE.
"""

import json
import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from runtime.guard import manifest
from runtime.hub.repository import Repository

SHOWN = 6  # number of missing files that an error names


def find(repository: Repository) -> Path | None:
    """A folder with all the files that a job reads, or None."""
    return published(repository) or in_cache(repository)


def published(repository: Repository) -> Path | None:
    """The folder that `fetch` published, or None."""
    folder = place(repository)
    return folder if manifest.flaw(folder, source(repository)) is None else None


def in_cache(repository: Repository) -> Path | None:
    """A complete snapshot in a hub cache, or None. Its name is the commit."""
    complete = (folder for folder in snapshots(repository) if not repository.missing(folder))
    return next(complete, None)


def commit(folder: Path) -> str:
    """The commit that a folder of `find` has."""
    try:
        return str(json.loads((folder / manifest.NAME).read_text())["origin"]["commit"])
    except FileNotFoundError:
        return folder.name  # a snapshot in a hub cache


def place(repository: Repository) -> Path:
    """The folder that `fetch` publishes. Its name has a hash of `needed`: two plans may read other files of a data set."""
    revision = repository.revision.replace("/", "--")
    files = sha256(json.dumps(repository.needed).encode()).hexdigest()[:6]
    return home() / "downloads" / f"{repository.kind}s" / f"{repository.name}@{revision}-{files}"


def source(repository: Repository) -> dict[str, Any]:
    """What identifies the published folder. Without `wanted`: a new ftgen must not download 100 GB for a small file."""
    asked = {"repository": repository.name, "type": repository.kind, "revision": repository.revision}
    return {"kind": "download", **asked, "needed": repository.needed}


def home() -> Path:
    """The folder of all that jobs take from the hub."""
    return Path(os.environ.get("HF_HOME") or Path(os.environ.get("STAGE_PATH") or Path.cwd(), "HF_ckpt"))


def caches() -> list[Path]:
    """The hub caches to look at: that of the jobs, then those of the site and of the user."""
    others = (os.environ.get(name) for name in ("HF_HUB_CACHE", "FTGEN_HUB_CACHE"))
    paths = [home() / "hub", *(Path(os.path.expandvars(path)).expanduser() for path in others if path)]
    return list(dict.fromkeys(paths))


def snapshots(repository: Repository) -> list[Path]:
    """The folders of this revision in the hub caches, complete or not."""
    found = []
    for cache in caches():
        folder = cache / f"{repository.kind}s--{repository.name.replace('/', '--')}"
        try:
            name = (folder / "refs" / repository.revision).read_text().strip()
        except OSError:
            name = repository.revision
        if name and (snapshot := folder / "snapshots" / name).is_dir():
            found.append(snapshot)
    return found


def what_is_missing(repository: Repository) -> str:
    """Names of the missing files, and the folder that lacks them, as text for an error."""
    folder = next(iter(snapshots(repository)), place(repository))
    names = repository.missing(folder)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{folder} lacks {', '.join(names[:SHOWN])}{more}"


def offline_variable() -> str:
    """The variable by which the user forbids the hub, or an empty text. These two count for huggingface_hub."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return next((name for name in names if os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}), "")


def go_offline() -> None:
    """Forbid the hub from now on, unless HF_HUB_OFFLINE is set: libraries must not wait for a network that is not there."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if "huggingface_hub.constants" in sys.modules:
        sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE = bool(offline_variable())  # type: ignore[attr-defined]
END_OF_FTGEN_FILE
    cat >"$1"/runtime/hub/repository.py <<'END_OF_FTGEN_FILE' || return
"""A repository of the Hugging Face hub, and which of its files a job reads.

In: a name, patterns of files, a folder. Out: a `Repository`, and the files that the folder lacks.
"""

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple


class Repository(NamedTuple):
    """One revision of a repository. A pattern matches the path of a file; `*` matches no slash."""

    name: str  # org/name
    kind: str  # "model" or "dataset"
    revision: str  # branch, tag or commit
    wanted: tuple[str, ...]  # patterns of the files to download
    needed: tuple[str, ...]  # patterns that match at least one file of a complete download

    def __str__(self) -> str:
        """Its name, with its revision if that is not main."""
        return self.name if self.revision == "main" else f"{self.name} at {self.revision}"

    def wants(self, file: str) -> bool:
        """Whether the file at this path in the repository is downloaded."""
        return ".." not in file.split("/") and any(_matches(file, pattern) for pattern in self.wanted)

    def missing(self, folder: Path) -> list[str]:
        """Patterns of `needed` that no file in the folder matches, and shards of the weights that their index names."""
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        lacking = [pattern for pattern in self.needed if not any(_matches(file, pattern) for file in files)]
        return lacking + sorted(_shards(folder) - set(files))


def _matches(file: str, pattern: str) -> bool:
    return file.count("/") == pattern.count("/") and fnmatch(file, pattern)


def _shards(folder: Path) -> set[str]:
    shards: set[str] = set()
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards |= set(json.loads(index.read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError):
            shards.add(index.name)  # it cannot be read
    return shards
END_OF_FTGEN_FILE
    cat >"$1"/runtime/hub/token.py <<'END_OF_FTGEN_FILE' || return
"""Whether there is a Hugging Face token. The token itself is never returned, printed or written.

In: the environment. Out: the path of the token file; whether huggingface_hub will find a token.

Environment: HF_TOKEN, HUGGING_FACE_HUB_TOKEN, HF_TOKEN_PATH, HF_HOME, XDG_CACHE_HOME.
"""

import os
from pathlib import Path


def token_file() -> Path:
    """Path of the file in which `hf auth login` keeps the token."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = os.environ.get("HF_TOKEN_PATH") or f"{os.environ.get('HF_HOME') or f'{cache}/huggingface'}/token"
    return Path(os.path.expandvars(path)).expanduser()


def has_token() -> bool:
    """Whether the environment or the token file has a token."""
    if os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    try:
        return bool(token_file().read_text().strip())
    except OSError:
        return False
END_OF_FTGEN_FILE
    cat >"$1"/runtime/hub/transfer.py <<'END_OF_FTGEN_FILE' || return
"""Download files of a repository, several at a time, and continue in the middle of a file that was interrupted.

In: the `File`s of a commit, and a folder. Out: the files in the folder, whose checksums are those of the hub.

huggingface_hub does the requests: the token, HF_ENDPOINT, the proxies and the certificates are its matter. Only its
function for one request is used, because its hf_hub_download begins an interrupted file again in version 1.33, and takes
a damaged file for good (tried over plain HTTP with 0.23.5, 0.36.2 and 1.33.0).
"""

import queue
import threading
import time
from collections.abc import Sequence
from hashlib import sha1
from pathlib import Path
from typing import NamedTuple

from runtime.guard.manifest import sha256_of
from runtime.hub import errors
from runtime.hub.repository import Repository
from runtime.job.errors import JobError
from runtime.job.progress import say

THREADS = 8  # files that are downloaded at the same time, as huggingface_hub's snapshot_download does
REPORT_S = 15.0  # between two progress lines
GB = 1e9


class File(NamedTuple):
    """A file of a repository. A mirror can leave out size and hashes."""

    path: str
    size: int | None  # bytes
    sha256: str | None  # of a large file
    git_sha1: str | None  # of a small file: of its Git blob


def download(repository: Repository, script: str, commit: str, files: Sequence[File], folder: Path) -> None:
    """Download the files into the folder. JobError: no access, no network, a file with another checksum.

    The threads are daemons: a signal must end the process at once, and not after another 5 GB.
    """
    waiting: queue.SimpleQueue[File] = queue.SimpleQueue()
    for file in sorted(files, key=lambda file: file.size or 0):  # a refusal shows at once
        waiting.put(file)
    ended: queue.Queue[Exception | None] = queue.Queue()

    def work() -> None:
        try:
            while not waiting.empty():
                _download_file(repository, script, commit, waiting.get_nowait(), folder)
        except queue.Empty:
            pass
        except Exception as error:
            ended.put(error)
            return
        ended.put(None)

    for _ in range(THREADS):
        threading.Thread(target=work, daemon=True).start()
    _wait_for_threads(ended, folder, sum(file.size or 0 for file in files))


def _wait_for_threads(ended: "queue.Queue[Exception | None]", folder: Path, size: int) -> None:
    """Wait until all threads have ended, or raise the first error of one. Prints progress lines."""
    running, said = THREADS, time.monotonic()
    while running:
        try:
            error = ended.get(timeout=REPORT_S)
        except queue.Empty:
            error = None
        else:
            if error:
                raise error
            running -= 1
        if time.monotonic() - said >= REPORT_S:
            said = time.monotonic()
            say(f"downloaded {size_of(folder) / GB:.1f} of {size / GB:.1f} GB")


def _download_file(repository: Repository, script: str, commit: str, file: File, folder: Path) -> None:
    """Download one file, or the rest of it. Its name has .part until its checksum is right."""
    target = folder / file.path
    part = target.with_name(f"{target.name}.part")
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    while not _get(repository, script, commit, file, part):
        say(f"the connection broke: {file.path} goes on from {_bytes(part) / GB:.2f} GB", any_rank=True)
    if flaw := _flaw(part, file):
        part.unlink()
        raise JobError(
            f"{repository}: {file.path} has arrived damaged: {flaw}",
            "try again: this file is downloaded again; if it comes again, the mirror of HF_ENDPOINT or the proxy changes it",
        )
    part.rename(target)


def _get(repository: Repository, script: str, commit: str, file: File, part: Path) -> bool:
    """Download the file, or what comes after the bytes that are there. False: the connection broke, after more bytes."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repository.name, file.path, repo_type=repository.kind, revision=commit)
    there = _bytes(part) if file.sha256 and file.size else 0
    try:
        with part.open("r+b" if there else "wb") as opened, errors.plain_errors(repository, script):
            opened.seek(there)
            http_get(url, opened, resume_size=there, headers=build_hf_headers(), expected_size=file.size)
    except JobError:
        if file.sha256 and file.size and there < _bytes(part) < file.size:
            return False
        raise
    return True


def _flaw(path: Path, file: File) -> str | None:
    """What is wrong with the bytes, by the hub's own size and hash."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"it has {size} bytes, not {file.size}"
    if file.sha256 and (found := sha256_of(path)) != file.sha256:
        return f"its SHA-256 is {found}, not {file.sha256}"
    if file.git_sha1:
        content = path.read_bytes()
        found = sha1(b"blob %d\0" % size + content, usedforsecurity=False).hexdigest()
        if found != file.git_sha1:
            return f"its Git hash is {found}, not {file.git_sha1}"
    return None


def size_of(folder: Path) -> int:
    """Bytes of the files in the folder."""
    return sum(_bytes(path) for path in folder.rglob("*"))


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0  # a thread has renamed it
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/__init__.py <<'END_OF_FTGEN_FILE' || return
"""Errors, progress lines, environment and profiling of a job.

In: a plan and the process environment. Out: lines in the log. Start with `progress.py` and `errors.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/caches.py <<'END_OF_FTGEN_FILE' || return
"""Give Triton and TorchInductor a folder for the kernels that they compile, unless the user has set one.

In: the environment. Out: TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR, and their folders.

Triton's default is in the home directory: in an image it may not be there, and on many clusters all ranks share it over a
network.
"""

import os
import tempfile
from pathlib import Path

FOLDERS = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "torchinductor"}


def set_places() -> None:
    """Set the variables that are not set. The ranks of a node share the folders, which both programs allow."""
    missing = {variable: folder for variable, folder in FOLDERS.items() if not os.environ.get(variable)}
    if missing:
        place = _place()
        for variable, folder in missing.items():
            os.environ[variable] = str(place / folder)


def _place() -> Path:
    """A folder of this user on the node; without one, a folder of the run."""
    mine = Path(tempfile.gettempdir(), f"ftgen-{os.getuid()}")
    try:
        mine.mkdir(mode=0o700, exist_ok=True)
        if not mine.is_symlink() and mine.stat().st_uid == os.getuid() and os.access(mine, os.W_OK):
            return mine
    except OSError:  # the folder for temporary files is full, or read-only
        pass
    return Path(os.environ.get("FTGEN_RUN_DIR") or Path.cwd(), "cache", os.environ.get("SLURM_NODEID", "0"))
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/environment.py <<'END_OF_FTGEN_FILE' || return
"""Write the environment of a training into its log: versions, machine, Slurm job. `ftgen report` shows it.

In: a plan and the process environment. Out: one line in the log, `ftgen environment: {...}`.
"""

import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "nemo_toolkit",
    "megatron-bridge",
    "megatron-core",
    "transformer-engine",
    "lightning",
    "transformers",
    "numpy",
)
# Where a package that is imported has its version: sources that a spec adds have no other.
IMPORTED = {"nemo_toolkit": "nemo", "megatron-core": "megatron.core", "megatron-bridge": "megatron.bridge"}
DRIVER = Path("/sys/module/nvidia/version")
JOB = {"job": "SLURM_JOB_ID", "nodes": "SLURM_JOB_NODELIST", "partition": "SLURM_JOB_PARTITION"}


def tell(plan: dict[str, Any], off: dict[str, str] | None = None) -> None:
    """Print the line; only rank 0 does. `off`: optimizations of the plan that these packages cannot do, and why."""
    if os.environ.get("RANK", "0") == "0":
        facts = found(plan) | ({"optimizations_off": off} if off else {})
        print(f"ftgen environment: {json.dumps(facts)}", flush=True)


def found(plan: dict[str, Any]) -> dict[str, Any]:
    """The environment as names and values; what this machine does not have is left out."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: number for name in PACKAGES if (number := installed(name))},
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


def installed(package: str) -> str | None:
    """The version of a package: of the one that is imported, if it is. None if it is not installed."""
    if found := getattr(sys.modules.get(IMPORTED.get(package, "")), "__version__", None):
        return str(found).partition("+")[0]  # behind it is the commit of whatever repository the job was started in
    try:
        return version(package)
    except PackageNotFoundError:
        return None
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/errors.py <<'END_OF_FTGEN_FILE' || return
"""The error for everything that the user can fix.

In: what is wrong and what to do, one line each. Out: an exception, which the entrypoint prints as `ftgen: error: ...`.
"""

from collections.abc import Iterator


class JobError(Exception):
    """Something that the user must change. As text: what is wrong, then the hint on its own line. Exit code 1."""

    def __init__(self, what: str, hint: str = "") -> None:
        """`what` and `hint` are one line each."""
        super().__init__(what, hint)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        """What is wrong, then the hint."""
        return self.what + (f"\n  hint: {self.hint}" if self.hint else "")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, and those that it was raised from or while."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/places.py <<'END_OF_FTGEN_FILE' || return
"""Say where a job writes.

In: the environment. Out: paths.

Environment: FTGEN_RUN_DIR, which the job's script sets; STAGE_PATH.
"""

import os
from pathlib import Path


def run_directory() -> Path:
    """The folder of this run's log."""
    return Path(os.environ.get("FTGEN_RUN_DIR") or Path(os.environ.get("STAGE_PATH") or Path.cwd(), "logs"))
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/prefix.py <<'END_OF_FTGEN_FILE' || return
"""Start a task of the training again with a command in front of it, such as numactl.

In: plan["prefix"], and the ranks of this task. Out: this process becomes the command, which starts Python again.
"""

import os
import re
import shutil
import sys
from typing import Any

from runtime.job.errors import JobError
from runtime.job.progress import say

BEHIND = "FTGEN_BEHIND_PREFIX"  # set for the process that the command starts


def enter(plan: dict[str, Any]) -> None:
    """Become the command of the site profile, once. JobError: there is no such program."""
    if not plan["prefix"] or BEHIND in os.environ:
        return
    words = [with_ranks(word) for word in plan["prefix"]]
    program = shutil.which(words[0])
    if not program:
        raise JobError(f"prefix: {words[0]} is not installed here", "correct prefix in the site profile, or install it")
    os.environ[BEHIND] = "1"
    command = [*words, sys.executable, *sys.orig_argv[1:]]
    say("prefix: " + " ".join(words))
    sys.stdout.flush()
    os.execv(program, command)  # noqa: S606 - it starts this program again


def with_ranks(word: str) -> str:
    """The word with {rank}, {local_rank}, {node_rank} and, for example, {local_rank//4} replaced by numbers."""

    def number(found: re.Match[str]) -> str:
        return str(int(os.environ.get(found[1].upper(), "0")) // int(found[2] or 1))

    return re.sub(r"\{(rank|local_rank|node_rank)(?://([1-9][0-9]*))?\}", number, word)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/profile.py <<'END_OF_FTGEN_FILE' || return
"""Profile some steps of some ranks.

In: plan["profile"]. Out: one file per profiled rank in $FTGEN_RUN_DIR/profile.

With the tool "nsys", the process restarts as a child of Nsight Systems, which records from cudaProfilerStart to
cudaProfilerStop. With "pytorch", torch.profiler records and writes a Chrome trace. Steps are counted from 0, as in
the log.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from runtime.job.errors import JobError
from runtime.job.places import run_directory
from runtime.job.progress import say

Plan = dict[str, Any]
INSIDE = "FTGEN_INSIDE_NSYS"  # set for the process that Nsight Systems started


def wanted(plan: Plan) -> bool:
    """Whether the plan profiles the rank of this process."""
    return bool(plan.get("profile")) and int(os.environ.get("RANK", "0")) in plan["profile"]["ranks"]


def file(plan: Plan) -> Path:
    """Path of this rank's profile, without the suffix."""
    steps = f"steps_{plan['profile']['first_step']}-{plan['profile']['last_step']}"
    return Path(run_directory(), "profile", f"{steps}_rank_{os.environ.get('RANK', '0')}")


def enter(plan: Plan) -> None:
    """Restart this process under Nsight Systems, if the plan asks for it. JobError: nsys is not installed."""
    if not wanted(plan) or plan["profile"]["tool"] != "nsys" or INSIDE in os.environ:
        return
    nsys = shutil.which("nsys")
    if not nsys:
        raise JobError("nsys is not installed on this node", 'install Nsight Systems, or set profile.tool = "pytorch"')
    file(plan).parent.mkdir(parents=True, exist_ok=True)
    os.environ[INSIDE] = "1"
    options = ["--trace=cuda,nvtx", "--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--force-overwrite=true"]
    command = [nsys, "profile", *options, f"--output={file(plan)}", sys.executable, *sys.argv]
    say("profiling: " + " ".join(command))
    sys.stdout.flush()
    os.execv(nsys, command)  # noqa: S606 - the profiler replaces this process


def arguments(plan: Plan) -> tuple[str, int, int, str]:
    """The arguments of `runtime.job.profiler.Profiler`."""
    asked = plan["profile"]
    return asked["tool"], asked["first_step"], asked["last_step"], str(file(plan))
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/profiler.py <<'END_OF_FTGEN_FILE' || return
"""Start and stop the profiler between two steps. The engine calls it, with the number of the step.

In: the tool, the first and the last step, a file. Out: the profile that the tool writes.

This module imports torch, so only a profiled training imports it.
"""

from pathlib import Path
from typing import Any

import torch

from runtime.job.progress import say


class Profiler:
    """Profile from the start of `first_step` to the end of `last_step`, counted from 0."""

    def __init__(self, tool: str, first_step: int, last_step: int, file: str) -> None:
        self.tool, self.first_step, self.last_step, self.file = tool, first_step, last_step, Path(file)
        self.profile: Any = None

    def before_step(self, step: int) -> None:
        """Start the profiler before `first_step`."""
        if step != self.first_step:
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

    def after_step(self, step: int) -> None:
        """Stop the profiler after `last_step`."""
        if step != self.last_step:
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
    cat >"$1"/runtime/job/progress.py <<'END_OF_FTGEN_FILE' || return
"""Print progress lines into the log.

In: a text. Out: a line `ftgen: text` on stdout, printed at once. With several ranks, only rank 0 prints.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


def say(text: str, *, any_rank: bool = False) -> None:
    """Print `ftgen: text` on rank 0. `any_rank` prints on every rank: for an event that happens on one rank only."""
    if any_rank or os.environ.get("RANK", "0") == "0":
        print(f"ftgen: {text}", flush=True)


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Print `what` at the start of the block, and the seconds that it took if it ends without an exception."""
    say(f"{what} ...")
    begin = time.monotonic()
    yield
    say(f"{what}: done in {time.monotonic() - begin:.1f} s")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/ranks.py <<'END_OF_FTGEN_FILE' || return
"""Give a process its place: as the only one, or as one rank of a training.

In: a plan, and the variables of whatever started the process. Out: RANK, LOCAL_RANK, NODE_RANK, WORLD_SIZE and
LOCAL_WORLD_SIZE, and no variable that contradicts them.

A framework counts the tasks itself, by the first such variable that it finds. Lightning takes SLURM_NTASKS for the
world size: a conversion in one task of a job with eight then waits for seven others for ever.

Environment: SLURM_PROCID, SLURM_LOCALID, SLURM_NODEID and SLURM_STEP_NUM_TASKS, which srun sets; FTGEN_NODES, the names of
the job's nodes in the order of their ranks; SLURMD_NODENAME; CUDA_VISIBLE_DEVICES.
"""

import os
import re
import socket
from typing import Any

from runtime.job.errors import JobError

Plan = dict[str, Any]
FROM_SLURM = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "NODE_RANK": "SLURM_NODEID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
}
# What counts tasks or numbers them: Slurm's, and those of other launchers that Lightning and NeMo read.
COUNTS_OF_LAUNCHERS = re.compile(
    r"SLURM_(NTASKS|NPROCS|NNODES|TASKS_PER|PROCID|LOCALID|NODEID|GTIDS|STEP)|(OMPI|PMI|PMIX|MV2|LSB|JSM|TORCHELASTIC)_"
)
OF_A_RANK = {"RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"}
RENDEZVOUS = {"MASTER_ADDR", "MASTER_PORT"}
HINT_BLOCKS = "remove --distribution and --nodelist from srun_flags: ranks must be in blocks, in the order of the nodes"
HINT_GPUS = "every rank needs all GPUs of its node: submit without --gpus-per-task, --gpu-bind and --ntasks-per-gpu"


def be_alone() -> None:
    """Make this process the only one, whatever started it."""
    for name in list(os.environ):
        if COUNTS_OF_LAUNCHERS.match(name) or name in OF_A_RANK | RENDEZVOUS:
            del os.environ[name]


def be_a_rank(plan: Plan) -> None:
    """Copy Slurm's numbers of this task to the variables that PyTorch reads. JobError: the task is in the wrong place.

    They override what a shell or an image has set. Without a step of Slurm that has the plan's tasks, the variables of
    the user hold, and Slurm's are removed: they are those of a session in which the user started the processes.
    """
    env = os.environ
    in_a_step = all(name in env for name in FROM_SLURM.values())
    if in_a_step and (int(env["SLURM_STEP_NUM_TASKS"]) == plan["gpus"] or "RANK" not in env):
        env.update({name: env[slurm] for name, slurm in FROM_SLURM.items()})
        env["LOCAL_WORLD_SIZE"] = str(plan["gpus_per_node"])
        _refuse_a_wrong_place(plan)
        _refuse_too_few_gpus(plan)
    else:
        for name in [name for name in env if COUNTS_OF_LAUNCHERS.match(name) and not name.startswith("TORCHELASTIC_")]:
            del env[name]
    env.setdefault("LOCAL_WORLD_SIZE", str(min(int(env.get("WORLD_SIZE", "1")), plan["gpus_per_node"])))


def set_defaults(plan: Plan) -> None:
    """Set defaults for a single process, and GROUP_RANK, PyTorch's name for NODE_RANK. JobError: a wrong WORLD_SIZE."""
    env = os.environ
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        env.setdefault(name, value)
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(_free_port())
    env["GROUP_RANK"] = env["NODE_RANK"]
    if int(env["WORLD_SIZE"]) != plan["gpus"]:
        raise JobError(
            f"{env['WORLD_SIZE']} processes train, but the plan has {plan['gpus']} GPUs",
            "start one process per GPU, as the job's script does",
        )


def _refuse_a_wrong_place(plan: Plan) -> None:
    rank, local_rank, node_rank = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
    node, local = divmod(rank, plan["gpus_per_node"])
    nodes, here = os.environ.get("FTGEN_NODES", "").split(), os.environ.get("SLURMD_NODENAME", "")
    if (node_rank, local_rank) != (node, local):
        found = f"local rank {local_rank} of node {node_rank}"
        raise JobError(f"rank {rank} must be local rank {local} of node {node}, but is {found}", HINT_BLOCKS)
    if here and node < len(nodes) and nodes[node] != here:
        raise JobError(f"rank {rank} must be on {nodes[node]}, but is on {here}", HINT_BLOCKS)


def _refuse_too_few_gpus(plan: Plan) -> None:
    """A list of GPUs that is shorter than the node's. Without a list, the driver decides: see runtime/check.py."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if plan["gpu"]["name"] == "cpu" or visible is None:
        return
    count = len([device for device in visible.split(",") if device.strip()])
    if count < plan["gpus_per_node"]:
        what = f"this rank can use only {count} of its node's {plan['gpus_per_node']} GPUs (CUDA_VISIBLE_DEVICES={visible})"
        raise JobError(what, HINT_GPUS)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/sharing.py <<'END_OF_FTGEN_FILE' || return
"""Let a group share what jobs make: folders and files below a STAGE_PATH that the group may write.

In: a folder. Out: the umask of this process, or the modes of files. A user's umask of 022 would close to the group what
this process makes, and the next job that needs the checkpoint may be that of another member.

The name of who made something is in the guard's claims and manifests.
"""

import os
import pwd
import stat
from pathlib import Path

GROUP = stat.S_IRGRP | stat.S_IWGRP


def is_shared(folder: Path) -> bool:
    """Whether the group of the folder may write to it."""
    try:
        return bool(folder.stat().st_mode & stat.S_IWGRP)
    except OSError:
        return False


def share_new_files(stage: Path) -> None:
    """Leave the group its rights to what this process makes from now on, if `stage` is shared."""
    if is_shared(stage):
        os.umask(os.umask(0o777) & ~stat.S_IRWXG)


def share_tree(tree: Path) -> None:
    """Give the group its rights to a tree, if the folder above is shared. Some libraries make files for their user alone."""
    if not is_shared(tree.parent):
        return
    for path in [tree, *tree.rglob("*")]:
        mode = path.lstat().st_mode
        wanted = mode | GROUP | (stat.S_IXGRP if stat.S_ISDIR(mode) else 0)
        if wanted != mode and not stat.S_ISLNK(mode):
            path.chmod(stat.S_IMODE(wanted))


def user_name(uid: int | None = None) -> str:
    """The name of a user, by default of this process. In an image, a user may have a number alone."""
    number = os.getuid() if uid is None else uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def owner_of(path: Path) -> str:
    """Whose file or folder it is."""
    return user_name(path.stat().st_uid)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/variables.py <<'END_OF_FTGEN_FILE' || return
"""Set the variables of [environment]. Their texts may refer to the variables that are there.

In: names and texts. Out: os.environ; perhaps a new start of Python, because it reads some variables only when it starts.

Outside of images, the job's script has expanded the texts before Python starts, and FTGEN_ENVIRONMENT says so. An image
has variables of its own, such as LD_LIBRARY_PATH, so there only this module can do it.
"""

import os
import re
import sys
from collections.abc import Mapping

from runtime.job.errors import JobError

MARK = "FTGEN_ENVIRONMENT"
READ_AT_THE_START = ("LD_", "PYTHON")  # beginnings of the names that the loader and Python read only once
REFERENCE = re.compile(r"\$(?:\$|\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")


def set_variables(texts: Mapping[str, str]) -> None:
    """Set each variable, in this order; start Python again if that makes a difference to its start."""
    env, before = os.environ, dict(os.environ)
    for name, text in texts.items():
        if MARK not in before or "$" not in text:
            env[name] = expanded(name, text, env)
    env[MARK] = "set"
    changed = {name for name in texts if env[name] != before.get(name)}
    if MARK not in before and any(name.startswith(READ_AT_THE_START) for name in changed):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - this program again


def expanded(name: str, text: str, environment: Mapping[str, str]) -> str:
    """The text with the values of $X and ${X}, and $$ as a dollar. Nothing in it is executed.

    An element of a list with colons that is empty only because its variables are not set is left out: in a search path,
    an empty element is the current folder.
    """

    def value(found: re.Match[str]) -> str:
        reference = found[1] or found[2]
        if reference and reference not in environment and reference != name and environment.get("SLURM_PROCID", "0") == "0":
            print(f"ftgen: warning: {name} refers to ${reference}, which is not set", file=sys.stderr, flush=True)
        return environment.get(reference, "") if reference else "$"

    elements = [(element, REFERENCE.sub(value, element)) for element in text.split(":")]
    return ":".join(after for element, after in elements if after or not element)


def path_with_values(key: str, path: str) -> str:
    """A path of the spec with the values of ~ and variables such as $HOME. JobError: a variable is not set."""

    def value(found: re.Match[str]) -> str:
        reference = found[1] or found[2]
        if not reference:
            return "$"
        if reference not in os.environ:
            raise JobError(f"{key}: {path} refers to ${reference}, which is not set", "export it, or write the whole path")
        return os.environ[reference]

    return REFERENCE.sub(value, f"$HOME{path[1:]}" if path == "~" or path.startswith("~/") else path)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/watchdog.py <<'END_OF_FTGEN_FILE' || return
"""Tell in which call this process waits, when the job's script asks for it.

In: the file `stacks/wanted` in $FTGEN_RUN_DIR, which the script writes when the log has not grown for FTGEN_QUIET_S seconds
(600). Out: `stacks/<command>_<rank>.txt`, the calls of the main thread, the innermost first.

The files lie on the shared file system, because the processes of a job are on many nodes, and a signal would end a
process that does not expect it.

A library can wait without releasing Python's lock. Then the thread of this module cannot run, and Python's own
faulthandler, which needs no lock, prints the calls of all threads into the log.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

QUIET_S = 600.0
POLLS = 20  # in FTGEN_QUIET_S: how often to look for the file
CALLS = 30  # of the innermost are written


def begin(command: str) -> None:
    """Start the thread. It ends with the process."""
    quiet = float(os.environ.get("FTGEN_QUIET_S") or QUIET_S)
    folder = Path(os.environ["FTGEN_RUN_DIR"], "stacks")
    threading.Thread(target=_answer, args=(folder, command, quiet), daemon=True).start()


def _answer(folder: Path, command: str, quiet: float) -> None:
    # the main thread handles signals: one that arrives here would not interrupt a long call of the main thread
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    seen = _asked(folder)
    while True:
        faulthandler.dump_traceback_later(quiet, repeat=True)
        time.sleep(quiet / POLLS)
        if (asked := _asked(folder)) != seen:
            seen = asked
            _write(folder / f"{command}_{os.environ.get('RANK', '0')}.txt", calls_of_the_main_thread())


def calls_of_the_main_thread() -> list[str]:
    """`file:line function` of each call, the innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = traceback.StackSummary.extract(traceback.walk_stack(frame), limit=CALLS, lookup_lines=False)
    return [f"{call.filename}:{call.lineno} {call.name}" for call in stack]


def _asked(folder: Path) -> int:
    try:
        return (folder / "wanted").stat().st_mtime_ns
    except OSError:
        return 0


def _write(path: Path, lines: list[str]) -> None:
    """Complete or not at all, because the script reads the file as soon as it exists."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text("\n".join(lines) + "\n")
        partial.rename(path)
    except OSError:
        pass  # the disk is full or gone: the script says without it where the job waits
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/__init__.py <<'END_OF_FTGEN_FILE' || return
"""Weights in Hugging Face format: which repository has them, or random ones; and read a checkpoint ahead.

In: a plan. Out: a repository, or a folder with safetensors. Start with `hub.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/checkpoint.py <<'END_OF_FTGEN_FILE' || return
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
    """Bytes that download and conversion write. Weights have two bytes per parameter, in small models four."""
    parameters, kind = plan["model"]["parameters"], plan["checkpoint"]["source"]
    weights = parameters * (2 if parameters >= random_llama.LARGE else 4)
    if kind == "hub":
        weights += fetch.bytes_to_download(hub.repository(plan), plan["name"])
    if kind == "random":
        weights *= 2
    return int(weights * MARGIN) + CONTEXT_BYTES


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
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/hub.py <<'END_OF_FTGEN_FILE' || return
"""Name the repository of a model's weights, and the files of it that the importer reads.

In: a plan with checkpoint.source = "hub". Out: a `Repository`.
"""

from typing import Any

from runtime.hub.repository import Repository

# Many repositories also have the weights in other formats: "original/" and *.pth of Meta, consolidated.* of Mistral.
WANTED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template*",
    "model*.safetensors*",
)
NEEDED = ("config.json", "tokenizer.*", "model*.safetensors")


def repository(plan: dict[str, Any]) -> Repository:
    """The repository of the plan's model."""
    return Repository(plan["model"]["hf_id"], "model", plan["checkpoint"]["revision"] or "main", WANTED, NEEDED)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/random_llama.py <<'END_OF_FTGEN_FILE' || return
"""Generate a Llama with the plan's shape and random weights, in Hugging Face format.

In: a plan. Out: a directory that the importer reads.

Such a model measures speed without a download: it trains as fast as the real one. The tokenizer is a byte-level BPE
with exactly `vocab_size` entries. Each thread generates and writes one shard at a time, so 8 billion weights need 5
GiB of memory with eight threads and 2.6 GiB with two (measured), instead of 16 GiB.
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
LARGE = 10**9  # parameters; from this size on, weights are bfloat16, as in published models; smaller models have float32
# In Llama-3 8B, the shard of embedding and head has 1.05 billion weights and that of a layer 0.22 billion. With 8
# threads, the first shard is finished at the same time as the 32 others. More threads would only need more memory.
THREADS = 8
STD = 0.02  # standard deviation of the weights: `initializer_range` in Llama's config.json


def write(plan: dict[str, Any], directory: Path) -> None:
    """Write config, tokenizer and weights of plan["model"], generated from plan["seed"]."""
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
    """Texts with enough different names to train a tokenizer of `vocab_size` entries."""
    rng = random.Random(vocab_size)  # noqa: S311
    examples = (synthetic_text.example(rng) for _ in range(400))
    names = [synthetic_text.name(rng) for _ in range(vocab_size // 2)]
    return [f"{example['input']} {example['output']}" for example in examples] + [f" {name}" for name in names]


def _write_weights(model: dict[str, Any], dtype: str, seed: int, directory: Path, threads: int) -> None:
    """Write the shards and their index. The bytes do not depend on the number of threads."""
    shards = _shards(model)
    files = [directory / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    seeds = [seed * 1000 + number for number in range(len(shards))]  # one seed per shard: a shard can be generated alone
    with ThreadPoolExecutor(threads) as pool:  # the first shard is the largest, and starts first
        size = sum(pool.map(_write_shard, shards, files, seeds, [dtype] * len(shards)))
    index = {key: file.name for shapes, file in zip(shards, files, strict=True) for key in shapes}
    document = {"metadata": {"total_size": size}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(document, indent=1))


def _write_shard(shapes: dict[str, tuple[int, ...]], file: Path, seed: int, dtype: str) -> int:
    """Write one shard; returns the size of its weights in bytes. Most of the time is spent without the GIL."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {key: _weight(shape, getattr(torch, dtype), generator) for key, shape in shapes.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _shards(model: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """For each shard the shapes of its weights, by name: first embedding, last norm and head, then one shard per layer."""
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

    mean = 1 if len(shape) == 1 else 0  # only norms have one dimension
    return torch.empty(shape, dtype=dtype).normal_(mean, STD, generator=generator)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/read_ahead.py <<'END_OF_FTGEN_FILE' || return
"""Read the checkpoint into the page cache while NeMo is imported, so that loading it is faster.

In: a folder. Out: a thread that reads the folder's files.

The training does not depend on it: the thread stops at the first error, and does not start if the files need more
than half of the available memory.
"""

import contextlib
import os
import threading
from pathlib import Path

PIECE = 16 << 20  # bytes


def begin(folder: Path) -> threading.Thread | None:
    """Start the thread. None on ranks other than the first of a node, and if the files are too large."""
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
    """Read the files. Plain reads release the GIL; a shared file system may ignore posix_fadvise."""
    buffer = bytearray(PIECE)
    with contextlib.suppress(OSError):
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def _free() -> int:
    """Available memory in bytes; 0 if the system does not report it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
END_OF_FTGEN_FILE
    cat >"$1"/sft_fp8_8.py <<'END_OF_FTGEN_FILE' || return
#!/usr/bin/env python3
"""sft_nemo_llama3_8b_fp8_8: the program that each task of the job runs.

In: the plan below and one command. Out: an exit code.

Written by ftgen 0.1.0 from sft_fp8_8.toml. The job's script runs it. To run it by hand:

    STAGE_PATH=/shared/folder python3 sft_fp8_8.py COMMAND

    check      print an error for each thing that is missing
    packages   check only the packages of this Python
    missing    print what a job would have to download; exit code 0 if nothing is missing, 1 if something is
    download   download the weights and the data, where there is a network; needs only huggingface_hub
    converted  exit code 0 if the converted checkpoint exists, 1 if not
    convert    download the weights and the data, and convert the weights to the engine's format, unless that is done
    verify     read every byte of the converted checkpoint; if a byte has changed, rename the checkpoint
    finetune   train; start one process per GPU, with RANK, LOCAL_RANK and WORLD_SIZE (or Slurm's own variables)
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
  "spec_sha256": "bae07fbec50a7d93e252755d1a15f42e5636549c1f3e0421e94d63ef0f537871",
  "point": {},
  "overrides": {},
  "engine": "nemo",
  "scheme": "sft",
  "precision": "fp8",
  "fp8_scaling": "delayed",
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


def main(command: str) -> int:
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
