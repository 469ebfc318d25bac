#!/usr/bin/env bash
# sft_nemo_llama3_8b_bf16_16: SFT BF16 fine-tuning of llama3_8b on 2 nodes of 8 h100
# Written by ftgen 0.1.0 from sft_bf16_16.toml (sha256 1f47c190f46d23839e3481051aab389c0307d7c3f9d6aa2ea7bb35519d6754fb).
# Do not change this file: change the spec and compile it again.
#
#   sbatch sft_bf16_16.sh           on a Slurm cluster; if you name several scripts, they run one after the other
#   bash sft_bf16_16.sh             on this machine
#   bash sft_bf16_16.sh --download  only download weights and data, where there is a network: needs Python 3.10 and huggingface_hub
#   bash sft_bf16_16.sh --data      only prepare the training data, and show its counts and an example; needs no GPU
#   bash sft_bf16_16.sh --unpack F  only write the entrypoint and the runtime files into folder F
#   bash sft_bf16_16.sh --export D  export a checkpoint to Hugging Face format; D: a run directory or a checkpoint, or nothing
#
# Reads: STAGE_PATH (folder of checkpoint, data and logs; default: the folder where you submit),
# HF_TOKEN (or the token file of huggingface_hub) if the model is gated, FTGEN_PYTHON (replaces the plan's interpreter),
# FTGEN_QUIET_S (seconds without output after which the log says where the job waits; default: 600).
#
#SBATCH --job-name=ftgen_llama3_8b
#SBATCH --dependency=singleton
#SBATCH --comment=sft_nemo_llama3_8b_bf16_16
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --mem=0
#SBATCH --output=sbatch_sft_nemo_llama3_8b_bf16_16_%j.out
#SBATCH --open-mode=append
#SBATCH --exclusive

# shellcheck disable=SC2016 # values from the spec are literal: bash expands nothing in them
set -euo pipefail

readonly name=sft_bf16_16
readonly experiment=sft_nemo_llama3_8b_bf16_16
readonly nodes=2 tasks_per_node=8 tasks=16
# Variables that this script sets. A job that it submits must not inherit them.
readonly ours=(STAGE_PATH FTGEN_RUN_DIR FTGEN_SCRIPT_SHA256 FTGEN_ENVIRONMENT HF_TOKEN_PATH FTGEN_HUB_CACHE MASTER_ADDR MASTER_PORT FTGEN_MASTER_ADDR FTGEN_MASTER_PORT PYTHONUNBUFFERED NCCL_NVLS_ENABLE NVTE_ASYNC_AMAX_REDUCTION NVTE_DP_AMAX_REDUCE_INTERVAL NVTE_FLASH_ATTN NVTE_FUSED_ATTN TOKENIZERS_PARALLELISM TORCH_NCCL_AVOID_RECORD_STREAMS)

main() {
    local mode=finetune given=()
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
        --data)
            show_data
            return
            ;;
        --convert)
            mode=convert
            shift
            ;;
        --export)
            mode="export"
            shift
            if (($#)); then
                [[ -d $1 ]] || die "--export: there is no folder $1" "give the directory of a run or of a checkpoint"
                given=("$(cd "$1" && pwd)")
                shift
            fi
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
    if [[ $mode == export ]]; then
        run_once export "${given[@]}"
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
SBATCH_OUTPUT sbatch_sft_nemo_llama3_8b_bf16_16_%j.out
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
        # sbatch refuses two ways to ask for memory: if the header has another one, Slurm filled this field
        if [[ $mine == --mem* ]]; then continue; fi
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

# A path, with %j in place of the number of this job.
with_job_id() { sed -E "s/(^|[^0-9])$SLURM_JOB_ID([^0-9]|$)/\1%j\2/g" <<<"$1"; }

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
        StdOut | StdErr) # %j was expanded; a folder may have the same number as this job
            local file=${got##*/}
            got=${got%"$file"}
            if [[ $(with_job_id "$file") == "$file" ]]; then got=$(with_job_id "$got"); fi
            got=$got$(with_job_id "$file")
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

# Sets STAGE_PATH.
find_stage_path() {
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
}

# Sets STAGE_PATH and, below it, the recipe's layout: logs/experiments/<experiment>/<experiment>_<id>/<experiment>/log-….out
find_places() {
    local id=${SLURM_JOB_ID:-} runs
    find_stage_path
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
    # a sealed run tells by it which script ran; Slurm runs a copy of the script
    if [[ -r $0 ]]; then read -r FTGEN_SCRIPT_SHA256 _ < <(sha256sum <"$0"); fi
    export FTGEN_SCRIPT_SHA256=${FTGEN_SCRIPT_SHA256:-}
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
    if [[ $1 != finetune ]]; then kind=$1; fi
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
    local ended=$1
    say "exit status $ended" || true # the disk may be full
    if [[ -n ${SLURM_JOB_ID:-} && -n ${opened:-} ]]; then report "$ended" >&3; fi
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
    if [[ -z ${stopping:-} ]]; then wait "$1" || status=$?; fi
    # Slurm signals every process of a job: the child can end by it before this shell has its own signal
    if ((status > 128)) && [[ -z ${stopping:-} && -n ${SLURM_JOB_ID:-} ]]; then sleep 2 || true; fi
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
    if [[ -z ${opened:-} ]]; then return 0; fi # a download has no log, and shows its own progress
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
    elif [[ $1 == finetune ]] && ((nodes > 1)); then
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
    local script status=0 doing=download
    code=$(mktemp -d)
    exec 3>/dev/null # there is no Slurm's output file beside this one
    trap 'rm -rf "$code"' EXIT
    trap 'stop 143 "SIGTERM: the same command continues the download"' TERM
    trap 'stop 130 "interrupted: the same command continues the download"' INT
    find_stage_path
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

# run_once COMMAND [ARGUMENT]: runs a command of the entrypoint in one task.
run_once() {
    doing=$1
    await "${python[@]}" "$code/$name.py" "$@"
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
    # a signal to this script ends `wait` too; wait_for then ends the tasks
    if ((status)) && [[ -z ${stopping:-} ]]; then kill "${children[@]}" 2>/dev/null || true; fi
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

# Runs the command `data` of the entrypoint, without a run directory and without a log.
show_data() {
    exec 3>/dev/null # there is no Slurm's output file beside this one
    find_stage_path
    find_hub
    code=$(mktemp -d "$STAGE_PATH/.data-XXXXXX")
    trap 'rm -rf "$code"' EXIT
    trap 'stop 143 "SIGTERM"' TERM
    trap 'stop 130 "interrupted"' INT
    unpack "$code"
    load_environment data
    find_python
    run_once data
}

# unpack FOLDER: writes the entrypoint and the runtime files.
unpack() {
    mkdir -p "$1"/runtime || return
    mkdir -p "$1"/runtime/data || return
    mkdir -p "$1"/runtime/engines || return
    mkdir -p "$1"/runtime/engines/nemo || return
    mkdir -p "$1"/runtime/engines/nemo/optimizations || return
    mkdir -p "$1"/runtime/export || return
    mkdir -p "$1"/runtime/guard || return
    mkdir -p "$1"/runtime/hub || return
    mkdir -p "$1"/runtime/job || return
    mkdir -p "$1"/runtime/node || return
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
from runtime.data import held_out, hf, lines, split
from runtime.engines import installed, trackers
from runtime.guard import checkpoints, publish
from runtime.hub import errors, find
from runtime.hub.token import has_token
from runtime.job.errors import JobError
from runtime.job.progress import say
from runtime.weights import checkpoint

Plan = dict[str, Any]
IMAGES = ("container", "apptainer", "singularity")  # kinds of Python in which nothing can be installed
TESTED = (2, 7)  # NeMo's earliest release with which fine-tunes that deliver a model were tested
DRIVER = Path("/proc/driver/nvidia/gpus")


def check(plan: Plan) -> int:
    """Exit code 0 if the job can start. Otherwise 1, and on stderr an error and a hint for each thing that is missing."""
    say("packages: " + engines.module(plan, "packages").found())
    problems = [
        *_stage_path(),
        *_packages(plan),
        *_of_nemo(plan),
        *_trackers(plan),
        *_weights(plan),
        *_data(plan),
        *_hub(plan),
        *_checkpoints(plan),
        *_gpus(plan),
    ]
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


def _of_nemo(plan: Plan) -> Iterator[JobError]:
    """What only NeMo from a release on does right."""
    if plan["engine"] != "nemo":
        return
    place = installed.folder("nemo")
    yield from _release(plan, installed.release(place) if place else "")


def _trackers(plan: Plan) -> Iterator[JobError]:
    for name, package in trackers.missing(plan):
        install = f"pip install {package} for {sys.executable}"
        if plan["python"]["kind"] in IMAGES:
            install = f"use an image that has {package}"
        yield JobError(
            f"log.{name}: the package {package} is not installed", f"{install}, or remove log.{name} from the spec"
        )


def _release(plan: Plan, number: str) -> Iterator[JobError]:
    """What an earlier NeMo would do in another way, or not at all: ftgen then might train on other data without a word."""
    asked = [f"[{name}]" for name in ("save", "validation", "export", "log") if plan.get(name)]
    asked += [] if split.is_recipes(plan) else ["data that ftgen packs and orders"]
    parts = tuple(map(int, re.findall(r"\d+", number)[:2]))
    if asked and parts and parts < TESTED:
        hint = f"use NeMo {'.'.join(map(str, TESTED))}, or remove from the spec what needs it"
        yield JobError(f"not tested with NeMo {number}: {', '.join(asked)}", hint)


def _hint(plan: Plan, extra: str) -> str:
    """What to do about packages. Nothing can be installed in an image that is read-only."""
    kind = plan["python"]["kind"]
    if kind in IMAGES:
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
    if plan["data"]["path"]:
        try:
            hf.user_path(plan) if plan["data"]["kind"] == "hf" else lines.user_file(plan)
        except JobError as problem:
            yield problem
            return
    try:
        held_out.check(plan)
    except JobError as problem:
        yield problem


def _checkpoints(plan: Plan) -> Iterator[JobError]:
    """Room for the checkpoints that the run keeps and one more; those that it has already need no more room."""
    save = plan.get("save")
    if not save or not os.environ.get("STAGE_PATH"):
        return
    folder = checkpoints.folder_of_run()
    there = sum(path.stat().st_size for path in folder.glob(f"{checkpoints.PREFIX}*/**/*") if path.is_file())
    place = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    try:
        count = save["keep"] + 1
        publish.require_space(
            place, count * save["checkpoint_bytes"] - there, f"room for {count} checkpoints (save.keep + 1)"
        )
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
    cat >"$1"/runtime/data/bins.py <<'END_OF_FTGEN_FILE' || return
"""Pack examples into sequences of one length, with little padding: best fit, the longest example first.

In: the lengths of the examples. Out: the packs, as lists of example numbers.
"""

import random
from collections import defaultdict


def pack(lengths: list[int], size: int, seed: int) -> list[list[int]]:
    """Packs of at most `size` tokens. `seed` decides the order of examples of the same length. No length exceeds `size`.

    The pack with the least room that is enough takes the next example. `rooms` has a bit for each room that some pack
    has, so the search takes the same time for any number of packs.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)  # noqa: S311
    order.sort(key=lambda number: -lengths[number])
    packs: list[list[int]] = []
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    rooms = 0
    for number in order:
        enough = rooms >> lengths[number] << lengths[number]
        if enough:
            room = (enough & -enough).bit_length() - 1
            chosen = by_room[room].pop()
            rooms ^= 0 if by_room[room] else 1 << room
        else:
            room, chosen = size, len(packs)
            packs.append([])
        packs[chosen].append(number)
        by_room[room - lengths[number]].append(chosen)
        rooms |= 1 << (room - lengths[number])
    return packs
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/chat.py <<'END_OF_FTGEN_FILE' || return
"""Read the user's own conversations from a JSONL file, one {"messages": [...]} per line.

In: a plan with data.path. Out: training.jsonl and validation.jsonl.
"""

from pathlib import Path
from typing import Any

from runtime.data import lines
from runtime.data.conversation import conversation
from runtime.data.lines import Example
from runtime.data.split import split
from runtime.guard.manifest import sha256_of

Plan = dict[str, Any]
HINT = 'each line is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'


def identity(plan: Plan) -> dict[str, Any]:
    """What identifies the conversations: the hash of the file."""
    return {"sha256": sha256_of(lines.user_file(plan))}


def write(plan: Plan, folder: Path) -> None:
    """Write the conversations of the file, split into training and validation. JobError: faulty lines."""
    split(read_jsonl(lines.user_file(plan)), plan["seed"], folder)


def read_jsonl(path: Path) -> list[Example]:
    """The conversations of a file. JobError: the first faulty lines, with their line numbers."""
    return lines.read(path, conversation, HINT)


def place(plan: Plan, example: Example) -> str:
    """Where the conversation is, as file:line."""
    return f"{lines.user_file(plan)}:{example[lines.LINE]}"
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/chat_template.py <<'END_OF_FTGEN_FILE' || return
"""Render a conversation with a chat template, and find the text that the loss counts.

In: a Hugging Face tokenizer and a checked conversation. Out: the text, and the spans of the assistant's messages.

The span of a message is found by rendering: it begins where the text of all messages before it ends, with the
template's prompt for an answer, and ends where the text with the message ends. This needs no {% generation %} tag in the
template. Llama-3's own template has none, and then NeMo 2.7.3 would train on every token (found with
`create_sft_dataset(chat=True)`: 231 of 231 tokens).
"""

from typing import Any, NamedTuple

from runtime.data.conversation import is_trained
from runtime.data.lines import Example, FaultError
from runtime.job.errors import JobError


class Rendered(NamedTuple):
    """A conversation as text."""

    text: str
    spans: list[tuple[int, int]]  # characters that the loss counts: first, and one after the last


class ChatTemplate:
    """The chat template of a tokenizer, or the one that the plan carries."""

    def __init__(self, tokenizer: Any, text: str | None) -> None:
        """`text` replaces the tokenizer's own template. JobError: there is no template."""
        if not text and not tokenizer.chat_template:
            raise JobError(
                "the tokenizer of this model has no chat template",
                'set data.chat_template = "file.jinja" in the spec, or choose an Instruct model',
            )
        self.tokenizer, self.text = tokenizer, text

    def render(self, conversation: Example) -> Rendered:
        """The text of a conversation. FaultError: the template refuses it, or gives a text that has no clear spans."""
        messages, tools = conversation["messages"], conversation.get("tools")
        self._require_support(messages, tools)
        whole = self._render(messages, tools)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                span = self._span(messages, number, tools, whole)
                spans += [span] if is_trained(message) else []
        return Rendered(whole, spans)

    def _span(self, messages: list[Any], number: int, tools: Any, whole: str) -> tuple[int, int]:
        last = number + 1 == len(messages)
        through = whole if last else self._render(messages[: number + 1], tools)
        if not whole.startswith(through):
            raise FaultError(
                f"the chat template gives messages 1 to {number + 1} another text when more messages follow, "
                "so the assistant's part cannot be told"
            )
        before = self._render(messages[:number], tools, prompt=True)
        if not through.startswith(before):
            raise FaultError(
                f"the chat template begins message {number + 1} (assistant) with another text than its prompt for an answer"
            )
        return len(before), len(through)

    def _render(self, messages: list[Any], tools: Any, *, prompt: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self.text, add_generation_prompt=prompt, tokenize=False
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise FaultError(f"the chat template refuses it: {error}") from error
        return str(text)

    def _require_support(self, messages: list[Any], tools: Any) -> None:
        """FaultError if the template would leave out a part of the conversation without a word."""
        source = self.tokenizer.get_chat_template(self.text, tools=tools)
        needs = {
            "tools": bool(tools),
            "tool_calls": any("tool_calls" in message for message in messages),
            "tool": any(message["role"] == "tool" for message in messages),
        }
        for word, needed in needs.items():
            if needed and word not in source:
                what = 'messages of the role "tool"' if word == "tool" else f'"{word}"'
                raise FaultError(f"has {what}, but the chat template has no place for them")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/conversation.py <<'END_OF_FTGEN_FILE' || return
"""Check one conversation and bring it into the form that chat templates expect.

In: an object with "messages" (role, content) or "conversations" (from, value). Out: {"messages": [...]}, with "tools"
if there are tools.

Accepted beside plain text: content as a list of parts {"type": "text", "text"}, tool calls and tools whose JSON is a
text, and null values, which data sets with columns have. "weight": 0 in an assistant's message takes it out of the
loss, as in OpenAI's format.
"""

import json
from typing import Any

from runtime.data.lines import Example, FaultError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
OTHER_NAMES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # of roles, in "conversations"


def conversation(document: Example) -> Example:
    """The checked conversation. FaultError: it cannot be trained on."""
    key, messages = _messages(document)
    if not messages:
        raise FaultError(f'"{key}" has no messages')
    checked = [_message(message, f"message {number}") for number, message in enumerate(messages, 1)]
    if checked[0]["role"] == "assistant":
        raise FaultError("message 1 is the assistant's: it must answer a message")
    if not any(is_trained(message) for message in checked):
        raise FaultError("no message of the assistant has text, so no token would be trained")
    tools = _tools(document.get("tools"))
    return {"messages": checked} | ({"tools": tools} if tools else {})


def is_trained(message: Message) -> bool:
    """Whether the loss counts this message."""
    said = message["role"] == "assistant" and (message["content"] or message.get("tool_calls"))
    return bool(said) and message.get("weight", 1) != 0


def _messages(document: Example) -> tuple[str, list[Any]]:
    """The key of the messages, and the messages with role and content."""
    given = [key for key in ("messages", "conversations") if document.get(key) is not None]
    if len(given) != 1:
        found = "has both" if given else "has neither"
        raise FaultError(f'must have "messages" or "conversations", {found}')
    messages = document[given[0]]
    if not isinstance(messages, list):
        raise FaultError(f'"{given[0]}" is not a list')
    if given[0] == "messages":
        return given[0], messages
    system = document.get("system")
    first = [{"from": "system", "value": system}] if system else []
    return given[0], [_from_value(message) for message in [*first, *messages]]


def _from_value(message: Any) -> Any:
    if not isinstance(message, dict) or "from" not in message or "value" not in message:
        return message
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return rest | {"role": message["from"], "content": message["value"]}


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise FaultError(f"{where} is not an object")
    checked = {key: value for key, value in message.items() if value is not None}
    checked["role"] = role = _role(message.get("role"), where)
    if checked.get("weight", 1) not in (0, 1):
        raise FaultError(f"{where} ({role}): weight must be 0 or 1, found {checked['weight']!r}")
    calls = checked.pop("tool_calls", None)
    if calls:
        checked["tool_calls"] = _calls(calls, f"{where} ({role})")
    checked["content"] = _content(message.get("content"), f"{where} ({role})", optional=bool(calls))
    return checked


def _role(given: Any, where: str) -> str:
    if not isinstance(given, str):
        raise FaultError(f"{where} has no role")
    role = OTHER_NAMES.get(given.lower(), given.lower())
    if role not in ROLES:
        raise FaultError(f"{where} has the unknown role {given!r}: must be {', '.join(ROLES)}")
    return role


def _content(content: Any, where: str, *, optional: bool) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise FaultError(f"{where} has no content")
    return content


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise FaultError(f"{where} has content that is not text")
    return text


def _calls(calls: Any, where: str) -> list[Any]:
    """Tool calls whose arguments are objects. In OpenAI's format they are a text, which templates would quote again."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise FaultError(f"{where}: tool_calls is not a list of objects")
    return [_call(call, where) for call in calls]


def _call(call: dict[str, Any], where: str) -> dict[str, Any]:
    if isinstance(call.get("function"), dict):
        return call | {"function": _call(call["function"], where)}
    if not isinstance(call.get("arguments"), str):
        return call
    return call | {"arguments": _json(call["arguments"], f"{where}: arguments of a tool call")}


def _tools(tools: Any) -> list[Any]:
    if isinstance(tools, str):
        tools = _json(tools, '"tools"') if tools.strip() else None
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise FaultError('"tools" is not a list of objects')
    return tools or []


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FaultError(f"{where}: not JSON: {error}") from None
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/held_out.py <<'END_OF_FTGEN_FILE' || return
"""Hold examples out of the training, for the validation.

In: a plan, and a folder with training.jsonl and validation.jsonl as its kind of data has split them. Out: the same
folder, split as plan["validation"] asks; the number of held-out sequences.

Without plan["validation"], and with its default fraction, the split stays as it is. With a file, the training gets all
examples of the data.
"""

import json
from pathlib import Path
from typing import Any

from runtime.data import chat, jsonl, lines, report
from runtime.data.conversation import conversation
from runtime.data.lines import Example
from runtime.data.split import VALIDATION, split
from runtime.guard.manifest import sha256_of
from runtime.job.errors import JobError

Plan = dict[str, Any]


def identity(plan: Plan) -> dict[str, Any]:
    """What identifies the split, if it is not the default: the fraction, or the hash of the file."""
    asked = plan.get("validation")
    if not asked or asked["fraction"] == VALIDATION:
        return {}
    file = file_of(plan)
    return {"validation": {"sha256": sha256_of(file)} if file else {"fraction": asked["fraction"]}}


def apply(plan: Plan, folder: Path) -> None:
    """Split the examples of the folder again. JobError: the file has faulty lines."""
    if not identity(plan):
        return
    asked = plan["validation"]
    names = ("training", "validation")
    examples = [json.loads(line) for name in names for line in (folder / f"{name}.jsonl").open()]
    if not asked["file"]:
        split(examples, plan["seed"], folder, asked["fraction"])
        return
    for name, found in zip(names, (examples, _read(plan, user_file(plan))), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in found))


def user_file(plan: Plan) -> Path:
    """Path of validation.file; a relative path is below STAGE_PATH. JobError: the file cannot be read."""
    return lines.readable("validation.file", plan["validation"]["file"])


def file_of(plan: Plan) -> Path | None:
    """The same, or None if the plan has no such file."""
    return user_file(plan) if plan.get("validation") and plan["validation"]["file"] else None


def _read(plan: Plan, path: Path) -> list[Example]:
    """The examples of a file: conversations for kind "chat", either for "hf", inputs and outputs for all others."""
    if plan["data"]["kind"] == "chat":
        return chat.read_jsonl(path)
    if plan["data"]["kind"] == "hf":
        return lines.read(path, _either, f"{jsonl.HINT}, or with messages: {chat.HINT}")
    return jsonl.read_jsonl(path)


def _either(document: Example) -> Example:
    return conversation(document) if {"messages", "conversations"} & document.keys() else jsonl.pair(document)


def refuse_too_few(plan: Plan, examples: Path, tokens: Path, packed: Path | None) -> None:
    """JobError if the held-out set does not fill one global batch: the engine would validate on nothing, and not say so."""
    if not plan.get("validation"):
        return
    refuse_fewer(*sequences(plan, examples, tokens, packed), plan)


def sequences(plan: Plan, examples: Path, tokens: Path, packed: Path | None) -> tuple[int, str]:
    """The number of held-out sequences, and whether they are packs or examples."""
    if packed:
        return _packs(packed), "packs"
    if plan["data"]["order"] == "recipe":
        return _lines(examples / "validation.jsonl"), "examples"
    return report.samples_of(report.read(tokens)["validation"])


def refuse_fewer(count: int, what: str, plan: Plan) -> None:
    """JobError if this many held-out sequences do not fill a global batch."""
    if count < plan["global_batch_size"]:
        more = "add examples to validation.file" if plan["validation"]["file"] else "increase validation.fraction"
        raise JobError(
            f"validation: the held-out data has {count} {what}, but a global batch has {plan['global_batch_size']}",
            f"{more}, or reduce global_batch_size",
        )


def check(plan: Plan) -> None:
    """JobError if it is clear before the training that the held-out examples are too few, or cannot be read.

    Packing makes fewer sequences than examples. The training counts them.
    """
    asked = plan.get("validation")
    if not asked:
        return
    if asked["file"]:
        refuse_fewer(_lines(user_file(plan)), "examples", plan)
    elif plan["data"]["kind"] in ("jsonl", "chat"):
        refuse_fewer(max(1, round(_lines(lines.user_file(plan)) * asked["fraction"])), "examples", plan)


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


def _packs(folder: Path) -> int:
    """The number of held-out packs of an engine: NeMo's are in a .npy file, Megatron-Bridge's in a parquet file."""
    if (file := folder / "validation.idx.parquet").is_file():
        from pyarrow import parquet

        return int(parquet.read_metadata(file).num_rows)
    return _rows(folder / "validation.npy")


def _rows(path: Path) -> int:
    """Number of rows of a .npy file, from its header."""
    from numpy.lib import format as npy

    with path.open("rb") as file:
        version: tuple[int, int] = npy.read_magic(file)  # type: ignore[no-untyped-call]
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return int(read(file)[0][0])  # type: ignore[no-untyped-call]
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/hf.py <<'END_OF_FTGEN_FILE' || return
"""Read a dataset of the Hugging Face hub, or of a local file or folder, with the package `datasets`.

In: a plan with data.dataset (name on the hub, at the commit data.revision) or data.path. Out: training.jsonl and
validation.jsonl.

A local folder is one that `save_to_disk` wrote, or one with files that `load_dataset` reads (parquet, arrow, JSON). From
the hub, the same files are downloaded. The code of a dataset is never run.
"""

import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

from runtime.data import lines
from runtime.data.conversation import conversation
from runtime.data.lines import LINE, Example, FaultError
from runtime.data.split import split
from runtime.guard import manifest
from runtime.guard.manifest import sha256_of
from runtime.hub.fetch import fetch
from runtime.hub.repository import Repository
from runtime.job.errors import JobError

Plan = dict[str, Any]
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}  # of one file, by its suffix
DEPTH = 4  # folders above a file in a dataset of the hub
NAMES = ("*.parquet", "*.arrow", "*.json", "*.jsonl")
# README.md names the configurations and their files.
FILES = ("README.md", *("*/" * depth + name for depth in range(DEPTH + 1) for name in NAMES))
HINT = "correct these rows, or set data.columns"


def identity(plan: Plan) -> dict[str, Any]:
    """What identifies the examples: the commit, or the hash of the local files; and what is read of them."""
    data = plan["data"]
    read = {key: data[key] for key in ("config", "split", "columns")}
    if data["dataset"]:
        return read | {"dataset": data["dataset"], "revision": data["revision"]}
    return read | {"sha256": _sha256(user_path(plan))}


def write(plan: Plan, folder: Path) -> None:
    """Download or read the rows, and write them as examples. JobError: faulty rows, no such dataset, no network."""
    cache = folder / "cache"
    downloaded = [fetch(one, plan["name"]) for one in repositories(plan)]
    files = _without_manifest(downloaded[0], cache / "files") if downloaded else user_path(plan)
    try:
        table = _read(plan, files, cache)
    except (KeyError, ValueError) as error:
        reason = f"no split {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise JobError(f"{_name(plan)}: {reason}", "correct data.config or data.split") from error
    examples = _examples(plan, table)
    split(examples, plan["seed"], folder)
    shutil.rmtree(cache, ignore_errors=True)


def repositories(plan: Plan) -> list[Repository]:
    """What `write` reads from the hub: the files of the dataset at its commit."""
    data = plan["data"]
    return [Repository(data["dataset"], "dataset", data["revision"], FILES, ())] if data["dataset"] else []


def _without_manifest(folder: Path, links: Path) -> Path:
    """A folder with links to the files of a downloaded one: `datasets` would read the guard's manifest.json as data."""
    for file in folder.rglob("*"):
        if file.is_file() and file != folder / manifest.NAME:
            link = links / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file)
    return links


def place(plan: Plan, example: Example) -> str:
    """Where the example is: the dataset and the row, from 0."""
    return f"{_name(plan)} row {example[LINE]}"


def user_path(plan: Plan) -> Path:
    """Path of a local dataset; a relative data.path is below STAGE_PATH. JobError: there is nothing."""
    path = lines.below_stage_path("data.path", plan["data"]["path"])
    if not path.exists() or not os.access(path, os.R_OK):
        raise JobError(f"data.path: {path} does not exist or cannot be read", "give a path that every node can read")
    return path


def _read(plan: Plan, path: Path, cache: Path) -> Any:
    """The rows of the plan's split. KeyError, ValueError: there is no such split or configuration."""
    import datasets

    config, wanted = plan["data"]["config"], plan["data"]["split"]
    datasets.disable_progress_bars()
    if (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    if (path / "dataset_dict.json").exists():
        return datasets.load_from_disk(str(path))[wanted]
    if path.is_dir():
        return datasets.load_dataset(str(path), config, split=wanted, cache_dir=str(cache))
    if path.suffix not in READERS:
        raise JobError(f"data.path: {path}: is no file of a dataset", f"use a folder, or a file *{', *'.join(READERS)}")
    return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", cache_dir=str(cache))


def _examples(plan: Plan, table: Any) -> list[Example]:
    columns = _columns(plan, table.column_names)
    examples, faults = [], []
    for number, row in enumerate(table.select_columns(list(columns.values()))):
        try:
            examples.append(_example({key: row[name] for key, name in columns.items()}) | {LINE: number})
        except FaultError as fault:
            faults.append(f"{_name(plan)} row {number}: {fault}")
    lines.refuse(faults, HINT)
    lines.require_two(examples, _name(plan))
    return examples


def _columns(plan: Plan, there: list[str]) -> dict[str, str]:
    """The columns to read, by what they are: messages, tools, system, prompt, completion."""
    asked = {key: name for key, name in plan["data"]["columns"].items() if name}
    if missing := [name for name in asked.values() if name not in there]:
        raise JobError(f"data.columns: {_name(plan)} has no column {missing[0]}", f"its columns are {', '.join(there)}")
    if not asked.keys() - {"tools"}:
        known = ({"messages": "messages"}, {"messages": "conversations"}, {"prompt": "prompt", "completion": "completion"})
        found = next((choice for choice in known if set(choice.values()) <= set(there)), None)
        if not found:
            rule = f"{_name(plan)} has neither messages nor prompt and completion, but the columns {', '.join(there)}"
            raise JobError(rule, "set data.columns.messages, or data.columns.prompt and data.columns.completion")
        asked = found | asked
    if "messages" in asked:
        asked = {key: key for key in ("tools", "system") if key in there} | asked
    return asked


def _example(row: dict[str, Any]) -> Example:
    if "prompt" in row:
        for key in ("prompt", "completion"):
            if not isinstance(row[key], str) or not row[key].strip():
                raise FaultError(f"the {key} has no text")
        return {"input": row["prompt"], "output": row["completion"]}
    messages = row.pop("messages")
    from_value = isinstance(messages, list) and any(isinstance(one, dict) and "from" in one for one in messages)
    return conversation(row | {"conversations" if from_value else "messages": messages})


def _name(plan: Plan) -> str:
    data = plan["data"]
    return f"{data['dataset'] or data['path']} ({data['split']})"


def _sha256(path: Path) -> str:
    """Hash of a file, or of the names and contents of a folder's files."""
    if path.is_file():
        return sha256_of(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith((".", "cache-")))
    return sha256("".join(f"{file.relative_to(path)} {sha256_of(file)}\n" for file in files).encode()).hexdigest()
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/jsonl.py <<'END_OF_FTGEN_FILE' || return
"""Read the user's own examples from a JSONL file, one {"input", "output"} per line.

In: a plan with data.path. Out: training.jsonl and validation.jsonl.
"""

from pathlib import Path
from typing import Any

from runtime.data import lines
from runtime.data.lines import Example, FaultError
from runtime.data.split import split
from runtime.guard.manifest import sha256_of

Plan = dict[str, Any]
HINT = 'each line is {"input": "...", "output": "..."}'


def identity(plan: Plan) -> dict[str, Any]:
    """What identifies the examples: the hash of the file."""
    return {"sha256": sha256_of(lines.user_file(plan)), "format": 2}  # since format 2, an example has its line


def write(plan: Plan, folder: Path) -> None:
    """Write the examples of the file, split into training and validation."""
    split(read_jsonl(lines.user_file(plan)), plan["seed"], folder)


def place(plan: Plan, example: Example) -> str:
    """Where the example is, as file:line."""
    return f"{lines.user_file(plan)}:{example[lines.LINE]}"


def read_jsonl(path: Path) -> list[Example]:
    """The examples of a file. JobError: the first faulty lines, with their line numbers."""
    return lines.read(path, pair, HINT)


def pair(document: Example) -> Example:
    """The input and output of an example. FaultError: one has no text."""
    for key in ("input", "output"):
        if not isinstance(document.get(key), str) or not document[key].strip():
            raise FaultError(f'"{key}" has no text')
    return {key: document[key] for key in ("input", "output")}
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/lines.py <<'END_OF_FTGEN_FILE' || return
"""Read a JSONL file, one JSON object a line, and collect what is wrong with each line.

In: a file, and a function that checks one object. Out: the examples, each with the number of its line, or a JobError
that names the first faulty lines.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.job import variables
from runtime.job.errors import JobError

Example = dict[str, Any]
LINE = "line"  # key of an example: its line in the user's file, from 1
SHOWN = 5  # number of faults that an error shows


class FaultError(Exception):
    """What is wrong with one example. The text does not say where the example is."""


def user_file(plan: dict[str, Any]) -> Path:
    """Path of the file; a relative data.path is below STAGE_PATH. JobError: the file cannot be read."""
    return readable("data.path", plan["data"]["path"])


def readable(key: str, name: str) -> Path:
    """Path of the file that a key of the spec names. JobError: the file cannot be read."""
    path = below_stage_path(key, name)
    if not path.is_file() or not os.access(path, os.R_OK):
        raise JobError(
            f"{key}: the file {path} does not exist or cannot be read",
            "give the path of a file that every node can read",
        )
    return path


def below_stage_path(key: str, name: str) -> Path:
    """The path that a key names, with the values of its variables; a relative path is below STAGE_PATH."""
    return Path(os.environ.get("STAGE_PATH") or Path.cwd(), variables.path_with_values(key, name))


def read(path: Path, check: Callable[[Example], Example], hint: str) -> list[Example]:
    """The examples of a file, as `check` returns them. JobError: the first faulty lines, or fewer than two examples."""
    examples, faults = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    examples.append(check(_document(line, first=number == 1)) | {LINE: number})
                except FaultError as fault:
                    faults.append(f"{path}:{number}: {fault}")
    refuse(faults, hint)
    require_two(examples, str(path))
    return examples


def refuse(faults: list[str], hint: str) -> None:
    """JobError with the first faults, if there are any."""
    if faults:
        more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise JobError("; ".join(faults[:SHOWN]) + more, hint)


def require_two(examples: list[Example], where: str) -> None:
    """JobError unless there are two examples."""
    if len(examples) < 2:
        raise JobError(
            f"{where}: has {len(examples)} examples, but at least 2 are needed", "add one for training, one for validation"
        )


def _document(line: bytes, *, first: bool) -> Example:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise FaultError(f"not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}") from None
    try:
        document = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise FaultError("has half of a surrogate pair (\\ud800 to \\udfff), which is no character") from None
    except (ValueError, RecursionError) as error:
        raise FaultError(f"not JSON: {error}") from None
    if not isinstance(document, dict):
        raise FaultError("not an object")
    return document
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/order.py <<'END_OF_FTGEN_FILE' || return
"""The order of the samples in a training: real epochs, shuffled by the seed, each in another order.

In: the number of samples (examples, or packs of examples), the seed, and the place of a sample in the training, from 0.
Out: the number of the sample; a data set in this order (`InOrder`).

The order is a pure function. A training that resumes needs only the number of samples that it has consumed.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def sample(place: int, samples: int, seed: int) -> int:
    """The sample at this place of the training."""
    epoch, within = divmod(place, samples)
    return int(shuffled(epoch, samples, seed)[within])


class InOrder:
    """The samples of a training in their order, for as many samples as the training needs."""

    def __init__(self, samples: Any, count: int, seed: int) -> None:
        """`samples` is a data set with a function `collate_fn`."""
        self.samples, self.count, self.seed = samples, count, seed
        self.collate_fn = samples.collate_fn

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> dict[str, Any]:
        found: dict[str, Any] = self.samples[sample(place, len(self.samples), self.seed)]
        return found


@lru_cache(maxsize=2)
def shuffled(epoch: int, samples: int, seed: int) -> "np.ndarray[Any, Any]":
    """The order of one epoch: int64 [samples]. NumPy keeps the results of RandomState the same in all its versions."""
    import numpy as np

    return np.random.RandomState([seed, epoch]).permutation(samples)


def steps(epochs: int, samples: int, batch: int) -> int:
    """Steps of `batch` samples that give every sample `epochs` times. The last batch is filled from one more epoch."""
    return -(-epochs * samples // batch)
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

In: a plan and a tokenizer. Out: a folder with training.jsonl and validation.jsonl, one example per line, and a folder
with the tokens of these examples. If the engine reads and packs the data, as in the recipe, also a folder with its packs.

The guard publishes the folders below $STAGE_PATH/data, so ranks, nodes and jobs that start together prepare them
once. Each kind of data is a file of this package: `identity(plan)` gives what identifies its examples,
`write(plan, folder)` writes them, and `place(plan, example)` tells where the user finds an example of the user's own
data. A kind that reads the Hugging Face hub also has `repositories(plan)`. An example is {"input", "output"} or
{"messages"}; one of the user's also has "line".
"""

import json
import os
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from runtime.data import held_out, packing
from runtime.data.lines import LINE, Example
from runtime.data.split import SPLITS, is_recipes
from runtime.guard import manifest, publish
from runtime.guard.manifest import Source, sha256_of
from runtime.hub import fetch as hub
from runtime.hub.repository import Repository
from runtime.job.progress import timed

Plan = dict[str, Any]
FORMAT = 1  # version of the examples' format: part of their identity
TOKENS_FORMAT = 1  # version of the tokens' format
READ_BY_ENGINES = ("squad", "synthetic", "jsonl")  # kinds of data that the engines can read themselves


class Files(NamedTuple):
    """The folders of the data."""

    examples: Path  # training.jsonl, validation.jsonl
    tokens: Path  # arrays of store.py, report.json, metadata.json
    packed: Path | None  # of NeMo: training.npy, validation.npy, metadata.json; of Megatron-Bridge *.idx.parquet


def prepare(plan: Plan, tokenizer_folder: Path, packing: Any = packing) -> Files:
    """Prepare all that a training needs. `tokenizer_folder` has a Hugging Face tokenizer. JobError: faulty data.

    `packing` has the functions `index` and `pack` of the engine, as packing.py has NeMo's.
    """
    source = identity(plan)
    examples = _fetch(plan, source, packing)
    files = Files(examples, _tokens(plan, source, examples, tokenizer_folder), None)
    if plan["data"]["packed"] and is_recipes(plan):
        files = files._replace(packed=_packed(plan, source, examples, tokenizer_folder, packing))
    held_out.refuse_too_few(plan, *files)
    return files


def _packed(plan: Plan, source: Source, examples: Path, tokenizer_folder: Path, packing: Any) -> Path:
    """The folder of the engine's packs."""
    packed = {
        "kind": "packed examples",
        "examples": source,
        "tokenizer": sha256_of(tokenizer_folder / "tokenizer.json"),
        "seq_length": plan["seq_length"],
        "seed": plan["seed"],
    }
    if (ranks := plan["parallelism"]["context_parallel_size"]) > 1:
        packed["context_parallel_size"] = ranks  # examples are padded so that these ranks can share each
    packed_folder = _folder(f"{plan['data']['kind']}-packed-{plan['seq_length']}", packed)
    return publish.ensure(packed_folder, packed, lambda staging: packing.pack(plan, examples, tokenizer_folder, staging))


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
        hub.fetch(repository, plan["name"], into_home=True)


def fetch(plan: Plan, packing: Any = packing) -> Path:
    """The folder of the examples. This is all that may need a network. JobError: faulty data, or no network."""
    return _fetch(plan, identity(plan), packing)


def tokenize(plan: Plan, tokenizer_folder: Path, packing: Any = packing) -> Path:
    """The folder of the tokens. Needs neither NeMo nor a GPU, except to read SQuAD. JobError: faulty data."""
    source = identity(plan)
    return _tokens(plan, source, _fetch(plan, source, packing), tokenizer_folder)


def identity(plan: Plan) -> Source:
    """What identifies the examples: two plans with the same identity use the same folder."""
    kind = plan["data"]["kind"]
    own: dict[str, Any] = _module(kind).identity(plan)
    has_index = kind in READ_BY_ENGINES and plan["engine"] != "nemo"  # the index of the lines is the engine's
    engine = {"engine": plan["engine"]} if has_index else {}
    return {"kind": f"{kind} examples", "format": FORMAT, "seed": plan["seed"]} | engine | own | held_out.identity(plan)


def _fetch(plan: Plan, source: Source, packing: Any) -> Path:
    folder = _folder(plan["data"]["kind"], source)
    return publish.ensure(folder, source, lambda staging: _build(plan, staging, packing))


def _tokens(plan: Plan, examples_source: Source, examples: Path, tokenizer_folder: Path) -> Path:
    from runtime.data import tokens  # needs numpy, which a machine that only downloads may not have
    from runtime.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(tokenizer_folder, plan["data"]["chat_template"])
    source = {
        "kind": "tokens",
        "format": TOKENS_FORMAT,
        "examples": examples_source,
        "tokenizer": tokenizer.identity(),
        "seq_length": plan["seq_length"],
        **{key: plan["data"][key] for key in ("too_long", "packed", "order")},
    }
    folder = _folder(f"{plan['data']['kind']}-tokens-{plan['seq_length']}", source)

    def where(split: str, example: Example) -> str:
        if split == "validation" and (file := held_out.file_of(plan)):
            return f"{file}:{example[LINE]}"
        return str(_module(plan["data"]["kind"]).place(plan, example))

    def build(staging: Path) -> None:
        sha256 = examples_source.get("sha256") or _sha256_of_examples(examples)
        with timed("tokenizing the data"):
            tokens.build(plan, examples, tokenizer, staging, where=where, sha256=sha256)

    return publish.ensure(folder, source, build)


def _sha256_of_examples(folder: Path) -> str:
    return sha256(b"".join((folder / f"{split}.jsonl").read_bytes() for split in SPLITS)).hexdigest()


def _folder(name: str, identity: dict[str, Any]) -> Path:
    short = sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return Path(os.environ.get("STAGE_PATH") or Path.cwd(), "data", f"{name}-{short}")


def _build(plan: Plan, staging: Path, packing: Any) -> None:
    kind = plan["data"]["kind"]
    with timed(f"preparing the data: {kind}"):
        _module(kind).write(plan, staging)
        held_out.apply(plan, staging)
        if kind in READ_BY_ENGINES:
            packing.index(staging)


def _module(kind: str) -> Any:
    return import_module(f"runtime.data.{kind}")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/report.py <<'END_OF_FTGEN_FILE' || return
"""Tell what a training trains on: one line for the log, and the number of steps of an epoch.

In: a plan, and the folder of its tokens with report.json. Out: lines in the log, and the plan with its steps.
"""

import json
import os
from pathlib import Path
from typing import Any

from runtime.data import order
from runtime.data.split import SPLITS, is_recipes
from runtime.job.names import ENGINES
from runtime.job.progress import say

Plan = dict[str, Any]
Report = dict[str, Any]


def planned(plan: Plan, folder: Path) -> Plan:
    """The plan with max_steps, which the data decides if the plan has epochs. Says on rank 0 what the data is."""
    counted = read(folder)
    if os.environ.get("RANK", "0") == "0":
        print(f"ftgen data: {json.dumps(facts(plan, counted))}", flush=True)
    for text in warnings(plan, counted):
        say(f"warning: {text}")
    if plan["epochs"] is None:
        return plan
    say(epochs_text(plan, counted))
    return plan | {"max_steps": steps(plan, counted)}


def steps(plan: Plan, counted: Report) -> int:
    """Number of steps of a plan with epochs."""
    samples, _ = samples_of(counted["training"])
    return order.steps(plan["epochs"], samples, plan["global_batch_size"])


def epochs_text(plan: Plan, counted: Report) -> str:
    """The epochs of a plan as steps, and what fills the last batch."""
    samples, what = samples_of(counted["training"])
    epochs, batch = plan["epochs"], plan["global_batch_size"]
    text = f"{epochs} epoch{'s' * (epochs > 1)} of {samples} {what} are {steps(plan, counted)} steps of {batch} {what}"
    more = steps(plan, counted) * batch - epochs * samples
    return f"{text}; the last step has {more} {what} of one more epoch" if more else text


def read(folder: Path) -> Report:
    """The report: sha256 of the data, and the counts of each split."""
    counted: Report = json.loads((folder / "report.json").read_text())
    return counted


def facts(plan: Plan, counted: Report) -> dict[str, Any]:
    """What the log's line has: where the examples are, the hash of the user's data or else of the examples, the counts."""
    named = ("kind", "path", "dataset", "revision", "config", "split")
    place = {key: plan["data"][key] for key in named if plan["data"][key]}
    if plan["data"]["kind"] != "hf":
        place.pop("split")
    keys = ("examples", "tokens", "trained_tokens", "truncated", "dropped", "packs")
    counts = {split: {key: counted[split][key] for key in keys if key in counted[split]} for split in SPLITS}
    return {**place, "sha256": counted["sha256"], **counts}


def samples_of(counts: dict[str, Any]) -> tuple[int, str]:
    """The number of samples of a split, and whether they are packs or examples."""
    return (counts["packs"], "packs") if "packs" in counts else (counts["examples"], "examples")


def warnings(plan: Plan, counted: Report) -> list[str]:
    """What happened to examples that are too long, for each split."""
    found, word = [], "row" if plan["data"]["kind"] == "hf" else "line"
    for split in SPLITS:
        counts = counted[split]
        if not counts["too_long"]:
            continue
        all_examples = counts["examples"] + counts["dropped"]
        text = f"{split}: {counts['too_long']} of {all_examples} examples have more than {plan['seq_length']} tokens"
        done = f"{counts['truncated']} are truncated, {counts['dropped']} are dropped"
        if is_recipes(plan):
            done = f"{ENGINES[plan['engine']]} cuts the end of their input"
        longest = counts["longest"]
        found.append(f"{text}: {done}; the longest has {longest['tokens']} tokens ({word} {longest['line']})")
    return found
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/split.py <<'END_OF_FTGEN_FILE' || return
"""Split examples into training and validation.

In: a list of examples. Out: training.jsonl and validation.jsonl.
"""

import json
import random
from pathlib import Path
from typing import Any

SPLITS = ("training", "validation")
VALIDATION = 0.05  # fraction of all examples, the same as in NeMo's SQuAD module


def split(examples: list[dict[str, str]], seed: int, folder: Path, fraction: float = VALIDATION) -> None:
    """Write both files; `fraction` of the examples is held out. Each file keeps the order of the examples."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)  # noqa: S311
    count = max(1, round(len(examples) * fraction))
    for name, numbers in (("validation", order[:count]), ("training", order[count:])):
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(examples[number]) + "\n" for number in sorted(numbers))


def is_recipes(plan: dict[str, Any]) -> bool:
    """Whether the engine reads, packs and orders the examples, as in the recipe. Then ftgen only counts the tokens."""
    return bool(plan["data"]["order"] == "recipe")
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
    cat >"$1"/runtime/data/store.py <<'END_OF_FTGEN_FILE' || return
"""Keep tokenized examples in files that a training maps into its memory.

In: `Tokens` of the examples of one split, and packs. Out: arrays below a folder, <split>.<array>.npy; and readers of them.

All ranks of a node share the mapped pages, and none unpickles an object for each token, as NeMo's own packs need.
"""

from array import array
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from runtime.data.tokenizer import Tokens

SMALL = 1 << 20  # bytes; a smaller file is read, because an empty array cannot be mapped


class Writer:
    """Collects the examples of one split in memory, 5 bytes for each token, and writes them at the end."""

    def __init__(self) -> None:
        self.ids, self.trained, self.starts, self.places = array("i"), array("B"), array("q", [0]), array("q")

    def add(self, tokens: Tokens, place: int) -> None:
        """Add an example; `place` is its number in training.jsonl or validation.jsonl, from 0."""
        self.ids.frombytes(tokens.ids.tobytes())
        self.trained.frombytes(tokens.trained.tobytes())
        self.starts.append(len(self.ids))
        self.places.append(place)

    def write(self, folder: Path, split: str) -> "Examples":
        """Write the arrays, and return the reader."""
        arrays = {
            "ids": np.asarray(self.ids, np.int32),
            "trained": np.asarray(self.trained, np.uint8).view(bool),
            "starts": np.asarray(self.starts, np.int64),
            "places": np.asarray(self.places, np.int64),
        }
        for name, values in arrays.items():
            np.save(_file(folder, split, name), values)
        return Examples(folder, split)


class Examples:
    """The tokenized examples of one split."""

    def __init__(self, folder: Path, split: str) -> None:
        self.ids, self.trained, self.starts, self.places = (
            _load(_file(folder, split, name)) for name in ("ids", "trained", "starts", "places")
        )

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Tokens:
        begin, end = self.starts[number], self.starts[number + 1]
        return Tokens(self.ids[begin:end], self.trained[begin:end], None)

    def lengths(self) -> Any:
        """Tokens of each example: int64 [examples]."""
        return np.diff(self.starts)


def write_packs(folder: Path, split: str, packs: list[list[int]]) -> None:
    """Write the packs, which are lists of example numbers."""
    np.save(_file(folder, split, "packed"), np.fromiter(chain.from_iterable(packs), np.int64))
    np.save(_file(folder, split, "packs"), np.cumsum([0, *map(len, packs)]))


class Packs:
    """The packs of one split, in the form of NeMo's packed data set."""

    def __init__(self, folder: Path, split: str) -> None:
        self.examples = Examples(folder, split)
        self.packed, self.packs = (_load(_file(folder, split, name)) for name in ("packed", "packs"))

    def __len__(self) -> int:
        return len(self.packs) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The tokens of one pack, where each example begins, and the mask: true where the next token is trained."""
        members = [self.examples[int(one)] for one in self.packed[self.packs[number] : self.packs[number + 1]]]
        ends = np.cumsum([len(one.ids) for one in members])
        return {
            "input_ids": np.concatenate([one.ids for one in members]),
            "seq_boundaries": [0, *ends.tolist()],
            "loss_mask": np.concatenate([np.append(one.trained[1:], False) for one in members]),
        }


def _file(folder: Path, split: str, name: str) -> Path:
    return folder / f"{split}.{name}.npy"


def _load(file: Path) -> Any:
    return np.load(file, mmap_mode="r" if file.stat().st_size > SMALL else None)
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
    cat >"$1"/runtime/data/tokenizer.py <<'END_OF_FTGEN_FILE' || return
"""Turn examples into tokens, and mark the tokens that the loss counts.

In: examples ({"input", "output"} or {"messages"}) and a Hugging Face tokenizer. Out: `Tokens` for each example.

An input and an output give the same tokens as in NeMo's own data set: input, space, output, end of text. A conversation
gives the tokens of its chat template. Nothing is added to them: the template itself writes the tokens that begin and
end a text, as the model was trained.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.data.chat_template import ChatTemplate
from runtime.data.lines import Example, FaultError
from runtime.job.errors import JobError

PARALLEL = "TOKENIZERS_PARALLELISM"  # read by the library at each call; the recipe switches it off for the training


class Tokens(NamedTuple):
    """One example."""

    ids: "np.ndarray[Any, Any]"  # int32 [length]
    trained: "np.ndarray[Any, Any]"  # bool [length]: whether the loss counts the prediction of this token
    prompt: int | None  # number of tokens before the output; None for a conversation


class Tokenizer:
    """A Hugging Face tokenizer with the plan's chat template."""

    def __init__(self, folder: Path, chat_template: str | None) -> None:
        """JobError: the folder has no fast tokenizer, or the tokenizer has no token for the end of a text."""
        from transformers import AutoTokenizer

        self.own = AutoTokenizer.from_pretrained(str(folder), use_fast=True)
        if not self.own.is_fast:
            raise JobError(
                f"{folder} has no tokenizer.json", "save the tokenizer again with transformers: it writes this file"
            )
        self._chat_template = chat_template
        self._template: ChatTemplate | None = None
        # NeMo puts a space before the output, unless the tokenizer begins every text with one
        spaced = self.own.tokenize("x y") != self.own.tokenize("x") + self.own.tokenize("y")
        self._output_prefix = " " if spaced else ""

    def identity(self) -> dict[str, Any]:
        """What identifies the tokenizer. It is the same for the converted checkpoint and for the model's own files."""
        template = self._chat_template or self.own.chat_template
        parts = {"tokenizer": self.own.backend_tokenizer.to_str(), "chat_template": json.dumps(template, sort_keys=True)}
        special = {key: str(token) for key, token in self.own.special_tokens_map.items()}
        return {name: sha256(text.encode()).hexdigest() for name, text in parts.items()} | {"special_tokens": special}

    def tokens(self, examples: list[Example]) -> list[Tokens | FaultError]:
        """The tokens of each example, or what is wrong with it."""
        if not examples:
            return []
        return self._conversations(examples) if "messages" in examples[0] else self._pairs(examples)

    def text(self, ids: list[int]) -> str:
        """The text of some tokens, with special tokens."""
        return str(self.own.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _pairs(self, examples: list[Example]) -> list[Tokens | FaultError]:
        if (end := self.own.eos_token_id) is None:
            raise JobError("the tokenizer of this model has no eos_token", "add eos_token to its tokenizer_config.json")
        inputs = self._encode([example["input"].strip(" ") for example in examples])
        outputs = self._encode([self._output_prefix + example["output"].strip(" ") for example in examples])
        return [_pair(before, [*after, end]) for before, after in zip(inputs.input_ids, outputs.input_ids, strict=True)]

    def _conversations(self, examples: list[Example]) -> list[Tokens | FaultError]:
        self._template = self._template or ChatTemplate(self.own, self._chat_template)
        rendered = [_or_fault(self._template.render, example) for example in examples]
        texts = [each.text for each in rendered if not isinstance(each, FaultError)]
        encoded = self._encode(texts, return_offsets_mapping=True) if texts else None
        found: list[Tokens | FaultError] = []
        for each in rendered:
            if isinstance(each, FaultError):
                found.append(each)
            elif encoded:
                number = sum(not isinstance(one, FaultError) for one in found)
                found.append(_conversation(encoded.input_ids[number], encoded.offset_mapping[number], each.spans))
        return found

    def _encode(self, texts: list[str], **options: Any) -> Any:
        with _in_parallel():
            return self.own(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)


def _or_fault(render: Any, example: Example) -> Any:
    try:
        return render(example)
    except FaultError as fault:
        return fault


def _pair(before: list[int], after: list[int]) -> Tokens:
    trained = np.arange(len(before) + len(after)) >= len(before)
    return Tokens(np.array(before + after, np.int32), trained, len(before))


def _conversation(ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> Tokens | FaultError:
    """A token counts for the span in which its last character is. Offsets can leave out spaces at a token's beginning."""
    ends = np.array([end for _, end in offsets], np.int64)
    trained = np.zeros(len(ids), bool)
    for first, end in spans:
        trained |= (ends > first) & (ends <= end)
    if not trained[1:].any():
        return FaultError("no token would be trained")
    return Tokens(np.array(ids, np.int32), trained, None)


@contextmanager
def _in_parallel() -> Iterator[None]:
    before = os.environ.get(PARALLEL)
    os.environ[PARALLEL] = "true"
    try:
        yield
    finally:
        os.environ.pop(PARALLEL) if before is None else os.environ.__setitem__(PARALLEL, before)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/data/tokens.py <<'END_OF_FTGEN_FILE' || return
"""Tokenize the examples of a plan, handle those that are too long, pack the rest, and count everything.

In: a plan, the folder of its examples, a tokenizer. Out: a folder with the arrays of store.py for each split, report.json
with the counts, and metadata.json, which NeMo's packed data set reads.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.data import bins, lines, store
from runtime.data.lines import Example, FaultError
from runtime.data.split import SPLITS, is_recipes
from runtime.data.tokenizer import Tokenizer, Tokens
from runtime.job.errors import JobError

Plan = dict[str, Any]
BATCH = 512  # examples that are tokenized together


class Fault(NamedTuple):
    """What is wrong with an example, and the number of its line for the order of the faults."""

    line: int
    text: str


def build(
    plan: Plan, examples: Path, tokenizer: Tokenizer, staging: Path, where: Callable[[str, Example], str], sha256: str
) -> None:
    """Write the folder. `where` tells the place of an example of a split in the user's data, `sha256` is that of the data.

    JobError: faulty or too long examples.
    """
    faults: list[Fault] = []
    long: list[Fault] = []
    report: dict[str, Any] = {}
    for split in SPLITS:
        counter = Counter(plan)
        for number, (example, tokens) in enumerate(_tokenized(tokenizer, examples / f"{split}.jsonl")):
            line = example.get(lines.LINE, number + 1)
            place = where(split, example) if lines.LINE in example else f"{split}.jsonl:{line}"
            if isinstance(tokens, FaultError):
                faults.append(Fault(line, f"{place}: {tokens}"))
            elif not counter.add(tokens, number, line):
                long.append(Fault(line, f"{place}: {len(tokens.ids)} tokens"))
        report[split] = counter.write(staging, split)
    lines.refuse([fault.text for fault in sorted(faults)], "correct these examples")
    _refuse_long(plan, [fault.text for fault in sorted(long)], report)
    if not report["training"]["examples"]:
        raise JobError("no example is left for the training: all are too long", "set a larger seq_length")
    metadata = [metadata for split in SPLITS if (metadata := report[split].pop("metadata", None))]
    (staging / "metadata.json").write_text(json.dumps(metadata) + "\n")
    (staging / "report.json").write_text(json.dumps({"sha256": sha256, **report}, indent=1) + "\n")


class Counter:
    """Counts the examples of one split, and keeps those that fit."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.writer = plan, store.Writer()
        self.longest = {"tokens": 0, "line": 0}
        self.too_long = self.truncated = self.dropped = 0

    def add(self, tokens: Tokens, number: int, line: int) -> bool:
        """Keep the example, cut or drop it. False if it is too long and data.too_long is "error"."""
        limit, length = self.plan["seq_length"], len(tokens.ids)
        if length > self.longest["tokens"]:
            self.longest = {"tokens": length, "line": line}
        kept: Tokens | None = tokens
        if length > limit:
            self.too_long += 1
            if self.plan["data"]["too_long"] == "error":
                return False
            kept = truncated(tokens, limit) if self.plan["data"]["too_long"] == "truncate" else None
            self.truncated += kept is not None
            self.dropped += kept is None
        if kept:
            self.writer.add(kept, number)
        return True

    def write(self, folder: Path, split: str) -> dict[str, Any]:
        """Write the arrays and the packs, and return the counts."""
        examples = self.writer.write(folder, split)
        counted = {
            "examples": len(examples),
            "tokens": len(examples.ids),
            "trained_tokens": int(examples.trained.sum()),
            "longest": self.longest,
            "too_long": self.too_long,
            "truncated": self.truncated,
            "dropped": self.dropped,
        }
        packs_itself = self.plan["data"]["packed"] and not is_recipes(self.plan) and len(examples)
        return counted | (_pack(self.plan, examples, folder, split) if packs_itself else {})


def truncated(tokens: Tokens, limit: int) -> Tokens | None:
    """The example with `limit` tokens, or None if it cannot be cut.

    An input loses its end and the output stays whole, as in NeMo; an output that leaves no room for the input cannot be
    cut. A conversation loses its end; if then no token is trained, it cannot be cut.
    """
    ids, trained, prompt = tokens
    if prompt is None:
        return Tokens(ids[:limit], trained[:limit], None) if trained[1:limit].any() else None
    kept = prompt - (len(ids) - limit)
    if kept < 1:
        return None
    return Tokens(np.delete(ids, slice(kept, prompt)), np.delete(trained, slice(kept, prompt)), kept)


def _pack(plan: Plan, examples: store.Examples, folder: Path, split: str) -> dict[str, Any]:
    # a sequence of n tokens has n - 1 pairs of a token and the token to predict, and only these are in a pack
    lengths = (examples.lengths() - 1).tolist()
    packs = bins.pack(lengths, plan["seq_length"], plan["seed"])
    store.write_packs(folder, split, packs)
    filled = [sum(lengths[number] for number in pack) for pack in packs]
    metadata = {
        "dataset_max_seqlen": max(lengths),
        "max_samples_per_bin": max(map(len, packs)),
        "min_packed_seqlen": min(filled),
        "pack_size": plan["seq_length"],
    }
    return {"packs": len(packs), "fill": sum(filled) / len(packs) / plan["seq_length"], "metadata": metadata}


def _refuse_long(plan: Plan, places: list[str], report: dict[str, Any]) -> None:
    """JobError if examples are too long and data.too_long is "error"."""
    if not places:
        return
    longest = max((counted["longest"] for counted in report.values()), key=lambda one: int(one["tokens"]))
    examples = sum(counted["examples"] for counted in report.values()) + len(places)
    lines.refuse(
        [f"{len(places)} of {examples} examples have more than {plan['seq_length']} tokens, which is seq_length", *places],
        f'set data.too_long = "drop" or "truncate", or a seq_length of at least {longest["tokens"]}',
    )


def _tokenized(tokenizer: Tokenizer, file: Path) -> Iterator[tuple[Example, Tokens | FaultError]]:
    batch: list[Example] = []
    with file.open(encoding="utf-8") as examples:
        for line in examples:
            batch.append(json.loads(line))
            if len(batch) == BATCH:
                yield from zip(batch, tokenizer.tokens(batch), strict=True)
                batch = []
    yield from zip(batch, tokenizer.tokens(batch), strict=True)
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
"""The forward pass of a LoRA adapter, in two faster forms. Both engines' adapters have the same parts.

In: an adapter. Out: its output, or the sum with that of the frozen layer. Requires TP = 1 and no dropout.
"""

from typing import Any

import torch


def forward(self: Any, x: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
    """Multiply [tokens, rank] by alpha / rank, instead of the adapter's output [tokens, features].

    The result has the same bits if alpha / rank is a power of two.
    """
    x, _ = self.linear_out(small(self, x))
    return x


def small(adapter: Any, x: torch.Tensor) -> torch.Tensor:
    """The tensor between the two matrices, [..., rank], times alpha / rank."""
    x, _ = adapter.linear_in(x)
    scaled: torch.Tensor = adapter.activation(x) * (adapter.alpha / adapter.dim)
    return scaled


class AddProduct(torch.autograd.Function):  # type: ignore[misc]
    """add(sum [..., features], small [..., rank], weight [features, rank]) -> sum + small @ weight.T, in the memory of sum.

    The GEMM itself adds, in float32, and rounds once. Nobody else may have kept the sum.
    """

    @staticmethod
    def forward(ctx: Any, total: torch.Tensor, factor: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Add the product."""
        ctx.save_for_backward(factor, weight)
        total = total.detach()
        total.view(-1, total.shape[-1]).addmm_(factor.reshape(-1, factor.shape[-1]), weight.t())
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of the three."""
        factor, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        return gradient, (rows @ weight).view_as(factor), rows.t() @ factor.reshape(-1, factor.shape[-1])
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/attempt.py <<'END_OF_FTGEN_FILE' || return
"""One attempt of a run that is saved: which checkpoint it goes on from, and what it saves.

In: a plan with `save`. Out: an `Attempt`; with the data, what the engine saves (`Saves`).

A run has several attempts if its job is requeued, or if its script is submitted again with --resume. All attempts share
the run directory, and so the folder of checkpoints.
"""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.data.prepare import Files
from runtime.guard import checkpoints
from runtime.guard.checkpoints import Checkpoint
from runtime.guard.claim import Claim
from runtime.job import children, environment, stop
from runtime.job.errors import JobError
from runtime.job.progress import say

if TYPE_CHECKING:
    from runtime.engines.saving import Saves

Plan = dict[str, Any]


class Attempt(NamedTuple):
    """What this attempt owns and goes on from."""

    folder: Path  # of the checkpoints
    claim: Claim | None  # of rank 0
    checkpoint: Checkpoint | None  # None: it begins with the first step

    @property
    def step(self) -> int:
        """Number of steps that earlier attempts made and saved."""
        return self.checkpoint.step if self.checkpoint else 0


def begin(plan: Plan) -> Attempt:
    """Take over the run and choose its newest checkpoint. JobError: another plan or a living job owns it."""
    stop.listen(signal.SIGUSR1)  # until the first step has ended, SIGTERM still ends this process
    children.pass_signals_by(signal.SIGUSR1, signal.SIGTERM)
    children.end_with_this_process()
    folder, claim = checkpoints.folder_of_run(), None
    if os.environ["RANK"] == "0":
        claim = checkpoints.own(folder)
        checkpoints.clear(folder, claim)
    checkpoint = checkpoints.newest(folder)
    if checkpoint:
        checkpoints.refuse_other(checkpoint, plan)
        say(f"resumed after step {checkpoint.step}: {checkpoint.path}")
    return Attempt(folder, claim, checkpoint)


def steps(plan: Plan) -> int | None:
    """The number of steps of the run. With epochs, None before its first attempt has read the data."""
    return plan["max_steps"] or checkpoints.steps(checkpoints.folder_of_run())


def saves(plan: Plan, attempt: Attempt, files: Files) -> "Saves":
    """What the attempt saves. JobError: the data has changed since its checkpoint. Imports torch.

    With epochs, `plan` has the number of steps that the data gave.
    """
    from runtime.engines.saving import Saves

    last_step = plan["max_steps"]
    if plan["epochs"]:
        if attempt.claim:
            checkpoints.write_steps(attempt.folder, last_step)
        plan = plan | {"max_steps": None}  # the plan as the script has it, for the manifests
    data = [folder.name for folder in files if folder]
    versions = environment.packages()
    if attempt.checkpoint:
        _compare(attempt.checkpoint, data, versions)
    return Saves(
        folder=str(attempt.folder),
        last_step=last_step,
        every_steps=plan["save"]["every_steps"],
        keep=plan["save"]["keep"],
        generation=attempt.claim.generation if attempt.claim else 0,
        resumed=attempt.step,
        checkpoint_bytes=plan["save"]["checkpoint_bytes"],
        about=checkpoints.about(plan, data, versions),
        lead_s=plan["slurm"]["end_before_limit_s"] if os.environ.get("SLURM_JOB_ID") else 0,
    )


def _compare(checkpoint: Checkpoint, data: list[str], versions: dict[str, str]) -> None:
    before, packages = checkpoint.manifest["data"], checkpoint.manifest["versions"]
    if before != data:
        raise JobError(
            f"{checkpoint.path} was trained on other data: {', '.join(before)} there and {', '.join(data)} here",
            "restore the data as it was, or submit the script without --resume: that starts a new run",
        )
    changed = [
        f"{name} {packages.get(name)} -> {versions.get(name)}" for name in versions if packages.get(name) != versions[name]
    ]
    if changed:
        say(f"warning: packages have changed since {checkpoint.path}, so results may differ: {', '.join(changed)}")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/clipping.py <<'END_OF_FTGEN_FILE' || return
"""By what the gradients are scaled, without waiting for the GPU.

In: the norm of all gradients, on the GPU. Out: the factor, on the GPU. Megatron-Core computes it on the CPU, in float64.
"""

import torch

EPSILON = 1.0e-6  # that Megatron-Core adds to the norm


def factor(norm: torch.Tensor, max_norm: float) -> torch.Tensor:
    """The factor in float32, from a norm in float64: 1 if the norm is not larger than `max_norm`, or is NaN."""
    by = torch.full_like(norm, max_norm) / (norm + EPSILON)  # a number / a tensor would be its reciprocal * number
    return by.masked_fill(~(by < 1.0), 1.0).float()
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

    GPTModel.rows_are_picked = False  # whether the last layer returns the rows with a loss alone
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
    gpt = gpt_of(model)
    gpt.loss_rows, gpt.loss_count = rows, count


def gpt_of(model: Any) -> Any:
    """The GPTModel inside of its wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def pick(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[rows, 1, hidden] of states [sequence, batch, hidden]."""
    return states.transpose(0, 1).flatten(0, 1).index_select(0, rows).unsqueeze(1)


def _postprocess_with(whole: Any) -> Any:
    def postprocess(self: Any, hidden_states: torch.Tensor, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        """Loss [batch, sequence], zero for tokens without a loss, from hidden states [sequence, batch, hidden]."""
        rows = getattr(self, "loss_rows", None)
        if labels is None or rows is None or not self.post_process:
            return whole(self, hidden_states, *args, labels=labels, **kwargs)
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        picked = hidden_states if self.rows_are_picked else pick(hidden_states, rows)
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
import inspect
import sys
from multiprocessing.pool import ThreadPool
from types import ModuleType, SimpleNamespace
from typing import Any

from runtime.engines import installed

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
    core = installed.folder("megatron.core")
    file = core.joinpath(*inner).with_suffix(".py") if core else None
    return file.read_text(encoding="utf-8") if file and file.is_file() else ""


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

In: a plan. Out: $NEMO_HOME/models/<place>/{context,weights,hugging_face}.

If the converted checkpoint exists, this module does not import NeMo.
"""

from pathlib import Path
from typing import Any

from runtime.engines.nemo import imports
from runtime.job.progress import timed
from runtime.weights import base, checkpoint
from runtime.weights.checkpoint import converted, directory, origin, source, user_directory, verify, weight_bytes

__all__ = ["convert", "converted", "directory", "origin", "source", "user_directory", "verify", "weight_bytes"]


def convert(plan: dict[str, Any]) -> int:
    """Convert the checkpoint unless that is done; exit code 0. JobError: no access, network or disk space; wrong shape."""
    return checkpoint.convert(plan, _import)


def _import(weights: Path, staging: Path) -> dict[str, Any]:
    base.keep(weights, staging / base.FOLDER)
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

import torch

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
    from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

    if not getattr(lora, "HAVE_TE", True):  # NeMo 2.1 does not ask
        lora.te = types.SimpleNamespace(Linear=None)  # LoRA tests whether a layer is a te.Linear
        lora_layers.HAVE_TE = False  # NeMo 2.7 sets it to True here though Transformer Engine is not installed
    megatron_init._set_random_seed = no_gpu.with_a_device(megatron_init._set_random_seed)
    nemo_checkpoints._fix_tensors_device = no_gpu.same  # it moves loaded tensors between GPUs
    # Rank 0 alone gathers Megatron's timers from all ranks. Gloo takes that for the next collective of the other ranks.
    ProgressPrinter.log_megatron_timers = no_gpu.nothing
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
        for module in target.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.to(source.dtype)  # PyTorch's norm does not know the type of the other weights
        return apply_transforms(source, target, mapping | NORMS, *args, **kwargs)

    return with_norms
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/data.py <<'END_OF_FTGEN_FILE' || return
"""Give ftgen's tokens, packs and order to NeMo: NeMo's data sets and data module, with another source of examples.

In: the folder of the tokens. Out: batches that NeMo's own collate functions make.

NeMo's own order of examples that are not packed ignores the seed, changes with max_steps and has no epochs: of 40
examples, 31 were among the first 40 samples (NeMo 2.7.3). Here runtime/data/order.py decides. NeMo's sampler counts
through the samples, so a training that resumes at a number of consumed samples continues exactly.

This module imports NeMo (15-40 s), so only a training imports it.
"""

from pathlib import Path
from typing import Any

from nemo.collections.llm.gpt.data.core import GPTSFTDataset, GPTSFTPackedDataset
from nemo.collections.llm.gpt.data.fine_tuning import FineTuningDataModule
from nemo.lightning.io.mixin import IOMixin

from runtime.data import order, store


class Examples(GPTSFTDataset):  # type: ignore[misc]
    """The examples of one split, not packed. `file_path` is <folder>/<split>."""

    def _load_dataset(self) -> None:
        path = Path(self.file_path)
        self.indexed_dataset = store.Examples(path.parent, path.name)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One example. NeMo fills the last batch of a validation with negative numbers, which must have no loss."""
        ids, trained, _ = self.indexed_dataset[number % len(self)]
        mask = trained.astype(float).tolist() if number >= 0 else [0.0] * len(ids)
        unused = {"context_ids": [], "context_length": 0, "answer_ids": [], "metadata": {}}
        return {"input_ids": ids.tolist(), "loss_mask": mask, "token_count": len(ids), **unused}

    def _build_loss_mask(self, processed_example: dict[str, Any]) -> list[float]:
        mask: list[float] = processed_example["loss_mask"]
        return mask


class Packs(GPTSFTPackedDataset):  # type: ignore[misc]
    """The packs of one split. `file_path` is <folder>/<split>."""

    def _load_dataset(self) -> None:
        path = Path(self.file_path)
        self.indexed_dataset = store.Packs(path.parent, path.name)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """One pack; a negative number is one without a loss, as above."""
        pack = self.indexed_dataset[number % len(self)]
        return pack if number >= 0 else pack | {"loss_mask": pack["loss_mask"] * 0}


class TokensDataModule(FineTuningDataModule, IOMixin):  # type: ignore[misc]
    """NeMo's data module. `dataset_root` is the folder of the tokens."""

    def prepare_data(self) -> None:
        """Do nothing: runtime/data has prepared all."""

    def train_dataloader(self) -> Any:
        """Batches of the training split, epoch after epoch."""
        in_order = order.InOrder(self.samples("training"), self.max_train_samples, self.seed)
        return self._create_dataloader(in_order, mode="train")

    def val_dataloader(self) -> Any:
        """Batches of the validation split, in the order of the file."""
        return self._create_dataloader(self.samples("validation"), mode="validation")

    def samples(self, split: str) -> Examples | Packs:
        """NeMo's data set of a split."""
        given = {
            "file_path": str(self.dataset_root / split),
            "tokenizer": self.tokenizer,
            "max_seq_length": self.seq_length,
            "prompt_template": "{output}",
            "label_key": "output",
            "truncation_field": None,
            "seed": self.seed,
            **self.dataset_kwargs,
        }
        if self.packed_sequence_size <= 0:
            return Examples(**given)
        packed = {"pad_cu_seqlens": self._pad_cu_seqlens, "pack_metadata_file_path": str(self.pack_metadata)}
        return Packs(**given, **packed)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/importer.py <<'END_OF_FTGEN_FILE' || return
"""Run NeMo's own importer of Hugging Face checkpoints, so that it writes only into one directory.

In: a directory in Hugging Face format. Out: a directory in NeMo's format.

This module imports NeMo (15-40 s), so only a conversion imports it.
"""

import json
import queue
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import base, filesystem_async
from nemo.collections.llm.gpt.model.llama import HFLlamaImporter
from nemo.collections.llm.gpt.model.mistral import HFMistralImporter
from nemo.collections.llm.gpt.model.qwen2 import HFQwen2Importer
from transformers import AutoTokenizer

from runtime.engines.nemo import cpu
from runtime.job import children
from runtime.job.errors import JobError

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
    """Make Megatron's forked processes end with this one.

    Saving is not asynchronous here, so a plain queue replaces Megatron-Core's, which needs a server process (two
    seconds to start).
    """
    base.async_calls = SavesHere()
    filesystem_async._results_queue = queue.Queue()
    children.end_with_this_process()
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
    cat >"$1"/runtime/engines/nemo/mlflow_run.py <<'END_OF_FTGEN_FILE' || return
"""Lightning's logger for MLflow, which goes on with the run of an earlier attempt.

In: a file for the run's id, which the first attempt writes. Out: a logger.

This module imports Lightning, so only a training imports it.
"""

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment


class ContinuedRun(MLFlowLogger):  # type: ignore[misc]
    """One run of MLflow for all attempts."""

    def __init__(self, id_file: str, **options: Any) -> None:
        self.id_file = Path(id_file)
        known = self.id_file.read_text(encoding="utf-8") if self.id_file.is_file() else None
        super().__init__(run_id=known, **options)

    @property
    @rank_zero_experiment  # type: ignore[untyped-decorator]
    def experiment(self) -> Any:
        """The client of MLflow. Its first use makes the run."""
        client = super().experiment
        if not self.id_file.is_file():
            self.id_file.parent.mkdir(parents=True, exist_ok=True)
            self.id_file.write_text(str(self._run_id), encoding="utf-8")
        return client
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/__init__.py <<'END_OF_FTGEN_FILE' || return
"""Optimizations that make a step faster than the stock recipe, one file each.

In: a recipe and a plan. Out: the recipe, changed. Start with `switch.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/async_step.py <<'END_OF_FTGEN_FILE' || return
"""Let the host run ahead of the GPU: at the end of a step, nothing waits for it.

In: a recipe. Out: the recipe with another printer of step lines, and NeMo, Megatron-Core and Lightning changed for this
process.

At the end of a step, the stock recipe reads values from the GPU again and again. Each time the host waits until the GPU
has done all its work. Then the GPU waits until the host has launched the optimizer and the first layer of the next step.
Here

1. the loss is averaged without asking which micro-batches have a loss,
2. the norm of the gradients stays on the GPU, and they are scaled by a factor that is computed there,
3. what Lightning logs stays where it is: numbers on the CPU, tensors on the GPU,
4. Transformer Engine's cross entropy does not compare its gradient with the number 1, which it copies to the GPU first, and
   waits, once per micro-batch. The gradient has a value for each token, so they are never equal,
5. the line of a step is printed when the next step has been launched, the last one at the end. The host is ahead by one
   step at most. The time of a step is that from the end of the one before to its own, on the GPU.
"""

import contextlib
import functools
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import nemo_run as run
import torch
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.connectors.logger_connector import result
from nemo.lightning.pytorch.callbacks.progress_printer import ProgressPrinter

from runtime.engines import clipping
from runtime.engines.nemo import step_ends
from runtime.engines.nemo.optimizations import needs
from runtime.node import telemetry

TIME = "train_step_timing in s"  # as NeMo's TimingCallback calls it


def missing(_recipe: Any, plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    capturable = ("megatron.core.extensions.transformer_engine:te_parallel_cross_entropy(is_cg_capturable)",)
    return needs.missing(
        *(capturable if plan["optimizations"]["fused_cross_entropy"] else ()),
        "megatron.core.optimizer.optimizer:get_grad_norm_fp32",
        "megatron.core.optimizer.optimizer:clip_grad_by_total_norm_fp32(use_decoupled_grad)",
        "megatron.core.optimizer.clip_grads:multi_tensor_applier",
        "megatron.core.optimizer.clip_grads:l2_norm_impl",
        "nemo.lightning.megatron_parallel:MaskedTokenLossReduction.reduce",
        "lightning.pytorch.trainer.connectors.logger_connector.result:convert_tensors_to_scalars",
        "lightning.pytorch.trainer.connectors.logger_connector.result:_ResultMetric.to",
    )


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Change the packages, and print the step lines late."""
    install()
    recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), run.Config(LatePrinter)]


def install() -> None:
    """Change what waits for the GPU, in this process. Call it once."""
    from megatron.core.models.common.language_module import language_module
    from megatron.core.optimizer import optimizer
    from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

    language_module.te_parallel_cross_entropy = _without_comparing(language_module.te_parallel_cross_entropy)
    MaskedTokenLossReduction.reduce = _without_asking(MaskedTokenLossReduction.reduce)
    optimizer.get_grad_norm_fp32 = _on_the_gpu(optimizer.get_grad_norm_fp32)
    optimizer.clip_grad_by_total_norm_fp32 = _scaled_on_the_gpu(optimizer.clip_grad_by_total_norm_fp32)
    LightningModule.log = _with_numbers_on_the_cpu(LightningModule.log)
    result.convert_tensors_to_scalars = _as_it_is  # it is called for all metrics whenever any is looked at
    result._ResultMetric.to = _unless_there(result._ResultMetric.to)
    tells: Any = step_ends.TellSteps
    tells.on_train_batch_end = Callback.on_train_batch_end  # LatePrinter tells when a step has ended


def _without_comparing(cross_entropy: Any) -> Any:
    """Transformer Engine's loss as inside of a CUDA graph, where it must not wait: with the same kernels."""

    def without_comparing(logits: Any, labels: Any, tp_group: Any, _is_cg_capturable: bool = False) -> Any:
        return cross_entropy(logits, labels, tp_group, True)

    return cross_entropy and without_comparing  # None without Transformer Engine


def _without_asking(reduce: Any) -> Any:
    """Stock asks the GPU for each micro-batch whether it has tokens with a loss. Those without count as zero here."""

    @functools.wraps(reduce)
    def reduce_without_asking(self: Any, losses_reduced_per_micro_batch: Any) -> Any:
        from megatron.core import parallel_state

        losses = [each.get("loss_sum_and_ub_size") for each in losses_reduced_per_micro_batch or ()]
        if not losses or any(loss is None for loss in losses):
            return reduce(self, losses_reduced_per_micro_batch)
        each = torch.vstack(losses)  # sum of the losses, number of tokens
        both = each.masked_fill(each[:, 1:] <= 0, 0).sum(dim=0)
        torch.distributed.all_reduce(both, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return both[0] / both[1]

    return reduce_without_asking


def _on_the_gpu(norm_of: Any) -> Any:
    """The norm as a tensor. Its attribute `exact` is in float64, in which stock computes with it on the CPU."""
    from megatron.core.optimizer import clip_grads

    @functools.wraps(norm_of)
    def norm_on_the_gpu(grads_for_norm: Any, norm_type: float = 2, grad_stats_parallel_group: Any = None) -> Any:
        grads = [grads_for_norm] if isinstance(grads_for_norm, torch.Tensor) else grads_for_norm
        if norm_type != 2 or not grads:
            return norm_of(grads_for_norm, norm_type, grad_stats_parallel_group)
        overflow = torch.zeros(1, dtype=torch.int, device="cuda")
        norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [grads], False)
        square = norm**2.0
        torch.distributed.all_reduce(square, op=torch.distributed.ReduceOp.SUM, group=grad_stats_parallel_group)
        exact = square.double().sqrt().squeeze()
        total = exact.float()  # what NeMo logs
        total.exact = exact
        return total

    return norm_on_the_gpu


def _scaled_on_the_gpu(clip: Any) -> Any:
    """Stock scales the gradients if the factor is below 1. Here the factor is 1 otherwise, also if the norm is NaN."""

    @functools.wraps(clip)
    def scale(parameters: Any, max_norm: float, total_norm: Any, use_decoupled_grad: bool = False) -> None:
        exact = getattr(total_norm, "exact", None)
        if exact is None or use_decoupled_grad:
            clip(parameters, max_norm, float(total_norm if exact is None else exact), use_decoupled_grad)
            return
        if grads := [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]:
            torch._foreach_mul_(grads, clipping.factor(exact, max_norm))

    return scale


def _with_numbers_on_the_cpu(log: Any) -> Any:
    """Lightning would copy a number to the GPU, and wait."""

    @functools.wraps(log)
    def log_on_the_cpu(self: Any, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        log(self, name, torch.tensor(float(value)) if isinstance(value, int | float) else value, *args, **kwargs)

    return log_on_the_cpu


def _unless_there(to: Any) -> Any:
    """Lightning takes 0.4 ms to copy a metric, with all that it knows about it, each time that a value is logged."""

    @functools.wraps(to)
    def to_elsewhere(self: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_tensor and self.value.device == torch.device(device):
            return self
        return to(self, device, *args, **kwargs)

    return to_elsewhere


def _as_it_is(value: Any) -> Any:
    return value


class Moment:
    """When the GPU comes to what the host launches next; without a GPU, now."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()
        self.now = time.time()

    def wait(self) -> bool:
        """Wait for it. Whether it was still to come, so that it is now."""
        is_to_come = torch.cuda.is_available() and not self.event.query()
        self.event.synchronize()
        self.now = time.time() if is_to_come else self.now
        return is_to_come

    def since(self, other: "Moment") -> float:
        """Seconds from another moment to this one, which has come."""
        return other.event.elapsed_time(self.event) / 1e3 if torch.cuda.is_available() else self.now - other.now


class Launched(NamedTuple):
    """A step that the host has launched, and that the GPU may still be at."""

    number: int  # of the run, counted from 0
    then: Any  # what NeMo's printer asks a trainer, as it was then
    metrics: dict[str, Any]  # on their way to the CPU
    began: Moment
    ended: Moment  # the metrics are there then


class LatePrinter(ProgressPrinter):  # type: ignore[misc]
    """Prints NeMo's line of a step when the next step was launched, and before anything that is not a step."""

    def __init__(self) -> None:
        super().__init__()
        self.running: Launched | None = None
        self.began: Moment
        self.known: Moment  # the last one whose time on the clock is known

    def on_train_batch_start(self, *_args: Any) -> None:
        """Note when a step begins, if it does not follow on another one."""
        if not self.running:
            self.began = self.known = Moment()
            self.began.wait()

    def on_train_batch_end(self, trainer: Any, module: Any, *_args: Any, **_kwargs: Any) -> None:
        """A step is launched. Wait for the end of the one before it."""
        strategy = trainer.strategy
        values = {
            name: value.detach().to("cpu", non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in super().get_metrics(trainer, module).items()
        }
        ended = Moment()
        step = SimpleNamespace(current_epoch_step=strategy.current_epoch_step, timers=getattr(strategy, "timers", None))
        then = SimpleNamespace(current_epoch=trainer.current_epoch, strategy=step)
        self.finish()
        self.running = Launched(trainer.global_step - 1, then, values, self.began, ended)
        self.began = ended  # of the next step, if it follows on this one
        if trainer.global_step == trainer.max_steps:
            self.finish()

    def get_metrics(self, _trainer: Any, metrics: Any) -> Any:
        """What NeMo's printer prints: what `finish` gives it."""
        return metrics

    def finish(self) -> None:
        """Wait for the end of the step that is running, if any, and print its line. A save calls it first (save.py)."""
        if not self.running:
            return
        step, self.running = self.running, None
        if step.ended.wait():
            self.known = step.ended
        telemetry.after_step(step.number, self.known.now + step.ended.since(self.known))
        metrics = convert_tensors_to_scalars(step.metrics)
        if TIME in metrics:
            metrics[TIME] = step.ended.since(step.began)
        super().on_train_batch_end(step.then, metrics)

    def on_validation_start(self, *_args: Any) -> None:
        """Before a validation."""
        self.finish()

    def on_train_end(self, *_args: Any) -> None:
        """After the last step, if the training ends sooner than it could."""
        self.finish()

    def on_exception(self, *_args: Any) -> None:
        """When the training fails or is asked to stop, print the line of a step that ended well."""
        with contextlib.suppress(RuntimeError):
            self.finish()
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/bf16_grads_in_adam.py <<'END_OF_FTGEN_FILE' || return
"""Let Adam read the BF16 gradients, instead of a copy of them in float32.

In: a recipe, which stays as it is. Out: Megatron-Core, changed for this process.

The distributed optimizer copies its shard of the gradients from BF16 to float32, computes their norm, scales them if the
norm is larger than `clip_grad`, and updates the weights. Transformer Engine's kernels compute in float32 whatever they read.
Here they read BF16. Only gradients that are scaled become float32, in the kernel that scales them. All values are the same
bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runtime.engines import clipping
from runtime.engines.nemo.optimizations import needs

READS_OTHERS = "use_precision_aware_optimizer_no_fp8_or_ds_fp8"  # whether gradients are in `decoupled_grad`


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._copy_model_grads_to_main_grads",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.get_main_grads_for_grad_norm",
        "megatron.core.optimizer.optimizer:clip_grad_by_total_norm_fp32",
        "megatron.core.optimizer.optimizer_config:OptimizerConfig.__post_init__",
        "transformer_engine.pytorch.optimizers:FusedAdam(use_decoupled_grad)",
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Change the distributed optimizer in this process."""
    from megatron.core.optimizer import optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    DistributedOptimizer._copy_model_grads_to_main_grads = give_views
    DistributedOptimizer.get_main_grads_for_grad_norm = _of_views(DistributedOptimizer.get_main_grads_for_grad_norm)
    DistributedOptimizer.step_with_ready_grads = _then_let_go(DistributedOptimizer.step_with_ready_grads)
    optimizer.clip_grad_by_total_norm_fp32 = clip


def give_views(self: Any) -> None:
    """Give each float32 shard of the weights its shard of the gradients, as it is."""
    if self.is_stub_optimizer:
        return
    self.optimizer.use_decoupled_grad = True
    groups = [*zip(self.model_float16_groups, self.shard_fp32_from_float16_groups, strict=True)]
    groups += zip(self.model_fp32_groups, self.shard_fp32_groups, strict=True)
    for weights, shards in groups:
        for weight, shard in zip(weights, shards, strict=True):
            place = self._get_model_param_range_map(weight)["param"]
            shard.decoupled_grad = weight.main_grad.view(-1)[place.start : place.end]


def _of_views(get_gradients: Any) -> Any:
    def get_views(self: Any) -> Any:
        with _reading_others(self.config):
            return get_gradients(self)

    return get_views


def _then_let_go(step: Any) -> Any:
    """After the step, no shard keeps a gradient: those in float32 need memory."""

    def step_and_let_go(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = step(self, *args, **kwargs)
        for shard in self.get_parameters():
            shard.decoupled_grad = None
        return done

    return step_and_let_go


def clip(shards: list[Any], max_norm: float, total_norm: Any, use_decoupled_grad: bool = False) -> None:
    """Megatron-Core's clip_grad_by_total_norm_fp32 that leaves the BF16 gradients alone, and scales into float32.

    A norm that is still on the GPU (see async_step.py) gives a factor that is there too: 1 where nothing is to be scaled.
    """
    del use_decoupled_grad
    import torch

    with_gradients = [shard for shard in shards if getattr(shard, "decoupled_grad", None) is not None]
    if hasattr(total_norm, "exact"):
        factor = clipping.factor(total_norm.exact, max_norm).view(1)
    else:
        coefficient = max_norm / (total_norm + clipping.EPSILON)
        if coefficient >= 1.0 or not with_gradients:
            return
        factor = torch.tensor([coefficient], dtype=torch.float32, device=with_gradients[0].decoupled_grad.device)
    for shard in with_gradients:
        gradient = shard.decoupled_grad
        shard.decoupled_grad = torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=torch.float32))


@contextmanager
def _reading_others(config: Any) -> Iterator[None]:
    before = getattr(config, READS_OTHERS)
    setattr(config, READS_OTHERS, True)
    try:
        yield
    finally:
        setattr(config, READS_OTHERS, before)
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
    cat >"$1"/runtime/engines/nemo/optimizations/early_gather.py <<'END_OF_FTGEN_FILE' || return
"""Start all gathers of weights when the optimizer's step ends, and sum the LM head's gradient first.

In: a recipe, which stays as it is. Out: Megatron-Core, changed for this process.

With a distributed optimizer, every GPU updates a part of the weights and gathers the others before it uses them.

1. Megatron-Core starts the first gather when the next forward pass waits for it, and each further one when a layer begins.
Here all start when the optimizer's step ends, in the order of their use. They run while the host logs and reads data.

2. With weights in FP8, Megatron-Core sums the gradients of all BF16 weights (embedding, norms, LM head) with those of the
first layer, when the backward pass has ended and nothing can hide it, and gathers them before the first layer. Here the LM
head has a group of its own: its gradient is the first to be ready, and its weights are the last to be used.
"""

from typing import Any

from runtime.engines.nemo.optimizations import needs


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.step_with_ready_grads",
        "megatron.core.distributed.param_and_grad_buffer:_ParamAndGradBucketGroup.start_param_sync",
        "megatron.core.distributed.distributed_data_parallel:partition_buckets(buffers)",
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Change both in this process."""
    from megatron.core.distributed import distributed_data_parallel
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    DistributedOptimizer.step_with_ready_grads = then_gather(DistributedOptimizer.step_with_ready_grads)
    distributed_data_parallel.partition_buckets = with_a_group_for_the_head(distributed_data_parallel.partition_buckets)


def then_gather(step: Any) -> Any:
    """An optimizer's step that starts all gathers when it ends. The forward pass waits for each, and starts none."""

    def step_and_gather(self: Any, *args: Any, **kwargs: Any) -> Any:
        done = step(self, *args, **kwargs)
        if self.ddp_config.overlap_param_gather:
            for chunk in self.model_chunks:
                for group in reversed(chunk.bucket_groups):  # they are in the order of the backward pass
                    group.next_param_gather_bucket_group = None
                    if not group.param_gather_dispatched:
                        group.start_param_sync()
        return done

    return step_and_gather


def with_a_group_for_the_head(partition: Any) -> Any:
    """Megatron-Core's groups of buckets, in the order of the backward pass, where the first BF16 bucket has a group."""

    def partition_and_split(buffers: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        groups: list[Any] = partition(buffers, *args, **kwargs)
        if len(groups) < 2 or len(groups[-1].buckets) < 3:  # an FP8 bucket, one of the LM head, one of the embedding
            return groups
        last = groups[-1]
        fp8, head, *others = last.buckets
        size = getattr(last, "intra_distributed_optimizer_instance_size", 0)
        if not size or len(head.params_list) > 1:  # no distributed optimizer, or a head that is tied to the embedding
            return groups
        like = (last.ddp_config, last.intra_distributed_optimizer_instance_group, size)
        return [type(last)([head], *like), *groups[:-1], type(last)([fp8, *others], *like)]

    return partition_and_split
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/fp8_swiglu.py <<'END_OF_FTGEN_FILE' || return
"""Write SwiGLU's FP8 result and gradient with kernels of ftgen, in Triton.

In: a recipe with fused_swiglu on, in FP8 with delayed scaling. Out: the recipe; Transformer Engine is changed for this
process.

The results are those of Transformer Engine's kernels for Hopper: the same bytes, scales and largest values. Its own
kernels still work where it also asks for a transpose, or for anything but FP8 with delayed scaling. The catalogue names
this optimization before fused_swiglu, so that it comes first: what fused_swiglu puts around the kernels stays around these.
"""

import functools
from typing import Any

from runtime.engines.nemo.optimizations import needs


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "triton:jit",
        "transformer_engine.pytorch.ops.basic.activation:SwiGLU._activation_forward_impl",
        "transformer_engine.pytorch.ops.basic.activation:SwiGLU._activation_backward_impl",
        "transformer_engine.pytorch.constants:TE_DType_To_Torch",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Tensor",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Quantizer.amax",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Quantizer.columnwise_usage",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Quantizer.internal",
        "transformer_engine.pytorch.tensor.storage.float8_tensor_storage:Float8TensorStorage",
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Put the kernels in the place of Transformer Engine's. Call it once, before the first step."""
    from transformer_engine.pytorch.ops.basic.activation import SwiGLU

    SwiGLU._activation_forward_impl = _result(SwiGLU._activation_forward_impl)
    SwiGLU._activation_backward_impl = _gradient(SwiGLU._activation_backward_impl)


def _result(stock: Any) -> Any:
    from runtime.engines.swiglu import write_result

    @functools.wraps(stock)
    def result(self: Any, mixed: Any, quantizer: Any) -> Any:
        if not _is_ours(mixed, quantizer):
            return stock(self, mixed, quantizer)
        shape = (*mixed.shape[:-1], mixed.shape[-1] // 2)
        return _written(quantizer, shape, mixed.dtype, write_result, mixed)

    return result


def _gradient(stock: Any) -> Any:
    from runtime.engines.swiglu import write_gradient

    @functools.wraps(stock)
    def gradient(self: Any, of_result: Any, mixed: Any, quantizer: Any) -> Any:
        if not _is_ours(mixed, quantizer):
            return stock(self, of_result, mixed, quantizer)
        return _written(quantizer, tuple(mixed.shape), mixed.dtype, write_gradient, of_result, mixed)

    return gradient


def _is_ours(mixed: Any, quantizer: Any) -> bool:
    """Whether a GPU shall write rows in FP8 with delayed scaling, without a transpose, from BF16."""
    import torch
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer

    return (
        isinstance(quantizer, Float8Quantizer)
        and quantizer.rowwise_usage
        and not quantizer.columnwise_usage
        and mixed.is_cuda
        and mixed.dtype == torch.bfloat16
    )


def _written(quantizer: Any, shape: tuple[int, ...], dtype: Any, write: Any, *inputs: Any) -> Any:
    """A new FP8 tensor, of the class that the quantizer asks for, filled by `write`."""
    import torch
    from transformer_engine.pytorch.constants import TE_DType_To_Torch
    from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    data = torch.empty(shape, dtype=torch.uint8, device=inputs[0].device)
    scale_inv = torch.empty(1, dtype=torch.float32, device=inputs[0].device)
    inputs = tuple(tensor.contiguous() for tensor in inputs)
    write(*inputs, data.view(TE_DType_To_Torch[quantizer.dtype]), quantizer.scale, quantizer.amax, scale_inv)
    parts = {
        "data": data,
        "fp8_scale_inv": scale_inv,
        "fp8_dtype": quantizer.dtype,
        "data_transpose": None,
        "quantizer": quantizer,
    }
    return Float8TensorStorage(**parts) if quantizer.internal else Float8Tensor(shape=shape, dtype=dtype, **parts)
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
    cat >"$1"/runtime/engines/nemo/optimizations/fused_lora_add.py <<'END_OF_FTGEN_FILE' || return
"""Add LoRA's branch to the output of the frozen layer in the GEMM that computes the branch.

In: a recipe, which stays as it is. Out: NeMo's class of layers with adapters, changed for this process.

The stock recipe writes the branch [tokens, features], multiplies it by alpha / rank, and adds it to the frozen layer's
output, which reads and writes the widest tensors three times more. As with scale_small_tensor, the scale is applied to the
small tensor.
"""

from typing import Any

from runtime.engines import adapters
from runtime.engines.nemo.optimizations import needs


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "nemo.collections.llm.peft.lora:LoRALinear.base_linear_forward", "nemo.collections.llm.peft.lora:LoRALinear.forward"
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Add in the GEMM in this process. Requires TP = 1 and no dropout."""
    from nemo.collections.llm.peft.lora import LoRALinear

    LoRALinear.forward = forward


def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The sum of the frozen layer's output and of its adapter's, and the bias."""
    output, bias, normed = self.base_linear_forward(x, *args, **kwargs)
    small = adapters.small(self.adapter, normed.contiguous())
    return adapters.AddProduct.apply(output, small, self.adapter.linear_out.weight), bias
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/fused_residual_add.py <<'END_OF_FTGEN_FILE' || return
"""Add the gradient of the residual in the kernel of the norm's backward pass.

In: a recipe, which stays as it is. Out: Megatron-Core and Transformer Engine, changed for this process.

The input of a block goes two ways: into the norm, and, as the residual, into the sum after the block. In the backward pass
PyTorch adds the two gradients in a kernel of its own. Transformer Engine has a kernel that adds while it computes the norm's
gradient. Here the residual's gradient waits for that kernel: it is known long before, because the backward pass of the sum
comes before that of the block.
"""

import functools
from typing import Any

import torch

from runtime.engines.nemo.optimizations import needs

WAITING: dict[int, torch.Tensor] = {}  # at most one gradient of a residual, by the address of the norm's input


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "transformer_engine_torch:rmsnorm_bwd_add",
        "transformer_engine.pytorch.module.layernorm_linear:tex",
        "transformer_engine.pytorch.ops.basic.rmsnorm:rmsnorm_bwd",
        "megatron.core.models.gpt.gpt_layer_specs:get_bias_dropout_add",
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Let the norms add. Call it once, before the model is built. Requires RMSNorm, and blocks that begin with the norm."""
    import transformer_engine_torch as kernels
    from megatron.core.models.gpt import gpt_layer_specs
    from transformer_engine.pytorch.ops.basic import rmsnorm

    gpt_layer_specs.get_bias_dropout_add = with_waiting_residual(gpt_layer_specs.get_bias_dropout_add)
    kernels.rmsnorm_bwd = rmsnorm.rmsnorm_bwd = adding(kernels.rmsnorm_bwd, kernels.rmsnorm_bwd_add)


def with_waiting_residual(stock: Any) -> Any:
    """Megatron-Core's `get_bias_dropout_add`, with residuals whose gradients wait."""

    @functools.wraps(stock)
    def get(*args: Any) -> Any:
        add = stock(*args)

        @functools.wraps(add)
        def add_waiting(output: Any, residual: torch.Tensor, probability: float) -> Any:
            return add(output, Wait.apply(residual), probability)

        return add_waiting

    return get


class Wait(torch.autograd.Function):  # type: ignore[misc]
    """wait(residual) -> residual. Its gradient does not go on to the residual: it waits until the norm takes it."""

    @staticmethod
    def forward(ctx: Any, residual: torch.Tensor) -> torch.Tensor:
        """Remember where the residual is, which is where the norm's input is."""
        ctx.place = residual.data_ptr()
        return residual.view_as(residual)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        """RuntimeError: the norm before has not taken the gradient that waited for it."""
        if WAITING:
            raise RuntimeError(
                "fused_residual_add: no norm has taken a residual's gradient; set optimizations.fused_residual_add = false"
            )
        WAITING[ctx.place] = gradient


def adding(backward: Any, backward_add: Any) -> Any:
    """The norm's backward pass, which adds the gradient that waits for its input."""

    @functools.wraps(backward)
    def run(gradient: torch.Tensor, normed: torch.Tensor, *args: Any) -> Any:
        waiting = WAITING.pop(normed.data_ptr(), None)
        if waiting is None:
            return backward(gradient, normed, *args)
        return backward_add(gradient, normed, waiting.contiguous().view(normed.shape), *args)

    return run
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/fused_rotary.py <<'END_OF_FTGEN_FILE' || return
"""Split queries, keys and values, and rotate those of packed sequences, with a kernel of ftgen, in Triton.

In: a recipe with packed data. Out: the recipe; Megatron-Core is changed for this process.

Megatron-Core splits the output of the projection, copies the queries and the values so that they are contiguous, rotates
queries and keys in a kernel each, and in the backward pass joins three gradients with a copy. Here one kernel does all of
it, and one more in the backward pass.
"""

import functools
from typing import Any

from runtime.engines.nemo.optimizations import needs
from runtime.engines.nemo.optimizations.packs import bounds_of


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "triton:jit",
        "megatron.core.transformer.attention:SelfAttention.forward(rotary_pos_emb)",
        "megatron.core.transformer.attention:SelfAttention.forward(packed_seq_params)",
        "megatron.core.transformer.attention:SelfAttention.get_query_key_value_tensors",
    )


def apply(_recipe: Any, _plan: dict[str, Any]) -> None:
    """Put the kernels in the place of Megatron-Core's. Call it once, before the model is built. Requires CP = 1."""
    from megatron.core.transformer.attention import SelfAttention

    SelfAttention.forward = _with_rotation_in_the_split(SelfAttention.forward)
    SelfAttention.get_query_key_value_tensors = _split_and_rotated(SelfAttention.get_query_key_value_tensors)


def _with_rotation_in_the_split(stock: Any) -> Any:
    @functools.wraps(stock)
    def forward(self: Any, *args: Any, rotary_pos_emb: Any = None, packed_seq_params: Any = None, **kwargs: Any) -> Any:
        """Hand the angles of packed sequences to `get_query_key_value_tensors` instead of the stock rotation."""
        self.rotation = None
        if packed_seq_params is not None and _is_plain(self, rotary_pos_emb):
            self.rotation = rotary_pos_emb, bounds_of(packed_seq_params)
            rotary_pos_emb = None
        return stock(self, *args, rotary_pos_emb=rotary_pos_emb, packed_seq_params=packed_seq_params, **kwargs)

    return forward


def _is_plain(attention: Any, angles: Any) -> bool:
    """Whether all of each head is rotated, in halves, queries and keys by the same angles, and nothing is normed before."""
    return (
        hasattr(angles, "shape")
        and angles.shape[-1] == attention.hidden_size_per_attention_head
        and not attention.config.rotary_interleaved
        and all(
            norm is None or type(norm).__name__ == "IdentityOp" for norm in (attention.q_layernorm, attention.k_layernorm)
        )
    )


def _split_and_rotated(stock: Any) -> Any:
    from runtime.engines.rotary import SplitAndRotate

    @functools.wraps(stock)
    def tensors(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Queries, keys and values, [tokens, 1, heads, size] each; rotated if `forward` has handed on a rotation."""
        if self.rotation is None:
            return stock(self, hidden_states, *args, **kwargs)
        angles, cu_seqlens = self.rotation
        mixed, _ = self.linear_qkv(hidden_states)  # [tokens, 1, features]
        parts = SplitAndRotate.apply(mixed.view(len(mixed), self.num_query_groups_per_partition, -1), cu_seqlens, angles)
        return tuple(part.unsqueeze(1) for part in parts)

    return tensors
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/optimizations/fused_swiglu.py <<'END_OF_FTGEN_FILE' || return
"""Use Transformer Engine's fused SwiGLU, which in FP8 includes the cast, and correct two errors of it that SFT meets.

In: a recipe. Out: the recipe with the op fuser on for the MLP; for SFT in FP8 also Transformer Engine, changed for this
process.

1. Transposes that nobody wrote. To compute the gradient of a weight, Transformer Engine needs the transpose of the FP8
input and of the FP8 gradient. On Hopper, the kernels of SwiGLU write no transpose (before Transformer Engine 2.12), but
their result says that it has one: the gradients of both weights came from memory that contained anything. Here SwiGLU is
not asked for a transpose, so the linear layer makes it. LoRA freezes these weights and needs no transpose. The norm does
write one, but the linear layer does not see it and makes another. So the norm is not asked for one either.

2. Scales of FP8 weights. The fused MLP has scales of its own. They begin with 1 and know no largest value of the weights
before the optimizer's first step, which would round the weights to a few bits. Here they continue those of the weights.
"""

from typing import Any

from runtime.engines.nemo.optimizations import needs, op_fuser


def missing(recipe: Any, plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing. For SFT in FP8, also what the corrections change."""
    corrected = (
        "transformer_engine.pytorch.ops.basic.activation:SwiGLU._activation_forward_impl",
        "transformer_engine.pytorch.ops.basic.activation:SwiGLU._activation_backward_impl",
        "transformer_engine.pytorch.ops.basic.rmsnorm:rmsnorm_fwd",
        "transformer_engine.pytorch.ops:BasicLinear.reset_recipe_state(recipe)",
        "transformer_engine.pytorch.tensor.float8_tensor:Float8Quantizer.set_usage(columnwise)",
    )
    return op_fuser.missing(recipe, plan) or needs.missing(*(corrected if _trains_fp8_weights(plan) else ()))


def apply(recipe: Any, plan: dict[str, Any]) -> None:
    """Switch the op fuser on for the MLP. Adapters are not fused, unless the plan also has op_fuser on."""
    recipe.model.config.use_transformer_engine_op_fuser = True
    if _trains_fp8_weights(plan):
        transpose_in_linear()
        keep_weight_scales()
    if plan["scheme"] == "lora" and not plan["optimizations"]["op_fuser"]:
        from nemo.collections.llm.peft import lora

        lora.HAVE_TE_FUSED_LORA = False  # otherwise the setting would also fuse the adapters, which rounds their input


def _trains_fp8_weights(plan: dict[str, Any]) -> bool:
    return (plan["scheme"], plan["precision"]) == ("sft", "fp8")


def transpose_in_linear() -> None:
    """Let SwiGLU and the norm write no transposes of what they write in FP8. Call it once, before the first step."""
    from transformer_engine.pytorch.ops.basic import rmsnorm
    from transformer_engine.pytorch.ops.basic.activation import SwiGLU

    rmsnorm.rmsnorm_fwd = _rows_only(rmsnorm.rmsnorm_fwd)
    SwiGLU._activation_forward_impl = _rows_only(SwiGLU._activation_forward_impl)
    SwiGLU._activation_backward_impl = _rows_only(SwiGLU._activation_backward_impl)


def _rows_only(kernel: Any) -> Any:
    """The kernel, called with a quantizer that asks for no transpose. One of its arguments is the quantizer, or none is."""

    def write_rows(*arguments: Any) -> Any:
        quantizer = next((argument for argument in arguments if hasattr(argument, "columnwise_usage")), None)
        if quantizer is None:
            return kernel(*arguments)
        wanted = quantizer.columnwise_usage
        quantizer.set_usage(columnwise=False)
        written = kernel(*arguments)
        quantizer.set_usage(columnwise=wanted)
        return written

    return write_rows


def keep_weight_scales() -> None:
    """Let a fused linear layer continue the scale and the largest value of its FP8 weight. Call it once."""
    from transformer_engine.pytorch.ops import BasicLinear

    BasicLinear.reset_recipe_state = _with_weight_scale(BasicLinear.reset_recipe_state)


def _with_weight_scale(reset: Any) -> Any:
    def reset_and_continue(self: Any, *, recipe: Any) -> None:
        before = _quantizer(self)
        reset(self, recipe=recipe)
        after = _quantizer(self)
        if hasattr(before, "amax") and hasattr(after, "amax") and before.amax.data_ptr() != after.amax.data_ptr():
            after.scale.copy_(before.scale)
            after.amax.copy_(before.amax)

    return reset_and_continue


def _quantizer(linear: Any) -> Any:
    """Of the layer's weight; None if it has no weight yet, or none in FP8."""
    return getattr(getattr(linear, "weight", None), "_quantizer", None)
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
    cat >"$1"/runtime/engines/nemo/optimizations/loss_tokens_in_last_layer.py <<'END_OF_FTGEN_FILE' || return
"""Compute what follows the attention of the last layer only for tokens that have a loss.

In: a recipe in which loss_tokens_only is on. Out: the recipe, with steps that prepare the model's last layer.

The attention of the last layer needs the keys and values of all tokens. After it, each token goes its own way, and only
those with a loss go on to the LM head: the others' results are not read, and their gradients are zero. Here the output of
the attention and the residual are cut to the rows with a loss before the layer's output projection.

The number of rows changes from one micro-batch to the next, so this layer is no CUDA graph. In FP8, the scales of the inputs
of its output projection and MLP come from the rows with a loss alone.
"""

import functools
from typing import Any

import torch

from runtime.engines import loss_rows
from runtime.engines.nemo.optimizations import loss_tokens_only, needs


def missing(recipe: Any, plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    graphs = ("megatron.core.transformer.cuda_graphs:_determine_if_first_last_layer_of_this_vp_chunk",)
    return loss_tokens_only.missing(recipe, plan) or needs.missing(
        "megatron.core.fusions.fused_bias_dropout:get_bias_dropout_add",
        "megatron.core.transformer.transformer_layer:TransformerLayer._forward_mlp",
        *(graphs if plan["optimizations"]["cuda_graphs"] else ()),
    )


def apply(recipe: Any, plan: dict[str, Any]) -> None:
    """Make the recipe's forward step prepare the last layer. Requires TP = PP = CP = 1."""
    recipe.model.config.forward_step_fn = forward_step
    if plan["optimizations"]["cuda_graphs"]:
        from megatron.core.transformer import cuda_graphs

        stock = cuda_graphs._determine_if_first_last_layer_of_this_vp_chunk
        cuda_graphs._determine_if_first_last_layer_of_this_vp_chunk = _with_last_graph_before(stock)


def forward_step(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """NeMo's forward step, with the last layer prepared before the first one."""
    prepare(loss_rows.gpt_of(model))
    return loss_tokens_only.forward_step(model, batch)


def prepare(gpt: Any) -> None:
    """Make the last layer of a GPTModel return [rows, 1, hidden], for the rows of `loss_rows.give`. Does it once."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    if gpt.rows_are_picked:
        return
    gpt.rows_are_picked = True
    layer = gpt.decoder.layers[-1]
    if hasattr(layer, "cudagraph_manager"):
        del layer.cudagraph_manager

    def picked_attention(_projection: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return loss_rows.pick(inputs[0], gpt.loss_rows), *inputs[1:]

    def add_picked_residual(*args: Any) -> Any:
        add = get_bias_dropout_add(*args)

        @functools.wraps(add)
        def added(output: Any, residual: torch.Tensor, probability: float) -> Any:
            return add(output, loss_rows.pick(residual, gpt.loss_rows), probability)

        return added

    layer.self_attention.linear_proj.register_forward_pre_hook(picked_attention)
    layer.self_attn_bda = add_picked_residual  # not that of fused_residual_add: the norm's input is no longer the residual


def _with_last_graph_before(stock: Any) -> Any:
    """Megatron-Core's answer whether a layer is the first and the last of the graphs: the last layer is none of them."""

    @functools.wraps(stock)
    def is_first_and_last(layer: Any) -> tuple[bool, bool]:
        first, _ = stock(layer)
        return first, layer.layer_number == layer.config.num_layers - 1

    return is_first_and_last
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


def bounds_of(packed_seq_params: Any) -> torch.Tensor:
    """The boundaries of the sequences, with their padding, as Megatron-Core hands them on: int32, on the GPU."""
    padded = packed_seq_params.cu_seqlens_q_padded
    bounds: torch.Tensor = packed_seq_params.cu_seqlens_q if padded is None else padded
    return bounds
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
    cat >"$1"/runtime/engines/nemo/optimizations/short_attention.py <<'END_OF_FTGEN_FILE' || return
"""Compute the attention of packed sequences with kernels of ftgen, in Triton, which are faster for short sequences.

In: a recipe with packed data. Out: the recipe; Megatron-Core is changed for this process.

cuDNN's kernels, which Transformer Engine uses, work on each sequence as if it were as long as the longest one, and spread
the backward pass over five kernels. runtime/engines/short_attention.py has the kernels.
"""

import functools
from pathlib import Path
from typing import Any

from runtime.engines import padding
from runtime.engines.nemo.optimizations import needs
from runtime.engines.nemo.optimizations.packs import bounds_of
from runtime.job.progress import say

LONGEST = 512  # tokens: cuDNN is faster if there are longer examples


def missing(_recipe: Any, _plan: dict[str, Any]) -> str:
    """What the installed packages lack; "" if they lack nothing."""
    return needs.missing(
        "triton:jit",
        "megatron.core.extensions.transformer_engine:TEDotProductAttention.forward(packed_seq_params)",
        "nemo.collections.llm.gpt.data.packed_sequence:PackedSequenceSpecs.packed_metadata_path",
    )


def apply(recipe: Any, _plan: dict[str, Any]) -> None:
    """Put the kernels in the place of Transformer Engine's, unless an example is long. Requires packed data and CP = 1.

    Call it once, before the model is built.
    """
    longest = padding.longest_sequence(Path(recipe.data.packed_sequence_specs.packed_metadata_path))
    if longest > LONGEST:
        say(f"short_attention: not used, because an example has {longest} tokens: above {LONGEST}, cuDNN is faster")
        return
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    TEDotProductAttention.forward = with_own_kernels(TEDotProductAttention.forward)


def with_own_kernels(stock: Any) -> Any:
    """The forward pass of Megatron-Core's attention: the kernels for packed sequences that they know, else its own."""
    from runtime.engines.short_attention import Attend

    @functools.wraps(stock)
    def forward(
        self: Any, query: Any, key: Any, value: Any, *args: Any, packed_seq_params: Any = None, **kwargs: Any
    ) -> Any:
        """[tokens, heads * size] of query [tokens, heads, size], key and value [tokens, groups, size]."""
        if packed_seq_params is None or not _is_known(self, query, key, value):
            return stock(self, query, key, value, *args, packed_seq_params=packed_seq_params, **kwargs)
        scale = getattr(self, "softmax_scale", None) or query.shape[-1] ** -0.5
        return Attend.apply(query, key, value, bounds_of(packed_seq_params), scale).flatten(1)

    return forward


def _is_known(attention: Any, query: Any, key: Any, value: Any) -> bool:
    """Whether the mask is causal without a window, nothing is dropped, and all sizes are powers of two."""
    sizes = query.shape[-1], query.shape[1] // key.shape[1]
    config = attention.config
    return (
        key.shape == value.shape
        and all(size & (size - 1) == 0 for size in sizes)
        and not config.attention_dropout
        and not getattr(config, "window_size", None)
        and "causal" in str(getattr(attention, "attn_mask_type", "causal"))
    )
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

import fiddle
import nemo_run as run
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from megatron.core.distributed import DistributedDataParallelConfig
from nemo import lightning as nl
from nemo.collections.llm.gpt.data.fine_tuning import FineTuningDataModule
from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs
from nemo.collections.llm.recipes.precision.mixed_precision import bf16_with_fp8_mixed
from nemo.lightning import _strategy_lib

from runtime.data.prepare import Files
from runtime.data.split import is_recipes
from runtime.engines import plan_values

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
    if model["nemo_recipe"].startswith("mistral"):
        # NeMo's Mistral 7B has the sliding window of v0.1. Later versions have none (sliding_window in config.json).
        config.window_size = None
    config.seq_length = recipe.data.seq_length = plan["seq_length"]
    # some of NeMo's recipes count embedding and loss as pipeline layers; the plan counts only transformer layers
    for key in ("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"):
        if hasattr(config, key):  # since NeMo 2.2
            setattr(config, key, False)


def _set_scheme(recipe: Any, plan: Plan) -> None:
    if plan["scheme"] == "lora":
        plan_values.set_lora(recipe.peft, plan)


def _set_optimizer(recipe: Any, plan: Plan) -> None:
    recipe.optim.config.lr = plan["optimizer"]["learning_rate"]
    recipe.optim.lr_scheduler.warmup_steps = plan_values.warmup_steps(plan)


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
    root, packs, ending = files.examples, files.packed, "npy"
    if not is_recipes(plan):
        from runtime.engines.nemo.data import TokensDataModule  # NeMo 2.3 and later have what it derives from

        fiddle.update_callable(recipe.data, TokensDataModule)
        root, packs, ending = files.tokens, files.tokens, "packs.npy"
    elif not hasattr(recipe.data, "dataset_root"):
        recipe.data = run.Config(FineTuningDataModule, **recipe.data.__arguments__)
    recipe.data.dataset_root = str(root)
    recipe.data.seed = plan["seed"]
    recipe.data.global_batch_size = plan["global_batch_size"]
    recipe.data.micro_batch_size = plan["micro_batch_size"]
    if packs and plan["data"]["packed"]:
        recipe.data.packed_sequence_specs = run.Config(
            PackedSequenceSpecs,
            packed_sequence_size=plan["seq_length"],
            packed_train_data_path=str(packs / f"training.{ending}"),
            packed_val_data_path=str(packs / f"validation.{ending}"),
        )
        if (packs / "metadata.json").is_file():  # since NeMo 2.2
            recipe.data.packed_sequence_specs.packed_metadata_path = str(packs / "metadata.json")


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

    for key, value in (cpu.plain() | {"params_dtype": torch.float32}).items():  # NeMo's config of Mistral 7B has bfloat16
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
    cat >"$1"/runtime/engines/nemo/resume.py <<'END_OF_FTGEN_FILE' || return
"""Resume a training from a checkpoint, so that it trains exactly what an uninterrupted one does.

In: a recipe and a checkpoint. Out: the recipe, changed, and NeMo, changed for this process.

NeMo 2.7.3 alone resumes on wrong data. Five things are changed (a test compares each loss, learning rate and batch):

1. Length of the data. Lightning counts batches from the start of the run, NeMo's sampler those that are left. The
   resumed epoch ended early, and the data began again.
2. The checkpoint is the one that ftgen has chosen. NeMo's own choice fails if its newest copy is half-written.
3. Base weights and tokenizer come from the converted checkpoint, which stays. NeMo takes the tokenizer from the
   checkpoint before, which may be deleted; and with LoRA it takes the base from the path that it once had.
4. Random numbers. NeMo saves no state of the generators. With dropout, each step gets a seed of its own.
5. Scales of FP8. With LoRA, NeMo saves the adapters alone. The scales and the amax history of the frozen layers are saved
   with them. Not measured yet: the plan's rules refuse FP8 until bench/resume.py has shown that it resumes exactly.

This module imports NeMo, so only a training imports it.
"""

from pathlib import Path
from typing import Any

import nemo_run as run
from lightning.pytorch.callbacks import Callback
from nemo import lightning as nl
from nemo.collections.common.data.data_samplers import MegatronPretrainingBatchSampler
from nemo.lightning import megatron_init
from nemo.lightning.pytorch.callbacks import PEFT
from nemo.lightning.resume import AdapterPath

Plan = dict[str, Any]


def prepare(recipe: Any, plan: Plan) -> None:
    """Make a run resumable. This concerns its first attempt as well: all attempts must train alike."""
    MegatronPretrainingBatchSampler.__len__ = _whole_length
    if plan["lora"] and plan["precision"] == "fp8":
        PEFT.adapter_key_filter = _with_scales(PEFT.adapter_key_filter)
    if plan["lora"] and plan["lora"]["dropout"]:
        recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), run.Config(Reseed, plan["seed"])]


def resume(recipe: Any, checkpoint: Path) -> None:
    """Make the recipe go on from a checkpoint."""
    recipe.resume = run.Config(Resume, restore_config=recipe.resume.restore_config, resume_from_path=str(checkpoint))


class Reseed(Callback):  # type: ignore[misc]
    """Seeds the random numbers before each step, from the step's number."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Any, *_args: Any) -> None:
        """Seed the generators as NeMo does at the start of a run."""
        megatron_init._set_random_seed(self.seed + 1 + trainer.global_step)


class Resume(nl.AutoResume):  # type: ignore[misc]
    """Resumes from `resume_from_path`, with base weights and tokenizer from `restore_config.path`."""

    def get_trainer_ckpt_path(self, _model: Any = None) -> Path:
        """The weights of the checkpoint; for adapters, also the path of the base weights."""
        weights = Path(self.resume_from_path) / "weights"
        if (weights / "adapter_metadata.json").exists():
            return AdapterPath(weights, base_model_path=Path(self.restore_config.path))  # type: ignore[no-any-return]
        return weights

    def get_context_path(self, _model: Any = None) -> Path:
        """Where the tokenizer is."""
        return Path(self.restore_config.path) / "context"


def _with_scales(is_adapter: Any) -> Any:
    def is_saved(self: Any, key: Any) -> bool:
        """Whether a LoRA checkpoint has this key: a weight of an adapter, or the FP8 state of any layer."""
        return is_adapter(self, key) or (isinstance(key, str) and key.endswith("_extra_state"))

    return is_saved


def _whole_length(sampler: Any) -> int:
    """Number of batches from the start of the run, as `MegatronPretrainingBatchSampler.__len__`."""
    whole, left = divmod(sampler.total_samples, sampler.global_batch_size)
    return int(whole + (1 if left and not sampler.drop_last else 0))
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/save.py <<'END_OF_FTGEN_FILE' || return
"""Save a NeMo training while it runs, with a Lightning callback. runtime/engines/saving.py has what both engines share.

In: a recipe, and what is saved where (`Saves`). Out: the recipe with a callback.

NeMo's own ModelCheckpoint is not used. If it is killed while it writes its second copy, `-last`, no resume is possible.

This module imports Lightning, so only a training imports it.
"""

import queue
from pathlib import Path
from typing import Any

import nemo_run as run
from lightning.pytorch.callbacks import Checkpoint
from megatron.core.dist_checkpointing.strategies import filesystem_async

from runtime.engines.saving import Saves, Saving
from runtime.job import stop


def add(recipe: Any, saves: Saves) -> None:
    """Add the callback to the recipe."""
    recipe.trainer.enable_checkpointing = True
    recipe.trainer.strategy.ckpt_async_save = False
    filesystem_async._results_queue = queue.Queue()  # Megatron's own is a server process, for asynchronous saves
    recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), run.Config(Save, tuple(saves))]


class Save(Checkpoint):  # type: ignore[misc]
    """Calls `Saving` when Lightning begins and ends a step.

    Lightning calls a `Checkpoint` after all other callbacks. So NeMo's timer has stopped when a save begins: the times of
    the step lines are without saves.
    """

    last_model_path = ""  # NeMo sets it when it resumes

    def __init__(self, saves: tuple[Any, ...]) -> None:
        self.saving = Saving(Saves(*saves))
        self.waiting = False  # for a validation, before the save

    def on_train_start(self, *_args: Any) -> None:
        """Before the first step."""
        self.saving.begin()

    def on_train_batch_start(self, trainer: Any, *_args: Any) -> None:
        """Before a step."""
        self.saving.before_step(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_args: Any) -> None:
        """Save, if it is time to. If this step is validated too, do it after the validation.

        A run that is resumed does not repeat the validation of the step that it goes on from.
        """
        if self.saving.after_step(trainer.global_step):
            loop = trainer.fit_loop
            self.waiting = loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
            if not self.waiting:
                self._save(trainer)

    def on_validation_end(self, trainer: Any, *_args: Any) -> None:
        """Save, if a save waited for this validation."""
        if self.waiting:
            self.waiting = False
            self._save(trainer)

    def on_save_checkpoint(self, _trainer: Any, _module: Any, checkpoint: dict[str, Any]) -> None:
        """Count the current batch as completed. Lightning does so only after this callback.

        A resumed run would count one batch less, and validate one step later than it should.
        """
        for part in ("total", "current"):
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"][part]
            progress["completed"] = progress["processed"]

    def _save(self, trainer: Any) -> None:
        def write(folder: Path) -> None:
            trainer.save_checkpoint(folder, weights_only=False)

        if finish := getattr(trainer.progress_bar_callback, "finish", None):  # with the optimization async_step
            finish()
        self.saving.save(trainer.global_step, write)
        if self.saving.stopping:
            raise SystemExit(stop.AGAIN)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/step_ends.py <<'END_OF_FTGEN_FILE' || return
"""Tell the telemetry of this node when steps of a NeMo training end, with a Lightning callback.

In: a recipe. Out: the recipe with the callback.

This module imports Lightning, so only a training imports it.
"""

from typing import Any

import nemo_run as run
from lightning.pytorch.callbacks import Callback

from runtime.node import telemetry


def add(recipe: Any) -> None:
    """Add the callback, if this process has a sampler."""
    if telemetry.is_on():
        recipe.trainer.callbacks = [*(recipe.trainer.callbacks or []), run.Config(TellSteps)]


class TellSteps(Callback):  # type: ignore[misc]
    """Tells the sampler which step ends."""

    def on_train_batch_start(self, trainer: Any, *_args: Any) -> None:
        """Before a step."""
        telemetry.before_step(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_args: Any) -> None:
        """After a step, which Lightning has already counted."""
        telemetry.after_step(trainer.global_step - 1)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/trackers.py <<'END_OF_FTGEN_FILE' || return
"""Send the metrics of a NeMo training to TensorBoard, Weights & Biases or MLflow, with the loggers of Lightning.

In: a recipe, and a plan with `log`. Out: the recipe with loggers. Lightning calls them on rank 0 alone.
"""

import importlib
from pathlib import Path
from typing import Any

from runtime.engines.trackers import asked, mlflow_address, run_name, tell

Plan = dict[str, Any]
# Packages that would be imported late (imports.py): Lightning compares their classes.
IMPORTED = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def before_imports(plan: Plan) -> None:
    """Import what must not be deferred. Call it before `imports.defer`."""
    for name in asked(plan):
        if name in IMPORTED:
            importlib.import_module(IMPORTED[name])


def add(recipe: Any, plan: Plan, directory: Path, step: int) -> None:
    """Add the loggers. `directory` is the run directory, `step` the number of steps that earlier attempts made and saved."""
    folder = directory / "trackers"
    offline = bool(tell(plan, folder))
    make = {
        "tensorboard": lambda: _tensorboard(folder, step),
        "wandb": lambda: _wandb(folder, plan["log"]["wandb"]["project"], offline),
        "mlflow": lambda: _mlflow(folder, plan["log"]["mlflow"]["experiment"]),
    }
    recipe.trainer.logger = [make[name]() for name in asked(plan)]
    recipe.log.update_logger_directory = False


def _tensorboard(folder: Path, step: int) -> Any:
    import nemo_run as run
    from lightning.pytorch.loggers import TensorBoardLogger

    # what an attempt before has written after its last checkpoint does not count
    return run.Config(TensorBoardLogger, save_dir=str(folder), name="tensorboard", version="", purge_step=step or None)


def _wandb(folder: Path, project: str, offline: bool) -> Any:
    import nemo_run as run
    from lightning.pytorch.loggers import WandbLogger

    mode = {"offline": True} if offline else {}
    name = run_name(folder)
    return run.Config(WandbLogger, save_dir=str(folder), project=project, name=name, id=name, resume="allow", **mode)


def _mlflow(folder: Path, experiment: str) -> Any:
    import nemo_run as run

    from runtime.engines.nemo.mlflow_run import ContinuedRun

    return run.Config(
        ContinuedRun,
        id_file=str(folder / "mlflow_run_id"),
        experiment_name=experiment,
        run_name=run_name(folder),
        tracking_uri=mlflow_address(folder),
    )
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/nemo/train.py <<'END_OF_FTGEN_FILE' || return
"""Train: one process per rank.

In: a plan, and the rank of this process in the environment. Out: NeMo's own step lines on stdout.

Environment: RANK, LOCAL_RANK, WORLD_SIZE, NODE_RANK, MASTER_ADDR, MASTER_PORT (defaults for a single process: 0, 0,
1, 0, this machine, a free port); FTGEN_RUN_DIR, where NeMo writes (default $STAGE_PATH/logs).
"""

import os
from typing import Any

from runtime.data import report
from runtime.data.prepare import prepare
from runtime.engines import attempt
from runtime.engines.nemo import compatibility, convert, imports, trackers
from runtime.engines.nemo.optimizations import switch
from runtime.engines.trackers import asked
from runtime.job import environment, profile, ranks
from runtime.job.errors import JobError
from runtime.job.places import run_directory
from runtime.job.progress import say, timed
from runtime.node import beside, telemetry
from runtime.weights import read_ahead

Plan = dict[str, Any]


def train(plan: Plan) -> int:
    """Train the plan's steps or epochs; exit code 0. JobError: no checkpoint, no GPU, a wrong WORLD_SIZE, faulty data."""
    ranks.set_defaults(plan)
    profile.enter(plan)
    weights = convert.directory(plan)
    if not convert.converted(plan):
        raise JobError(f"there is no converted checkpoint in {weights}", "run the command convert first")
    this = attempt.begin(plan) if plan.get("save") else None
    if this and this.step == attempt.steps(plan):
        say("the run is complete: its last step is saved")
        return 0
    telemetry.begin(plan)
    read_ahead.begin(weights / "weights")
    with beside.checked(plan), timed("importing NeMo"):
        _set_variables(plan)
        switch.before_imports(plan)
        trackers.before_imports(plan)
        imports.defer()
        import fiddle
        import torch

        from runtime.engines.nemo import profiling, recipe, step_ends, validate

        compatibility.after_imports()
    if plan["gpu"]["name"] == "cpu":
        from runtime.engines.nemo import cpu

        cpu.stand_in()
    elif not torch.cuda.is_available():
        raise JobError("PyTorch finds no GPU in this process", 'see nvidia-smi; gpu = "cpu" in the spec needs no GPU')
    off = switch.unavailable(recipe.stock(plan, run_directory()), plan)
    environment.tell(plan, off)
    files = prepare(plan, weights / "context" / "nemo_tokenizer")
    plan = report.planned(plan, files.tokens)
    recipe_of_run = recipe.build(plan, weights, files, run_directory())
    switch.apply(recipe_of_run, plan, off)
    profiling.add(recipe_of_run, plan)
    step_ends.add(recipe_of_run)
    if asked(plan):
        trackers.add(recipe_of_run, plan, run_directory(), this.step if this else 0)
    if plan.get("validation"):
        validate.add(recipe_of_run, plan)
    if this:
        from runtime.engines.nemo import resume, save  # NeMo before 2.6 lacks what they import

        saves = attempt.saves(plan, this, files)
        resume.prepare(recipe_of_run, plan)
        if this.checkpoint:
            resume.resume(recipe_of_run, this.checkpoint.path)
        save.add(recipe_of_run, saves)
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
    cat >"$1"/runtime/engines/nemo/validate.py <<'END_OF_FTGEN_FILE' || return
"""Compute the loss of the held-out examples while a training runs.

In: a recipe, a plan with `validation`. Out: the recipe, which validates every N steps and after the last one; a line in
the log for each validation.

NeMo leaves out what does not fill a global batch. The line says how many sequences counted.

This module imports Lightning, so only a training imports it.
"""

import time
from typing import Any

import nemo_run as run
from lightning.pytorch.callbacks import Callback

from runtime.job.progress import say

Plan = dict[str, Any]


def add(recipe: Any, plan: Plan) -> None:
    """Switch validation on. It does not change what is trained: no random number and no sample is used up."""
    trainer = recipe.trainer
    trainer.limit_val_batches = 1.0
    trainer.num_sanity_val_steps = 0
    trainer.val_check_interval = plan["validation"]["every_steps"]
    trainer.check_val_every_n_epoch = None  # the interval counts steps of the whole run, not of an epoch
    trainer.callbacks = [*(trainer.callbacks or []), run.Config(Validate, plan["global_batch_size"])]


class Validate(Callback):  # type: ignore[misc]
    """Validates after the last step, and writes a line for each validation."""

    def __init__(self, global_batch_size: int) -> None:
        self.global_batch_size = global_batch_size
        self.began = 0.0
        self.batches = 0

    def on_train_batch_end(self, trainer: Any, *_args: Any) -> None:
        """After the last step, Lightning validates if it is told to stop."""
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True

    def on_validation_start(self, *_args: Any) -> None:
        """Note the time."""
        self.began, self.batches = time.monotonic(), 0

    def on_validation_batch_end(self, *_args: Any) -> None:
        """Count a global batch."""
        self.batches += 1

    def on_validation_end(self, trainer: Any, *_args: Any) -> None:
        """Write the loss, with all its digits."""
        loss, took_s = float(trainer.callback_metrics["val_loss"]), time.monotonic() - self.began
        counted = f"{self.batches * self.global_batch_size} sequences"
        say(f"validation after step {trainer.global_step}: loss {loss:.7g} over {counted} in {took_s:.2f} s")
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
    cat >"$1"/runtime/engines/plan_values.py <<'END_OF_FTGEN_FILE' || return
"""Values of the plan that both engines set in their recipe.

In: a plan. Out: the adapter's values in a recipe, the number of warmup steps.
"""

from typing import Any

from runtime.job.progress import say

Plan = dict[str, Any]


def set_lora(peft: Any, plan: Plan) -> None:
    """Set rank, alpha, dropout and targets; both engines name them alike."""
    peft.dim = plan["lora"]["rank"]
    peft.alpha = plan["lora"]["alpha"]
    peft.dropout = plan["lora"]["dropout"]
    peft.target_modules = plan["lora"]["targets"]


def warmup_steps(plan: Plan) -> int:
    """The plan's warmup steps, but fewer than the steps: Megatron-Core's scheduler requires that."""
    warmup: int = min(plan["optimizer"]["warmup_steps"], plan["max_steps"] - 1)
    if warmup != plan["optimizer"]["warmup_steps"]:
        say(f"warmup is shortened to {warmup} steps, because max_steps = {plan['max_steps']}")
    return warmup
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/rotary.py <<'END_OF_FTGEN_FILE' || return
"""Split queries, keys and values, and rotate the queries and keys of packed sequences: two Triton kernels.

In: the output of the layer that projects to queries, keys and values, and the angles of each position. Out: queries, keys
and values, each contiguous, as attention reads them. With autograd.

A program of a kernel moves all heads of one token. It computes the sines and cosines of the token once, in float32, as
Transformer Engine's kernel does. Measured in docs/performance.md.

This module imports Triton, so only a training on a GPU imports it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class SplitAndRotate(torch.autograd.Function):  # type: ignore[misc]
    """split(mixed [tokens, groups, (n + 2) * size], cu_seqlens [sequences + 1], angles [positions, ..., size]) -> q, k, v.

    A group has the n heads of its queries, then its key, then its value. Queries: [tokens, groups * n, size]; keys and
    values: [tokens, groups, size].
    """

    @staticmethod
    def forward(ctx: Any, mixed: torch.Tensor, cu_seqlens: torch.Tensor, angles: torch.Tensor) -> Parts:
        """Split, and rotate by the angle of the position in the own sequence."""
        mixed = mixed.contiguous()
        tokens, groups, width = mixed.shape
        size = angles.shape[-1]
        ctx.save_for_backward(cu_seqlens, angles)
        queries = mixed.new_empty(tokens, groups * (width // size - 2), size)
        keys, values = mixed.new_empty(tokens, groups, size), mixed.new_empty(tokens, groups, size)
        _launch(_split, mixed, (queries, keys, values), cu_seqlens, angles)
        return queries, keys, values

    @staticmethod
    def backward(
        ctx: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        """Rotate the gradients back, and join them: the inverse of a rotation is its transpose."""
        cu_seqlens, angles = ctx.saved_tensors
        tokens, groups, size = keys.shape
        mixed = keys.new_empty(tokens, groups, (queries.shape[1] // groups + 2) * size)
        _launch(_join, mixed, (queries.contiguous(), keys.contiguous(), values.contiguous()), cu_seqlens, angles)
        return mixed, None, None


def _launch(kernel: Any, mixed: torch.Tensor, parts: Parts, cu_seqlens: torch.Tensor, angles: torch.Tensor) -> None:
    tokens, groups, width = mixed.shape
    slots = width // angles.shape[-1]
    kernel[(tokens,)](
        mixed,
        *parts,
        cu_seqlens,
        angles,
        angles.stride(0),
        cu_seqlens.numel(),
        groups=groups,
        slots=slots,
        half=angles.shape[-1] // 2,
        padded_heads=triton.next_power_of_2(groups * slots),
        padded_bounds=triton.next_power_of_2(cu_seqlens.numel()),
        num_warps=8,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _angle(token, cu_seqlens, angles, position_stride, bounds, half: tl.constexpr, padded_bounds: tl.constexpr):  # type: ignore[no-untyped-def]
    """The angles [half] of a token: those of its position in its own sequence."""
    bound = tl.arange(0, padded_bounds)
    begins = tl.load(cu_seqlens + bound, mask=bound < bounds, other=0)
    begin = tl.max(tl.where(begins <= token, begins, 0), axis=0)
    return tl.load(angles + (token - begin) * position_stride + tl.arange(0, half))


@triton.jit  # type: ignore[untyped-decorator]
def _places(token, groups: tl.constexpr, slots: tl.constexpr, half: tl.constexpr, padded_heads: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the heads of a token are: of each slot [heads, 1], what it holds; and offsets [heads, half] into the tensors."""
    head = tl.arange(0, padded_heads)[:, None]
    pair = tl.arange(0, half)[None, :]
    group, slot = head // slots, head % slots
    inside = head < groups * slots
    wide = token.to(tl.int64)
    mixed = (wide * (groups * slots) + head) * (2 * half) + pair
    query = (wide * (groups * (slots - 2)) + group * (slots - 2) + slot) * (2 * half) + pair
    other = (wide * groups + group) * (2 * half) + pair
    return inside & (slot < slots - 2), inside & (slot == slots - 2), inside & (slot == slots - 1), mixed, query, other


@triton.jit  # type: ignore[untyped-decorator]
def _split(  # type: ignore[no-untyped-def]
    mixed,
    queries,
    keys,
    values,
    cu_seqlens,
    angles,
    position_stride,
    bounds,
    groups: tl.constexpr,
    slots: tl.constexpr,
    half: tl.constexpr,
    padded_heads: tl.constexpr,
    padded_bounds: tl.constexpr,
):
    """Program t splits and rotates token t. The two halves of a head are the two coordinates of each rotation."""
    token = tl.program_id(0)
    angle = _angle(token, cu_seqlens, angles, position_stride, bounds, half, padded_bounds)
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    is_query, is_key, is_value, at, of_query, of_other = _places(token, groups, slots, half, padded_heads)
    inside = is_query | is_key | is_value
    first = tl.load(mixed + at, mask=inside, other=0.0)
    second = tl.load(mixed + at + half, mask=inside, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    low, high = (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(first.dtype)
    tl.store(queries + of_query, low, mask=is_query)
    tl.store(queries + of_query + half, high, mask=is_query)
    tl.store(keys + of_other, low, mask=is_key)
    tl.store(keys + of_other + half, high, mask=is_key)
    tl.store(values + of_other, first, mask=is_value)
    tl.store(values + of_other + half, second, mask=is_value)


@triton.jit  # type: ignore[untyped-decorator]
def _join(  # type: ignore[no-untyped-def]
    mixed,
    queries,
    keys,
    values,
    cu_seqlens,
    angles,
    position_stride,
    bounds,
    groups: tl.constexpr,
    slots: tl.constexpr,
    half: tl.constexpr,
    padded_heads: tl.constexpr,
    padded_bounds: tl.constexpr,
):
    """Program t rotates the gradients of token t back, and joins them: what `_split` does, the other way."""
    token = tl.program_id(0)
    angle = _angle(token, cu_seqlens, angles, position_stride, bounds, half, padded_bounds)
    cos, sin = tl.cos(angle)[None, :], tl.sin(angle)[None, :]
    is_query, is_key, is_value, at, of_query, of_other = _places(token, groups, slots, half, padded_heads)
    rotated = is_query | is_key
    first = tl.load(queries + of_query, mask=is_query, other=0.0)
    first += tl.load(keys + of_other, mask=is_key, other=0.0)
    first += tl.load(values + of_other, mask=is_value, other=0.0)
    second = tl.load(queries + of_query + half, mask=is_query, other=0.0)
    second += tl.load(keys + of_other + half, mask=is_key, other=0.0)
    second += tl.load(values + of_other + half, mask=is_value, other=0.0)
    a, b = first.to(tl.float32), second.to(tl.float32)
    low = tl.where(rotated, (a * cos + b * sin).to(first.dtype), first)
    high = tl.where(rotated, (b * cos - a * sin).to(first.dtype), second)
    tl.store(mixed + at, low, mask=rotated | is_value)
    tl.store(mixed + at + half, high, mask=rotated | is_value)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/saving.py <<'END_OF_FTGEN_FILE' || return
"""Save a training while it runs, and stop it between two steps when Slurm asks for that. This is the same for each engine.

In: what is saved where (`Saves`), the engine's steps, and its function that writes a checkpoint. Out: checkpoints as
checkpoints.py describes.

All ranks write their part of a checkpoint in Megatron's distributed format, and wait until it is on the disk. Rank 0
publishes it. Saving is synchronous: an asynchronous save that is killed leaves nothing, and its processes live on.

This module imports torch, so only a training imports it.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed import ReduceOp

from runtime.guard import checkpoints, publish
from runtime.job import stop
from runtime.job.errors import JobError
from runtime.job.progress import say, say_clock

CLOCK_S = 30.0  # between two lines with the time, about
# How torch and Megatron word a failed write: they do not hand on the error of the system.
DISK_ERRORS = ("No space left on device", "Disk quota exceeded", "unexpected pos")


class Saves(NamedTuple):
    """What is saved, where and when."""

    folder: str
    last_step: int  # number of steps of the run
    every_steps: int
    keep: int
    generation: int  # number of the claim of this job; 0 on all ranks but rank 0
    resumed: int  # step of the checkpoint that this job goes on from; 0 if it begins
    checkpoint_bytes: int  # estimated size of a checkpoint
    about: dict[str, Any]  # for the manifests
    lead_s: int  # seconds from Slurm's warning to the time limit; 0 outside of Slurm


class Saving:
    """Saves after every N steps, after the last one, and after the step in which the training is asked to stop."""

    def __init__(self, saves: Saves) -> None:
        self.saves = saves
        self.folder = Path(saves.folder)
        self.saved = saves.resumed  # step of the last checkpoint
        self.size = saves.checkpoint_bytes  # of the last checkpoint; before the first one, estimated
        self.stopping = False  # after the current step, although it is not the last one
        self.began = 0.0  # of the current step
        self.clock = 0.0  # of the last line with the time
        self.told = False  # that the lead time is too short

    def begin(self) -> None:
        """Before the first step: check that all ranks resume from the same step, and tell them the number of the claim."""
        stop.listen(signal.SIGUSR1, signal.SIGTERM)
        first, last = -_over_ranks(-self.saves.resumed), _over_ranks(self.saves.resumed)
        if first != last:
            raise JobError(
                f"the ranks see different checkpoints in {self.folder}: step {first} and step {last}",
                "the shared file system is late: submit the job again",
            )
        self.saves = self.saves._replace(generation=_over_ranks(self.saves.generation))
        self._tell_the_time(self.saves.resumed)

    def before_step(self, made: int) -> None:
        """Note the time, and write it now and then. `made` is the number of steps before this one."""
        self.began = time.monotonic()
        if self.began - self.clock > CLOCK_S:
            self._tell_the_time(made)

    def after_step(self, step: int) -> bool:
        """Whether to save now. All ranks agree, and stop after the same step."""
        asked = bool(_over_ranks(int(bool(stop.asked()))))
        self.stopping = asked and step < self.saves.last_step
        if self.stopping:
            say(f"asked to stop ({stop.asked() or 'another rank was'}): the run is saved after step {step}")
        return asked or step == self.saves.last_step or step % self.saves.every_steps == 0

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Save, on all ranks together. `write` writes all that a resume needs into a folder."""
        before_s = time.monotonic() - self.began  # the step, and its validation
        if step != self.saved:
            begin = time.monotonic()
            self.size = self._publish(step, write)
            took_s, gib = time.monotonic() - begin, self.size / 2**30
            say(f"saved step {step} in {took_s:.2f} s: checkpoints/{checkpoints.PREFIX}{step}, {gib:.3g} GiB")
            self._tell_the_time(step)
            self._warn_of_the_limit(before_s + took_s)
        self.saved = step
        if self.stopping:
            say(f"stopped after step {step} of {self.saves.last_step}: exit code {stop.AGAIN}, to be run again")

    def _publish(self, step: int, write: Callable[[Path], None]) -> int:
        """Write and publish the checkpoint of a step. Returns its size in bytes, on rank 0."""
        is_first, size = os.environ["RANK"] == "0", 0
        staging = checkpoints.staging(self.folder, step, self.saves.generation)
        try:
            if is_first:
                publish.require_space(self.folder, self.size, f"the checkpoint of step {step}")
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir()
            _wait_for_all()
            write(staging)
            if os.environ["LOCAL_RANK"] == "0":
                checkpoints.sync_files(staging)
            _wait_for_all()
            if is_first:
                size = checkpoints.publish_step(self.folder, step, self.saves.generation, self.saves.about)
                checkpoints.keep_newest(self.folder, self.saves.keep)
            _wait_for_all()
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)  # on a full disk, every byte counts
            if publish.is_disk_error(error) or any(words in str(error) for words in DISK_ERRORS):
                raise JobError(
                    f"the checkpoint of step {step} cannot be written: the disk or your quota is full: {self.folder}",
                    f"free some space. The run can go on after step {self.saved}",
                ) from error
            raise
        return size

    def _tell_the_time(self, step: int) -> None:
        self.clock = time.monotonic()
        say_clock(step)

    def _warn_of_the_limit(self, needed_s: float) -> None:
        if needed_s > self.saves.lead_s > 0 and not self.told:
            self.told = True
            say(
                f"warning: a step and its save take {needed_s:.0f} s, but Slurm warns only {self.saves.lead_s} s before the "
                f"time limit: set end_before_limit_s in the site profile to {2 * needed_s:.0f}"
            )


def _over_ranks(value: int) -> int:
    """The highest value of all ranks."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    highest = torch.tensor(value, device=torch.cuda.current_device(), dtype=torch.int64)
    torch.distributed.all_reduce(highest, op=ReduceOp.MAX)
    return int(highest.item())


def _wait_for_all() -> None:
    """Return when all ranks are here. They read a number that depends on all of them."""
    _over_ranks(0)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/short_attention.py <<'END_OF_FTGEN_FILE' || return
"""Causal attention of short packed sequences: three Triton kernels.

In: queries, keys and values of packed sequences. Out: for each query, the values weighted by the softmax over the keys of
its own sequence up to itself. With autograd.

The kernels look at a pack as one row of tokens. A program takes a block of tokens, with all heads of queries that share a
key, and walks over the keys from the beginning of the first token's sequence to the last token: a mask hides the keys of
other sequences. So the work does not depend on the longest sequence, and each key is read once for all its heads. In the
backward pass, one kernel computes the gradients of the queries, and another those of the keys and values: nothing is
added atomically, so the result is the same each time. Measured in docs/performance.md.

This module imports Triton, so only a training on a GPU imports it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]
# rows: tokens times heads of a block of queries; keys: tokens of a block of keys
FORWARD = {"rows": 64, "keys": 32, "num_warps": 4, "num_stages": 3}
QUERIES = {"rows": 64, "keys": 32, "num_warps": 4, "num_stages": 3}
KEYS = {"rows": 64, "keys": 64, "num_warps": 4, "num_stages": 2}


class Attend(torch.autograd.Function):  # type: ignore[misc]
    """attend(q [tokens, heads, size], k and v [tokens, groups, size], cu_seqlens [sequences + 1], scale) -> like q.

    The number of heads in a group and the size are powers of two; cu_seqlens is int32.
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend. What the backward pass needs of the softmax is its logarithm to base 2: [tokens, heads], float32."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        edges = _edges_of(cu_seqlens, len(q))
        out = torch.empty_like(q)
        logs = q.new_empty(q.shape[:2], dtype=torch.float32)
        _launch(_forward, FORWARD, "rows", (q, k, v, out, logs, edges), scale)
        ctx.save_for_backward(q, k, v, out, logs, edges)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Grads:
        """The gradients of queries, keys and values."""
        q, k, v, out, logs, edges = ctx.saved_tensors
        gradient = gradient.contiguous()
        sums = torch.empty_like(logs)  # of the gradient times the output, over each head
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _launch(_backward_queries, QUERIES, "rows", (q, k, v, out, gradient, logs, sums, edges, dq), ctx.scale)
        _launch(_backward_keys, KEYS, "keys", (q, k, v, gradient, logs, sums, edges, dk, dv), ctx.scale)
        return dq, dk, dv, None, None


def _launch(kernel: Any, how: dict[str, int], blocks: str, tensors: tuple[torch.Tensor, ...], scale: float) -> None:
    q, k = tensors[:2]
    tokens, heads, size = q.shape
    groups = k.shape[1]
    block = how["keys"] if blocks == "keys" else how["rows"] * groups // heads
    kernel[(triton.cdiv(tokens, block), groups)](*tensors, tokens, scale, heads=heads, groups=groups, size=size, **how)


def _edges_of(cu_seqlens: torch.Tensor, tokens: int) -> torch.Tensor:
    """The beginning and the end of each token's sequence: int32 [2, tokens]."""
    edges = torch.empty(2, tokens, dtype=torch.int32, device=cu_seqlens.device)
    _edges[(triton.cdiv(tokens, 256),)](cu_seqlens, edges, tokens, cu_seqlens.numel(), block=256)
    return edges


@triton.jit  # type: ignore[untyped-decorator]
def _edges(bounds, edges, tokens, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0) * block + tl.arange(0, block)
    begin = tl.zeros([block], tl.int32)
    end = tl.zeros([block], tl.int32) + tokens
    for number in range(count):
        bound = tl.load(bounds + number)
        begin = tl.where(bound <= token, tl.maximum(begin, bound), begin)
        end = tl.where(bound > token, tl.minimum(end, bound), end)
    tl.store(edges + token, begin, mask=token < tokens)
    tl.store(edges + tokens + token, end, mask=token < tokens)


@triton.jit  # type: ignore[untyped-decorator]
def _row_places(first, group, tokens, heads: tl.constexpr, groups: tl.constexpr, rows: tl.constexpr):  # type: ignore[no-untyped-def]
    """The token of each row, the row's place in [tokens, heads], and whether there is such a token."""
    row = tl.arange(0, rows)
    token = first + row // (heads // groups)
    return token, token * heads + group * (heads // groups) + row % (heads // groups), token < tokens


@triton.jit  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, out, logs, edges, tokens, scale,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    first, group = tl.program_id(0) * (rows * groups // heads), tl.program_id(1)
    token, row, there = _row_places(first, group, tokens, heads, groups, rows)
    feature = tl.arange(0, size)
    at = row.to(tl.int64)[:, None] * size + feature[None, :]
    query = tl.load(q + at, mask=there[:, None], other=0.0)
    begin = tl.load(edges + token, mask=there, other=0)
    highest = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    mean = tl.zeros([rows, size], tl.float32)
    low = tl.load(edges + first) // keys * keys
    for start in range(low, tl.minimum(first + rows * groups // heads, tokens), keys):
        key_token = start + tl.arange(0, keys)
        of_key = (key_token.to(tl.int64) * groups + group)[:, None] * size + feature[None, :]
        exists = (key_token < tokens)[:, None]
        key = tl.load(k + of_key, mask=exists, other=0.0)
        value = tl.load(v + of_key, mask=exists, other=0.0)
        seen = (key_token[None, :] <= token[:, None]) & (key_token[None, :] >= begin[:, None])
        score = tl.where(seen, tl.dot(query, tl.trans(key)) * (scale * LOG2_E), float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - shift[:, None])
        shrink = tl.exp2(highest - shift)
        total = total * shrink + tl.sum(weight, 1)
        mean = mean * shrink[:, None] + tl.dot(weight.to(value.dtype), value)
        highest = higher
    tl.store(out + at, (mean / total[:, None]).to(query.dtype), mask=there[:, None])
    tl.store(logs + row, highest + tl.log2(total), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _backward_queries(  # type: ignore[no-untyped-def]
    q, k, v, out, gradient, logs, sums, edges, dq, tokens, scale,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    first, group = tl.program_id(0) * (rows * groups // heads), tl.program_id(1)
    token, row, there = _row_places(first, group, tokens, heads, groups, rows)
    feature = tl.arange(0, size)
    at = row.to(tl.int64)[:, None] * size + feature[None, :]
    query = tl.load(q + at, mask=there[:, None], other=0.0)
    towards = tl.load(gradient + at, mask=there[:, None], other=0.0)
    result = tl.load(out + at, mask=there[:, None], other=0.0)
    sum_of = tl.sum(towards.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(sums + row, sum_of, mask=there)
    log = tl.load(logs + row, mask=there, other=0.0)
    begin = tl.load(edges + token, mask=there, other=0)
    moved = tl.zeros([rows, size], tl.float32)
    low = tl.load(edges + first) // keys * keys
    for start in range(low, tl.minimum(first + rows * groups // heads, tokens), keys):
        key_token = start + tl.arange(0, keys)
        of_key = (key_token.to(tl.int64) * groups + group)[:, None] * size + feature[None, :]
        exists = (key_token < tokens)[:, None]
        key = tl.load(k + of_key, mask=exists, other=0.0)
        value = tl.load(v + of_key, mask=exists, other=0.0)
        seen = (key_token[None, :] <= token[:, None]) & (key_token[None, :] >= begin[:, None])
        score = tl.dot(query, tl.trans(key)) * (scale * LOG2_E)
        weight = tl.where(seen, tl.exp2(score - log[:, None]), 0.0)
        change = weight * (tl.dot(towards, tl.trans(value)) - sum_of[:, None])
        moved += tl.dot(change.to(key.dtype), key)
    tl.store(dq + at, (moved * scale).to(query.dtype), mask=there[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _backward_keys(  # type: ignore[no-untyped-def]
    q, k, v, gradient, logs, sums, edges, dk, dv, tokens, scale,
    heads: tl.constexpr, groups: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, keys: tl.constexpr,
):  # fmt: skip
    start, group = tl.program_id(0) * keys, tl.program_id(1)
    feature = tl.arange(0, size)
    key_token = start + tl.arange(0, keys)
    at = (key_token.to(tl.int64) * groups + group)[:, None] * size + feature[None, :]
    exists = (key_token < tokens)[:, None]
    key = tl.load(k + at, mask=exists, other=0.0)
    value = tl.load(v + at, mask=exists, other=0.0)
    moved_key = tl.zeros([keys, size], tl.float32)
    moved_value = tl.zeros([keys, size], tl.float32)
    block: tl.constexpr = rows * groups // heads
    high = tl.load(edges + tokens + tl.minimum(start + keys, tokens) - 1)
    for first in range(start // block * block, high, block):
        token, row, there = _row_places(first, group, tokens, heads, groups, rows)
        of_row = row.to(tl.int64)[:, None] * size + feature[None, :]
        query = tl.load(q + of_row, mask=there[:, None], other=0.0)
        towards = tl.load(gradient + of_row, mask=there[:, None], other=0.0)
        log = tl.load(logs + row, mask=there, other=0.0)
        sum_of = tl.load(sums + row, mask=there, other=0.0)
        begin = tl.load(edges + token, mask=there, other=tokens)
        seen = (key_token[:, None] <= token[None, :]) & (key_token[:, None] >= begin[None, :])
        score = tl.dot(key, tl.trans(query)) * (scale * LOG2_E)
        weight = tl.where(seen, tl.exp2(score - log[None, :]), 0.0)
        moved_value += tl.dot(weight.to(towards.dtype), towards)
        change = weight * (tl.dot(value, tl.trans(towards)) - sum_of[None, :])
        moved_key += tl.dot(change.to(query.dtype), query)
    tl.store(dk + at, (moved_key * scale).to(key.dtype), mask=exists)
    tl.store(dv + at, moved_value.to(value.dtype), mask=exists)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/engines/swiglu.py <<'END_OF_FTGEN_FILE' || return
"""Compute SwiGLU and its gradient, and write them in FP8 with delayed scaling: two Triton kernels.

In: the output of the layer before SwiGLU, [rows, 2 * width]: in each row the gates a, then the values b; for the gradient
also that of the result. Out: silu(a) * b, or the gradients of a and b, times a scale, in FP8; the largest absolute value
before the scale, combined with the one that is there; and the inverse of the scale.

Both compute in float32 with the steps and roundings of Transformer Engine's kernels on Hopper, so that the bytes are the
same. A program works on many tiles, each a part of a row: it loads the next ones while it computes one, and combines its
largest value once.

This module imports Triton, so only a training on a GPU imports it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

RESULT_TILE, GRADIENT_TILE = 2048, 1024  # columns of a tile
WARPS, STAGES = 4, 3  # of a program
PROGRAMS = 132 * 4  # the fastest on an H200; it has 132 multiprocessors
UNALIGNED = ("scale", "amax", "scale_inv", "tiles")  # one program for any addresses of these


def write_result(
    mixed: torch.Tensor, out: torch.Tensor, scale: torch.Tensor, amax: torch.Tensor, scale_inv: torch.Tensor
) -> None:
    """Write the result of mixed [..., 2 * width] into out [..., width], of an FP8 type. All are contiguous."""
    _launch(_write_result, RESULT_TILE, (mixed,), out, scale, amax, scale_inv)


def write_gradient(
    gradient: torch.Tensor,
    mixed: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor,
    amax: torch.Tensor,
    scale_inv: torch.Tensor,
) -> None:
    """Write the gradient of mixed into out, of its shape; gradient [..., width] is that of the result."""
    _launch(_write_gradient, GRADIENT_TILE, (gradient, mixed), out, scale, amax, scale_inv)


def _launch(kernel: Any, tile: int, inputs: tuple[torch.Tensor, ...], out: torch.Tensor, *scaling: torch.Tensor) -> None:
    width = inputs[-1].shape[-1] // 2
    tile = min(tile, triton.next_power_of_2(width))
    tiles = inputs[-1].numel() // (2 * width) * triton.cdiv(width, tile)
    kernel[(min(tiles, PROGRAMS),)](*inputs, out, *scaling, tiles, width=width, tile=tile, stages=STAGES, num_warps=WARPS)


# 1 / (1 + e^-x) in the steps that CUDA's compiler makes of it. e^-x is 2^k * 2^r, with k a whole number and r small. An
# approximate reciprocal and one step of Newton's round like a division. The minimum keeps infinity out of that step.
SIGMOID = tl.constexpr("""{
    .reg .f32 k, r, d, e;
    fma.rn.ftz.sat.f32 k, $1, 0fBBBB989D, 0f3F000000;
    fma.rm.ftz.f32 k, k, 0f437C0000, 0f4B400001;
    sub.f32 r, 0f4B40007F, k;
    fma.rn.ftz.f32 r, $1, 0fBFB8AA3B, r;
    fma.rn.ftz.f32 r, $1, 0fB2A57060, r;
    ex2.approx.ftz.f32 r, r;
    shl.b32 k, k, 23;
    fma.rn.f32 d, r, k, 0f3F800000;
    min.f32 d, d, 0f7F000000;
    rcp.approx.ftz.f32 r, d;
    fma.rn.f32 e, d, r, 0fBF800000;
    neg.f32 e, e;
    fma.rn.f32 $0, r, e, r;
}""")


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return tl.inline_asm_elementwise(SIGMOID, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit  # type: ignore[untyped-decorator]
def _place(index, width: tl.constexpr, tile: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of a tile: its row, its columns [tile], and which of them exist."""
    tiles: tl.constexpr = (width + tile - 1) // tile
    # A thread reads 16 bytes at once and writes 8. If it wrote 16, neighbours would not read side by side.
    column = tl.max_contiguous(index % tiles * tile + tl.arange(0, tile), 8)
    return tl.cast(index // tiles, tl.int64), column, column < width


@triton.jit
def _read(pointers, inside):  # type: ignore[no-untyped-def]
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _finish(largest, amax, scale, scale_inv):  # type: ignore[no-untyped-def]
    """Combine the largest value with amax. The first program also writes the inverse of the scale."""
    bits = tl.max(largest, axis=0).to(tl.int32, bitcast=True)  # in the order of the values, none of which is negative
    tl.atomic_max(amax.to(tl.pointer_type(tl.int32)), bits, sem="relaxed")
    if tl.program_id(0) == 0:
        tl.store(scale_inv, tl.div_rn(1.0, scale))


@triton.jit(do_not_specialize=UNALIGNED)  # type: ignore[untyped-decorator]
def _write_result(  # type: ignore[no-untyped-def]
    mixed, out, scale, amax, scale_inv, tiles, width: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr
):
    """A program writes some tiles of the result."""
    factor = tl.load(scale)
    largest = tl.zeros([tile], tl.float32)  # a NaN does not count
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=stages):
        row, column, inside = _place(index, width, tile)
        at = mixed + row * (2 * width) + column
        a, b = _read(at, inside), _read(at + width, inside)
        result = a * _sigmoid(a) * b
        tl.store(out + row * width + column, (result * factor).to(out.dtype.element_ty), mask=inside)
        largest = tl.maximum(largest, tl.abs(result))
    _finish(largest, amax, factor, scale_inv)


@triton.jit(do_not_specialize=UNALIGNED)  # type: ignore[untyped-decorator]
def _write_gradient(  # type: ignore[no-untyped-def]
    gradient, mixed, out, scale, amax, scale_inv, tiles, width: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr
):
    """A program writes some tiles of the gradient of a, and the same tiles of that of b."""
    factor = tl.load(scale)
    largest = tl.zeros([tile], tl.float32)  # a NaN does not count
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=stages):
        row, column, inside = _place(index, width, tile)
        at = row * (2 * width) + column
        g = _read(gradient + row * width + column, inside)
        a, b = _read(mixed + at, inside), _read(mixed + at + width, inside)
        sigmoid = _sigmoid(a)
        of_a = tl.fma(a, sigmoid * (1.0 - sigmoid), sigmoid) * g * b
        of_b = g * (a * sigmoid)
        tl.store(out + at, (of_a * factor).to(out.dtype.element_ty), mask=inside)
        tl.store(out + at + width, (of_b * factor).to(out.dtype.element_ty), mask=inside)
        largest = tl.maximum(largest, tl.maximum(tl.abs(of_a), tl.abs(of_b)))
    _finish(largest, amax, factor, scale_inv)
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
    cat >"$1"/runtime/engines/trackers.py <<'END_OF_FTGEN_FILE' || return
"""What the trackers of both engines have in common: TensorBoard, Weights & Biases and MLflow.

In: a plan with `log`. Out: what is asked for, what is missing, where it goes. Files go to <run directory>/trackers. The step
lines of the log stay the source of every result.

Weights & Biases and MLflow get their addresses and keys from the environment: WANDB_MODE, WANDB_API_KEY, WANDB_BASE_URL,
MLFLOW_TRACKING_URI and so on. Without a key or a network, they write files, which `wandb sync` and `mlflow ui` read.

An attempt that goes on with a run goes on with its curves.
"""

import netrc
import os
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from runtime.job.progress import say

Plan = dict[str, Any]
# The key of the plan, and the packages that its logger needs, with their names on PyPI.
PACKAGES = {
    "tensorboard": {"tensorboard": "tensorboard"},
    "wandb": {"wandb": "wandb"},
    "mlflow": {"mlflow": "mlflow"},
}
WANDB = "https://api.wandb.ai"
ANSWER_S = 5.0  # longest wait for a connection


def asked(plan: Plan) -> list[str]:
    """The trackers of the plan."""
    return [name for name in PACKAGES if (plan.get("log") or {}).get(name)]


def missing(plan: Plan) -> Iterator[tuple[str, str]]:
    """A tracker of the plan and the package that it lacks."""
    for name in asked(plan):
        for package, published in PACKAGES[name].items():
            if not find_spec(package):
                yield name, published


def run_name(folder: Path) -> str:
    """The run's name: <experiment>_<id>, the folder around the run directory. `folder` is the trackers'."""
    return folder.parent.parent.name


def mlflow_address(folder: Path) -> str:
    """The server of MLflow, or a file."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder}/mlflow.db"


def tell(plan: Plan, folder: Path) -> str:
    """Say where each tracker writes, and make the folder. Returns why Weights & Biases is offline; "" if it is not."""
    names, reason = asked(plan), offline() if "wandb" in asked(plan) else ""
    if os.environ.get("RANK", "0") == "0":
        folder.mkdir(parents=True, exist_ok=True)
    if "tensorboard" in names:
        say(f"TensorBoard: tensorboard --logdir {folder / 'tensorboard'}")
    if "wandb" in names:
        how = f"offline, because {reason}: wandb sync {folder}/wandb/offline-run-*" if reason else "online"
        say(f"Weights & Biases: {how}")
    if "mlflow" in names:
        by_hand = f"mlflow ui --backend-store-uri {mlflow_address(folder)}"
        say(f"MLflow: {'the server of MLFLOW_TRACKING_URI' if os.environ.get('MLFLOW_TRACKING_URI') else by_hand}")
    return reason


def offline() -> str:
    """Why Weights & Biases writes only files; "" if it sends them. WANDB_MODE decides, if it is set."""
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return "" if mode == "online" else f"WANDB_MODE is {mode}"
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or WANDB)
    if not os.environ.get("WANDB_API_KEY") and not _has_login(host.hostname or ""):
        return "there is no WANDB_API_KEY"
    if _writes():
        try:
            socket.create_connection(
                (host.hostname or "", host.port or (443 if host.scheme == "https" else 80)), ANSWER_S
            ).close()
        except OSError:
            return f"{host.hostname} cannot be reached"
    return ""


def _has_login(host: str) -> bool:
    """Whether `wandb login` has written a key for the host."""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _writes() -> bool:
    """Whether trackers can be written on this rank: on the first one with NeMo, on the last one with Megatron-Bridge."""
    return int(os.environ.get("RANK", "0")) in (0, int(os.environ.get("WORLD_SIZE", "1")) - 1)
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
    cat >"$1"/runtime/export/__init__.py <<'END_OF_FTGEN_FILE' || return
"""Export a trained checkpoint of either engine to Hugging Face format, and check that it is the trained model.

In: a plan and a run. Out: folders that transformers and PEFT load. Start with `export.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/export/base_model.py <<'END_OF_FTGEN_FILE' || return
"""The base of a training: its small files, its weights and its name.

In: a plan. Out: folders on this machine, and the name by which others find the base.
"""

from pathlib import Path
from typing import Any

from runtime.hub import find
from runtime.job.errors import JobError
from runtime.weights import base, checkpoint, hub

Plan = dict[str, Any]


def converted(plan: Plan) -> Path:
    """The converted checkpoint. JobError: it is not there or has changed."""
    folder = checkpoint.directory(plan)
    if not checkpoint.converted(plan):
        raise JobError(
            f"the converted checkpoint is not in {folder}",
            "set STAGE_PATH as in the training, or convert it again: bash <script>.sh --convert",
        )
    return folder


def files(plan: Plan, scratch: Path) -> Path:
    """The folder with the base's small files and the list of its tensors; `scratch`, if the conversion did not keep them."""
    kept = converted(plan) / base.FOLDER
    if (kept / base.TENSORS).is_file():
        return kept
    model = weights(plan)
    if model is None:
        raise JobError(
            f"{kept} does not exist: an older ftgen converted this checkpoint, and the base is not on this machine",
            f"move {kept.parent} away, and convert it again: bash <script>.sh --convert",
        )
    base.keep(model, scratch)
    return scratch


def weights(plan: Plan) -> Path | None:
    """The base in Hugging Face format, if it is on this machine."""
    kind = plan["checkpoint"]["source"]
    if kind == "hub":
        found = find.find(hub.repository(plan))
        return found if found and find.commit(found) == checkpoint.origin(plan).get("commit") else None
    folder = checkpoint.user_directory(plan) if kind == "directory" else None
    return folder if folder and folder.is_dir() else None


def name(plan: Plan) -> tuple[str, str | None]:
    """Where PEFT finds the base: a repository of the hub and its commit, or a directory."""
    if plan["checkpoint"]["source"] == "directory":
        return str(checkpoint.user_directory(plan)), None
    return plan["model"]["hf_id"], checkpoint.origin(plan).get("commit")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/export/check.py <<'END_OF_FTGEN_FILE' || return
"""Check an export: its tensors, and what a model that is loaded from it computes.

In: the folder of the export, and the trained weights. Out: findings for the log and the model card, or a JobError.

1. Names, shapes and types of the tensors are those of the base (`structure`).
2. Each value in the files is that of the checkpoint (`values`). The rows of fused tensors are found by computing their
   numbers, not as the export cuts them, and adapters are merged in float64: the files may differ by roundings.
3. A model that transformers loads from the files computes the logits of the trained weights (`behaviour`). These come
   from `forward.py`, which reads the checkpoint as Megatron does. For merged weights, it also tells how much the
   rounding changed the logits.

Together: the files are the trained weights, their layout is what transformers expects, and config.json describes the
model that was trained. Training and checkpoint themselves are taken as they are.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.export import forward, names
from runtime.export.names import Source
from runtime.export.trained import Trained
from runtime.job.errors import JobError
from runtime.weights import adapter, reload, shards
from runtime.weights.shards import Entry

if TYPE_CHECKING:
    import torch

Plan = dict[str, Any]
TOKENS = 32
ROWS = 1024  # rows of a merged weight that are compared at a time, because float64 needs much memory
# Largest difference of a logit, as a fraction of the largest logit. Both sides have the same weights and compute in float32:
# only the order of sums differs. Measured: 1e-6, on tiny models and on two layers of the size of Llama-3 8B.
BOUND = 1e-3
PROMPT = "The capital of France is"


def structure(folder: Path, expected: dict[str, Entry]) -> str:
    """JobError unless the files have exactly these tensors."""
    try:
        found = shards.entries(folder, shards.files_of(folder))
    except (OSError, ValueError) as error:
        raise _wrong(folder, str(error)) from error
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise _wrong(folder, f"{name} is {found.get(name)}, expected {expected.get(name)}")
    return f"{len(found)} tensors have the names, shapes and types of the base"


def values(folder: Path, tensors: dict[str, Entry], trained: Trained) -> str:
    """JobError unless each value of the files is that of the checkpoint; if it was merged, within the roundings."""
    merged = trained.adapted(tensors)
    for name, entry in tensors.items():
        if name in merged:
            _compare_merged(folder, name, entry, merged[name], trained)
        else:
            _compare(folder, name, entry, trained)
    same = f"{len(tensors) - len(merged)} tensors are those of the checkpoint, bit for bit"
    if not merged:
        return same
    return f"{same}; {len(merged)} are merged: W + alpha / rank * B @ A in float64, rounded once to their type"


def adapter_values(folder: Path, modules: dict[str, Source], trained: Trained) -> str:
    """JobError unless the adapters of the files are those of the checkpoint, bit for bit."""
    assert trained.adapters  # noqa: S101 - only LoRA exports adapters
    found = shards.entries(folder, [adapter.FILE])
    expected = {adapter.tensor_name(module, matrix) for module in modules for matrix in "AB"}
    if found.keys() != expected:
        raise _wrong(folder, f"its tensors are not those of {len(modules)} adapters")
    for module, source in modules.items():
        a = trained.read(trained.adapters, names.adapter(source.linear, "in"), source.layer)
        b = trained.read(trained.adapters, names.adapter(source.linear, "out"), source.layer)
        for matrix, tensor in (("A", a), ("B", b[_rows(source.part, len(b), trained.model)])):
            name = adapter.tensor_name(module, matrix)
            if not _equal(shards.read(folder, name, found[name]), tensor):
                raise _wrong(folder, f"{name} differs from the checkpoint")
    return f"{len(found)} tensors are those of the checkpoint, bit for bit"


class Reference(NamedTuple):
    """What the loaded model must compute."""

    tokens: list[int]
    logits: "torch.Tensor"  # of the weights as they are exported
    unmerged: "torch.Tensor | None"  # of the adapters beside the weights
    merged: "torch.dtype | None"


def reference(trained: Trained, epsilon: float, merged: "torch.dtype | None" = None) -> Reference:
    """Logits from the checkpoint. `merged`: the type of weights that adapters were merged into. Call it before a model is
    loaded, so that memory never holds both.
    """
    tokens = _tokens(trained.model["vocab_size"])
    unmerged = forward.logits(trained, tokens, epsilon)
    if merged is None:
        return Reference(tokens, unmerged, None, None)
    return Reference(tokens, forward.logits(trained, tokens, epsilon, merged), unmerged, merged)


def behaviour(model: reload.Reloaded, expected: Reference) -> list[str]:
    """JobError unless the loaded model computes what the trained weights do."""
    found = model.logits(expected.tokens)[:, : expected.logits.shape[1]]
    difference = _difference(found, expected.logits)
    told = f"{difference:.1e} of the largest logit (bound {BOUND:.0e})"
    if not difference <= BOUND:  # also for NaN
        raise JobError(
            f"the exported model is not the trained model: logits differ by {told}",
            "please report this; the files were not published",
        )
    findings = [f"logits of the model that transformers loads differ from those of the checkpoint by {told}"]
    if expected.unmerged is not None:
        rounding = f"{_difference(found, expected.unmerged):.1e} of the largest one"
        findings.append(f"merging the adapters and rounding to {expected.merged} changed logits by {rounding}")
    return findings


def completion(model: reload.Reloaded) -> str:
    """What the loaded model continues a prompt with. One token repeated is a warning: the trained model does the same."""
    text, repeated = model.complete(PROMPT)
    told = f"greedy completion of {PROMPT!r}: {text!r}"
    return f"warning: the trained model repeats one token: {told}" if repeated else told


def merged_type(tensors: dict[str, Entry], trained: Trained) -> "torch.dtype | None":
    """The type of the weights that adapters were merged into; None without adapters."""
    return next((shards.torch_dtype(tensors[name].dtype) for name in trained.adapted(tensors)), None)


def _difference(found: "torch.Tensor", expected: "torch.Tensor") -> float:
    """The largest difference of a logit, as a fraction of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def _compare(folder: Path, name: str, entry: Entry, trained: Trained) -> None:
    """JobError unless each value is that of the checkpoint. A function of its own, so that its tensors are freed."""
    expected = _expected(name, trained).to(shards.torch_dtype(entry.dtype))
    if not _equal(shards.read(folder, name, entry), expected):
        raise _wrong(folder, f"{name} differs from the checkpoint")


def _compare_merged(folder: Path, name: str, entry: Entry, source: Source, trained: Trained) -> None:
    """JobError unless each value is W + alpha / rank * B @ A, within the roundings of float32 sums and of its type."""

    assert trained.adapters  # noqa: S101 - it is merged
    a = trained.adapters.read(names.adapter(source.linear, "in"), source.layer).double()
    b = trained.adapters.read(names.adapter(source.linear, "out"), source.layer).double()
    b = b[_rows(source.part, len(b), trained.model)] * trained.scale
    found, weight = shards.read(folder, name, entry), _expected(name, trained)
    for some in zip(found.split(ROWS), weight.split(ROWS), b.split(ROWS), strict=True):
        if not _is_merged(*some, a):
            raise _wrong(folder, f"{name} differs from W + alpha / rank * B @ A by more than roundings do")


def _is_merged(found: "torch.Tensor", weight: "torch.Tensor", b: "torch.Tensor", a: "torch.Tensor") -> bool:
    """Whether `found` is weight + b @ a, within the roundings. The sums in float32 have one for each of rank + 3 terms."""
    import torch

    expected = weight.double() + b @ a
    sums = torch.finfo(torch.float32).eps / 2 * (weight.double().abs() + (len(a) + 3) * (b.abs() @ a.abs()))
    allowed = torch.finfo(found.dtype).eps / 2 * (expected.abs() + sums) + sums
    return bool(((found.double() - expected).abs() <= allowed).all())


def _expected(name: str, trained: Trained) -> "torch.Tensor":
    """The checkpoint's values of a Hugging Face name, before merging."""
    source = trained.source(name)
    fused = trained.read(trained.weights, source.name, source.layer)
    return fused[_rows(source.part, len(fused), trained.model, source.name in names.PADDED)]


def _rows(part: str, count: int, model: dict[str, Any], padded: bool = False) -> "torch.Tensor | slice":
    """Numbers of the fused tensor's rows that are the rows of a part, in their order."""
    import torch

    heads, groups, size = model["num_attention_heads"], model["num_query_groups"], model["head_size"]
    queries = heads // groups
    if padded:
        return slice(model["vocab_size"])
    if part in {"gate", "up"}:
        return slice(0, count // 2) if part == "gate" else slice(count // 2, count)
    if not part:
        return slice(count)
    row = torch.arange((heads if part == "q" else groups) * size)
    head, place = row // size, row % size
    if part == "q":
        slot = head // queries * (queries + 2) + head % queries
    else:
        slot = head * (queries + 2) + queries + (part == "v")
    return slot * size + place


def _equal(one: "torch.Tensor", other: "torch.Tensor") -> bool:
    import torch

    return one.dtype == other.dtype and bool(torch.equal(one, other))


def _tokens(vocabulary: int) -> list[int]:
    """The same tokens each time, from all of the vocabulary."""
    import torch

    found: list[int] = torch.randint(vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    return found


def _wrong(folder: Path, what: str) -> JobError:
    return JobError(f"{folder}: {what}", "nothing was published: export again, and report this if it happens again")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/export/export.py <<'END_OF_FTGEN_FILE' || return
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
END_OF_FTGEN_FILE
    cat >"$1"/runtime/export/forward.py <<'END_OF_FTGEN_FILE' || return
"""Compute the logits of a trained model from its distributed checkpoint, in float32, without a model.

In: the tensors of the checkpoint, token ids. Out: logits [tokens, vocabulary].

This is the independent path that an export is checked with. It shares neither names nor cuts of fused tensors with the
export: it uses Megatron's tensors as Megatron itself does. It adds the adapters to the output of a layer, as the
training did, or merges them into its fused weights. It reads one layer at a time.
"""

import math
from typing import TYPE_CHECKING, Any

from runtime.export.trained import Trained

if TYPE_CHECKING:
    import torch

# Of the rotary frequencies of Llama 3.1 and later, as in NeMo's Llama31Config.
LOW, HIGH, OLD_CONTEXT = 1.0, 4.0, 8192


def logits(trained: Trained, tokens: list[int], epsilon: float, merged: "torch.dtype | None" = None) -> "torch.Tensor":
    """Logits of one sequence. `epsilon` is that of the norms (rms_norm_eps).

    With `merged`, adapters are merged into the weights, which are then rounded to this type.
    """
    import torch

    model = trained.model
    with torch.no_grad():
        hidden = trained.weights.read("embedding.word_embeddings.weight")[tokens].float()
        rotation = _rotation(model, len(tokens))
        for layer in range(model["num_layers"]):
            hidden = _Layer(trained, layer, epsilon, merged).forward(hidden, rotation)
        hidden = _norm(hidden, trained.weights.read("decoder.final_layernorm.weight"), epsilon)
        tied = model["tied_embeddings"]
        head = trained.weights.read("embedding.word_embeddings.weight" if tied else "output_layer.weight")
        rows = head[: model["vocab_size"]].split(1 << 14)  # a part at a time, because it is cast
        return torch.cat([hidden @ part.float().T for part in rows], dim=1)


class _Layer:
    """One transformer layer of Megatron."""

    def __init__(self, trained: Trained, layer: int, epsilon: float, merged: "torch.dtype | None") -> None:
        self.trained, self.layer, self.epsilon, self.merged = trained, layer, epsilon, merged

    def forward(self, hidden: "torch.Tensor", rotation: tuple["torch.Tensor", "torch.Tensor"]) -> "torch.Tensor":
        """[tokens, hidden] to [tokens, hidden]."""
        import torch

        normed = _norm(hidden, self._read("self_attention.linear_qkv.layer_norm_weight"), self.epsilon)
        hidden = hidden + self._linear("self_attention.linear_proj", self._attend(normed, rotation))
        normed = _norm(hidden, self._read("mlp.linear_fc1.layer_norm_weight"), self.epsilon)
        gate, up = self._linear("mlp.linear_fc1", normed).chunk(2, dim=-1)
        return hidden + self._linear("mlp.linear_fc2", torch.nn.functional.silu(gate) * up)

    def _attend(self, normed: "torch.Tensor", rotation: tuple["torch.Tensor", "torch.Tensor"]) -> "torch.Tensor":
        import torch

        model = self.trained.model
        groups, size, count = model["num_query_groups"], model["head_size"], len(normed)
        fused = self._linear("self_attention.linear_qkv", normed).view(count, groups, -1, size)
        queries, keys, values = fused[:, :, :-2], fused[:, :, -2:-1], fused[:, :, -1]
        queries, keys = _rotate(queries, rotation), _rotate(keys, rotation)[:, :, 0]
        scores = torch.einsum("qghd,kgd->ghqk", queries, keys) / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(count, count, dtype=torch.bool).triu(1), -math.inf)
        return torch.einsum("ghqk,kgd->qghd", scores.softmax(-1), values).reshape(count, -1)

    def _linear(self, name: str, x: "torch.Tensor") -> "torch.Tensor":
        """The layer's output, with its bias and with that of its adapter."""
        weight, y = self._read(f"{name}.weight").float(), 0.0
        if f"decoder.layers.{name}.bias" in self.trained.weights.names:
            y = self._read(f"{name}.bias").float()
        adapters = self.trained.adapters
        if adapters and f"decoder.layers.{name}.adapter.linear_in.weight" in adapters.names:
            a = adapters.read(f"decoder.layers.{name}.adapter.linear_in.weight", self.layer).float()
            b = adapters.read(f"decoder.layers.{name}.adapter.linear_out.weight", self.layer).float()
            if self.merged:
                weight = (weight + self.trained.scale * (b @ a)).to(self.merged).float()
            else:
                y = y + (x @ a.T) @ b.T * self.trained.scale
        return x @ weight.T + y

    def _read(self, name: str) -> "torch.Tensor":
        return self.trained.weights.read(f"decoder.layers.{name}", self.layer)


def _norm(x: "torch.Tensor", weight: "torch.Tensor", epsilon: float) -> "torch.Tensor":
    """RMSNorm."""
    import torch

    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight.float()


def _rotation(model: dict[str, Any], count: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Cosines and sines of the rotary angles, each [tokens, 1, 1, head_size]."""
    import torch

    size = model["head_size"]
    frequencies = model["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    if factor := model["rope_scaling_factor"]:
        turns = OLD_CONTEXT * frequencies / (2 * math.pi)
        smooth = ((turns - LOW) / (HIGH - LOW)).clamp(0, 1)
        frequencies = frequencies / factor * (1 - smooth) + frequencies * smooth
    angles = torch.outer(torch.arange(count, dtype=torch.float64), frequencies).repeat(1, 2)[:, None, None]
    return angles.cos().float(), angles.sin().float()


def _rotate(x: "torch.Tensor", rotation: tuple["torch.Tensor", "torch.Tensor"]) -> "torch.Tensor":
    import torch

    left, right = x.chunk(2, dim=-1)
    return x * rotation[0] + torch.cat([-right, left], dim=-1) * rotation[1]
END_OF_FTGEN_FILE
    cat >"$1"/runtime/export/names.py <<'END_OF_FTGEN_FILE' || return
"""Hugging Face's names of weights, and where these weights are in Megatron's tensors. For Llama, Mistral and Qwen2.

In: a name of Hugging Face and the shape of the model. Out: the name of Megatron's tensor, its layer, and its rows.

Megatron fuses weights of a layer. The rows of `linear_qkv` are, for each query group: its query heads, its key, its
value. The rows of `linear_fc1` are those of the gate, then those of the up projection. Its tensor of a weight has a
first dimension for the layers, whatever pipeline stage trained them.
"""

import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# By the names that Hugging Face has in a layer: Megatron's name in a layer, and the part of its rows.
LINEAR = {
    "self_attn.q_proj": ("self_attention.linear_qkv", "q"),
    "self_attn.k_proj": ("self_attention.linear_qkv", "k"),
    "self_attn.v_proj": ("self_attention.linear_qkv", "v"),
    "self_attn.o_proj": ("self_attention.linear_proj", ""),
    "mlp.gate_proj": ("mlp.linear_fc1", "gate"),
    "mlp.up_proj": ("mlp.linear_fc1", "up"),
    "mlp.down_proj": ("mlp.linear_fc2", ""),
}
# The norms are fused into the linear layers that follow them.
NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "post_attention_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
OUTSIDE = {
    "model.embed_tokens.weight": "embedding.word_embeddings.weight",
    "model.norm.weight": "decoder.final_layernorm.weight",
    "lm_head.weight": "output_layer.weight",
}
LAYERS = "decoder.layers."
HEAD, EMBEDDING = OUTSIDE["lm_head.weight"], OUTSIDE["model.embed_tokens.weight"]
PADDED = {HEAD, EMBEDDING}  # Megatron adds rows, so that tensor-parallel ranks have equal parts
COMPUTED = re.compile(r"rotary_emb\.inv_freq$")  # in old checkpoints of Llama; nothing reads it


class Source(NamedTuple):
    """Where the weight of one name of Hugging Face is."""

    name: str  # of Megatron's tensor
    layer: int | None  # row of its first dimension
    linear: str  # of LINEAR's values, such as self_attention.linear_qkv; "" outside of linear layers of a layer
    part: str  # q, k, v, gate, up; "": all rows


def source(name: str) -> Source | None:
    """Where a weight is; None for a name that these families do not have."""
    if name in OUTSIDE:
        return Source(OUTSIDE[name], None, "", "")
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+?)\.(weight|bias)", name)
    if not found:
        return None
    layer, module, kind = int(found[1]), found[2], found[3]
    if module in LINEAR:
        linear, part = LINEAR[module]
        return Source(f"{LAYERS}{linear}.{kind}", layer, linear, part)
    norm = NORMS.get(f"{module}.{kind}")
    return Source(LAYERS + norm, layer, "", "") if norm else None


def rows(tensor: "torch.Tensor", part: str, model: dict[str, Any]) -> "torch.Tensor":
    """The rows of a part of a fused tensor [rows, ...]; all rows for part "". `model` is the plan's."""
    if part in {"gate", "up"}:
        return tensor.chunk(2)[part == "up"]
    if not part:
        return tensor
    groups, size = model["num_query_groups"], model["head_size"]
    queries = model["num_attention_heads"] // groups
    grouped = tensor.reshape(groups, queries + 2, size, *tensor.shape[1:])
    own = {"q": grouped[:, :queries], "k": grouped[:, queries], "v": grouped[:, queries + 1]}[part]
    return own.reshape(-1, *tensor.shape[1:])


def adapter(linear: str, matrix: str) -> str:
    """Megatron's name of an adapter's matrix. `linear` is of LINEAR's values, `matrix` is "in" (A) or "out" (B)."""
    return f"{LAYERS}{linear}.adapter.linear_{matrix}.weight"
END_OF_FTGEN_FILE
    cat >"$1"/runtime/export/trained.py <<'END_OF_FTGEN_FILE' || return
"""The weights of a trained model by Hugging Face's names, one at a time.

In: a plan, the checkpoint with the weights, and with LoRA the checkpoint with the adapters. Out: `torch.Tensor`s.

With SFT, the trained checkpoint has the weights. With LoRA, the converted checkpoint has them, and the trained one has
the adapters.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from runtime.export import names
from runtime.export.names import Source
from runtime.job.errors import JobError
from runtime.weights.distributed import Checkpoint

if TYPE_CHECKING:
    import torch

Plan = dict[str, Any]


class Trained:
    """The trained weights. A weight of a layer that has an adapter is merged with it."""

    def __init__(self, plan: Plan, weights: Checkpoint, adapters: Checkpoint | None) -> None:
        self.model = plan["model"]
        self.weights, self.adapters = weights, adapters
        self.scale = plan["lora"]["alpha"] / plan["lora"]["rank"] if adapters else 0.0
        self.rank = plan["lora"]["rank"] if adapters else 0
        self._last: tuple[tuple[Checkpoint, str, int | None], torch.Tensor] | None = None

    def source(self, name: str) -> Source:
        """Where a weight of Hugging Face is. JobError: no family of ftgen has such a weight."""
        source = names.source(name)
        if source is None:
            what = f"the base has a weight {name}, which ftgen cannot export"
            raise JobError(what, "export it with the exporter of the engine")
        tied = source.name == names.HEAD and self.model["tied_embeddings"]
        return Source(names.EMBEDDING, None, "", "") if tied else source

    def weight(self, name: str, dtype: "torch.dtype") -> "torch.Tensor":
        """The weight of a Hugging Face name; if it has an adapter, W + alpha / rank * B @ A in float32, then in `dtype`."""
        source = self.source(name)
        found = names.rows(self.read(self.weights, source.name, source.layer), source.part, self.model)
        if source.name in names.PADDED:
            found = found[: self.model["vocab_size"]]
        if self.has_adapter(source) and name.endswith(".weight"):
            a, b = self.adapter(source)
            found = found.float() + self.scale * (b.float() @ a.float())
        return found.to(dtype)

    def adapter(self, source: Source) -> tuple["torch.Tensor", "torch.Tensor"]:
        """A [rank, in] and B [out, rank] of a weight, B with its own rows only. JobError: another rank than the plan's."""
        assert self.adapters  # noqa: S101 - `has_adapter` says so
        a = self.read(self.adapters, names.adapter(source.linear, "in"), source.layer)
        b = names.rows(self.read(self.adapters, names.adapter(source.linear, "out"), source.layer), source.part, self.model)
        if a.shape[0] != self.rank:
            raise JobError(
                f"the adapters in {self.adapters.folder} have rank {a.shape[0]}, the plan has lora.rank = {self.rank}",
                "use the script that trained this checkpoint",
            )
        return a, b

    def has_adapter(self, source: Source) -> bool:
        """Whether the layer of this weight has an adapter."""
        return bool(self.adapters and source.linear and names.adapter(source.linear, "in") in self.adapters.names)

    def adapted(self, base: Iterable[str]) -> dict[str, Source]:
        """Those of the base's weights that have an adapter, by Hugging Face's name."""
        found = {name: source for name in base if name.endswith(".weight") and (source := names.source(name))}
        return {name: source for name, source in found.items() if self.has_adapter(source)}

    def has_own_head(self) -> bool:
        """Whether the LM head differs from the embedding."""
        if self.model["tied_embeddings"]:
            return False
        head, embedding = (self.read(self.weights, name, None) for name in (names.HEAD, names.EMBEDDING))
        return not head.equal(embedding)

    def read(self, checkpoint: Checkpoint, name: str, layer: int | None) -> "torch.Tensor":
        """A tensor of Megatron. The last one is kept, because several weights are rows of one tensor."""
        key = (checkpoint, name, layer)
        if self._last is None or self._last[0] != key:
            self._last = None  # free it before the next one is read
            self._last = (key, checkpoint.read(name, layer))
        return self._last[1]

    def refuse_unknown(self, base: Iterable[str]) -> None:
        """JobError unless the base's weights are all of the checkpoint's tensors, and all of them are known."""
        used = {self.source(name).name for name in base}
        if unknown := sorted(self.weights.names - used - {names.HEAD}):
            raise _unknown(self.weights, unknown)
        if self.adapters:
            linears = {linear for linear, _ in names.LINEAR.values()}
            known = {names.adapter(linear, matrix) for linear in linears for matrix in ("in", "out")}
            if unknown := sorted(self.adapters.names - known):
                raise _unknown(self.adapters, unknown)


def _unknown(checkpoint: Checkpoint, unknown: list[str]) -> JobError:
    return JobError(
        f"{checkpoint.folder} has tensors that the base does not have: {', '.join(unknown[:5])}",
        "use the base that this checkpoint was trained from",
    )
END_OF_FTGEN_FILE
    cat >"$1"/runtime/guard/__init__.py <<'END_OF_FTGEN_FILE' || return
"""Build a folder once, however many jobs and ranks need it, and publish it only when it is complete.

In: a path, what identifies its content, and a function that builds it. Out: the folder. Start with `publish.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/guard/checkpoints.py <<'END_OF_FTGEN_FILE' || return
"""The checkpoints of a run: publish each one complete, find the newest complete one, keep the last ones.

In: the folder of a run's checkpoints, and plans. Out: <folder>/step_<N>/{weights/,manifest.json} after N steps.

A checkpoint is written into a staging folder. It gets a manifest and is renamed to step_<N>, so a folder of this name is
complete. A crash of the file system can still damage it, so its files must have the sizes of the manifest. They are not
hashed: a checkpoint has 100 GB and more. A damaged checkpoint is renamed, and an older one is used.

One job at a time owns the folder (see claim.py). An owner that was taken for dead publishes nothing.

Environment: FTGEN_RUN_DIR, the run directory (default $STAGE_PATH/logs).

manifest.json contains {"format", "step", "plan_sha256", "plan", "data", "versions", "files": {path: {"size": bytes}}}.

In <folder>:  step_<N>/  max_steps  .claims/<n>/  .step_<N>.staging-<n>/  step_<N>.untrusted-<time>/
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from runtime.guard import publish
from runtime.guard.claim import Claim, Watch, highest, stale_s
from runtime.guard.manifest import sync
from runtime.job.errors import JobError
from runtime.job.progress import say

FORMAT = 1
NAME = "manifest.json"
PREFIX = "step_"
STEPS = "max_steps"  # the file with the number of steps
# Keys of a plan that do not change what is trained. All others must be the same when a run is resumed.
NOT_TRAINING = {"format", "ftgen_version", "name", "experiment", "spec_file", "spec_sha256", "point", "overrides", "save"}
NOT_TRAINING |= {"window_steps", "profile", "environment", "stage_path", "modules", "setup_lines", "prefix", "python"}
NOT_TRAINING |= {"slurm", "checkpoint.gated", "export", "log"}
NOT_TRAINING |= {"gpu.memory_gib", "gpu.peak_flops", "model.flops_per_sample", "model.parameters"}

Plan = dict[str, Any]


class Checkpoint(NamedTuple):
    """A complete checkpoint."""

    path: Path
    step: int  # number of steps that were made
    manifest: dict[str, Any]


def folder_of_run() -> Path:
    """The folder of this run's checkpoints; the script sets FTGEN_RUN_DIR."""
    stage = os.environ.get("STAGE_PATH") or Path.cwd()
    return Path(os.environ.get("FTGEN_RUN_DIR") or Path(stage, "logs"), "checkpoints")


def own(folder: Path) -> Claim:
    """The right to write into the folder, for this process alone. JobError: another process has it and still lives."""
    claims = folder / ".claims"
    publish.make_directory(claims)
    watch, end = Watch(claims), time.monotonic() + 1.5 * stale_s()
    said = False
    while not (claim := watch.claim()):
        if not said:
            say(f"waiting for {folder}: {watch.holder()} trains this run, or was killed a moment ago")
            said = True
        if time.monotonic() > end:
            raise JobError(f"{watch.holder()} trains the run of {folder}", "wait until it ends, or cancel it")
        time.sleep(0.5)
    return claim


def clear(folder: Path, claim: Claim) -> None:
    """Remove what earlier owners left half-written, and rename the damaged checkpoints that are newer than a good one."""
    for left in [*folder.glob(f".{PREFIX}*.staging-*"), *folder.glob(f".{PREFIX}*.trash")]:
        if left.suffix == ".trash" or left.name.rpartition("-")[2] != str(claim.generation):
            shutil.rmtree(left, ignore_errors=True)
    for step, path in _all(folder):
        if (found := flaw(path)) is None:
            return
        aside = path.with_name(f"{path.name}.untrusted-{time.strftime('%Y%m%d-%H%M%S')}")
        path.rename(aside)
        say(f"checkpoint of step {step} is not used: {found}. It was moved to {aside}, which you can delete")


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that has no flaw; None if there is none."""
    for step, path in _all(folder):
        if flaw(path) is None:
            return Checkpoint(path, step, json.loads((path / NAME).read_text()))
    return None


def flaw(path: Path) -> str | None:
    """The first thing that is wrong with a checkpoint, or None. Never raises, whatever the folder contains."""
    try:
        document = json.loads((path / NAME).read_text())
        if document["format"] != FORMAT or not document["files"] or f"{PREFIX}{document['step']}" != path.name:
            return f"{NAME} has another format"
        sizes = {name: entry["size"] for name, entry in document["files"].items()}
        for name, size in sizes.items():
            found = (path / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} cannot be read: {error}"
    return None


def staging(folder: Path, step: int, generation: int) -> Path:
    """Where owner number `generation` writes the checkpoint of a step."""
    return folder / f".{PREFIX}{step}.staging-{generation}"


def sync_files(folder: Path) -> None:
    """Wait until the files below a folder are on the disk. A node can do this only for what it has written itself."""
    for path in folder.rglob("*"):
        sync(path)


def publish_step(folder: Path, step: int, generation: int, about: dict[str, Any]) -> int:
    """Give the staged checkpoint of a step its manifest and its name. JobError: another job owns the run by now.

    Returns its size in bytes.
    """
    staged, place = staging(folder, step, generation), folder / f"{PREFIX}{step}"
    files = {path.relative_to(staged).as_posix(): path for path in sorted(staged.rglob("*")) if path.is_file()}
    sizes = {name: {"size": path.stat().st_size} for name, path in files.items()}
    document = {"format": FORMAT, "step": step, **about, "files": sizes}
    (staged / NAME).write_text(json.dumps(document, indent=1) + "\n")
    for path in (staged / NAME, staged, *(path for path in staged.rglob("*") if path.is_dir())):
        sync(path)
    if highest(folder / ".claims") != generation:
        raise JobError(f"another job has taken over the run of {folder}", "let it train: this job stops here")
    staged.rename(place)
    sync(folder)
    return sum(entry["size"] for entry in sizes.values())


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest checkpoints. Each is renamed first: a half-removed one must not have its name."""
    for _, path in _all(folder)[count:]:
        trash = path.with_name(f".{path.name}.trash")
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)


def steps(folder: Path) -> int | None:
    """The number of steps of a run with epochs, which its first attempt has written; None before that."""
    try:
        return int((folder / STEPS).read_text())
    except (FileNotFoundError, ValueError):
        return None


def write_steps(folder: Path, count: int) -> None:
    """Write the number of steps of a run with epochs. The job's script reads it too."""
    written = folder / f".{STEPS}"
    written.write_text(f"{count}\n")
    written.replace(folder / STEPS)


def about(plan: Plan, data: list[str], versions: dict[str, str]) -> dict[str, Any]:
    """What a manifest says of the training: plan, names of the data's folders (with their hashes), package versions."""
    return {"plan_sha256": digest(plan), "plan": plan, "data": data, "versions": versions}


def digest(plan: Plan) -> str:
    """Hash of those keys of a plan that change what is trained."""
    return sha256(json.dumps(dict(_training(plan)), sort_keys=True).encode()).hexdigest()


def refuse_other(checkpoint: Checkpoint, plan: Plan) -> None:
    """JobError if the checkpoint was made by a plan that trains something else, with every difference."""
    before, now = dict(_training(checkpoint.manifest["plan"])), dict(_training(plan))
    found = [
        f"{key} is {before.get(key)!r} there and {now.get(key)!r} here"
        for key in sorted(before.keys() | now.keys())
        if (before.get(key) or None) != (now.get(key) or None)
    ]
    if found:
        schedule = " (max_steps changes the learning rate of every step)" if "max_steps" in found[0] else ""
        raise JobError(
            f"{checkpoint.path} was saved by another plan: {'; '.join(found)}{schedule}",
            "compile the spec as it was, or submit the script without --resume: that starts a new run",
        )


def _all(folder: Path) -> list[tuple[int, Path]]:
    """Step and path of every folder that has a checkpoint's name, the newest first."""
    names = ((path.name.removeprefix(PREFIX), path) for path in folder.glob(f"{PREFIX}*"))
    return sorted(((int(step), path) for step, path in names if step.isdigit()), reverse=True)


def _training(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of a plan, without those that do not change what is trained."""
    for key, value in tree.items():
        if f"{prefix}{key}" in NOT_TRAINING:
            continue
        if isinstance(value, dict) and value:
            yield from _training(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
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
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from runtime.job import signals
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
        signals.start_thread(self._beat_until_released)

    def is_current(self) -> bool:
        """Whether no other process has taken over."""
        return highest(self.claims) == self.generation

    def release(self) -> None:
        """Let the next process take over at once. In a forked child this does nothing: the parent still owns the claim."""
        if os.getpid() == self._pid and not self._stop.is_set():
            self._stop.set()
            _write(self.directory / "released", "")

    def _beat_until_released(self) -> None:
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
    make_directory(claims)
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


def make_directory(directory: Path) -> None:
    """Create a directory that this process can write to. JobError: that is not possible."""
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
        if is_disk_error(error):
            raise JobError(
                f"the disk of {directory} is full, or your quota is used up",
                "free some space there, or set STAGE_PATH to a directory on a larger file system",
            ) from error
        failed = [cause for cause in causes(error) if isinstance(cause, OSError)]
        denied = [cause for cause in failed if cause.errno in DENIED and str(cause.filename).startswith(str(directory))]
        if denied:
            raise _cannot_create(Path(denied[0].filename), denied[0]) from error
        raise


def is_disk_error(error: BaseException) -> bool:
    """Whether the disk or a quota is full, however deep in a library the error was raised."""
    return any(isinstance(cause, OSError) and cause.errno in FULL for cause in causes(error))
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
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from runtime.guard import publish
from runtime.hub import errors, find, transfer
from runtime.hub.repository import Repository
from runtime.job import signals
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

    signals.start_thread(work)
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
    """A complete snapshot in a hub cache, or None. Its name is the commit.

    Without `needed`, nobody knows whether a snapshot is complete.
    """
    if not repository.needed:
        return None
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
    if not names:
        return f"there is no {folder}"
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
import time
from collections.abc import Sequence
from hashlib import sha1
from pathlib import Path
from typing import NamedTuple

from runtime.guard.manifest import sha256_of
from runtime.hub import errors
from runtime.hub.repository import Repository
from runtime.job import signals
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
        signals.start_thread(work)
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
    cat >"$1"/runtime/job/children.py <<'END_OF_FTGEN_FILE' || return
"""How forked children of this process behave: data loaders' workers, and processes that write a checkpoint.

In: nothing. Out: every child that this process forks from now on is changed. Programs that it starts are not.
"""

import ctypes
import os
import signal
from multiprocessing.popen_fork import Popen

PR_SET_PDEATHSIG = 1  # linux/prctl.h
LIBC = ctypes.CDLL(None)


def end_with_this_process() -> None:
    """Kill the children when this process ends. Otherwise they would keep its memory and its output open."""
    os.register_at_fork(after_in_child=lambda: LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))


def pass_signals_by(*signals: signal.Signals) -> None:
    """Block these signals in the children. Slurm sends a signal to every process of a task, and only the task handles it.

    A data loader's worker that dies makes the training fail, and a process that writes a part of a checkpoint the save.
    multiprocessing ends its children with SIGTERM and waits for them: now that they block it, with SIGKILL.
    """
    os.register_at_fork(after_in_child=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signals))
    if signal.SIGTERM in signals:
        setattr(Popen, "terminate", _kill)  # noqa: B010 - mypy refuses an assignment


def _kill(process: Popen) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take the end of a worker for a failure
    process.kill()
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/environment.py <<'END_OF_FTGEN_FILE' || return
"""Write the environment of a training into its log: versions, machine, Slurm job. `ftgen report` shows it.

In: a plan and the process environment. Out: one line in the log, `ftgen environment: {...}`, and beside the log the file
environment.json, which also has what is too long for a line: every package, firmware, the topology of the GPUs.

Environment: RANK, FTGEN_RUN_DIR, FTGEN_SCRIPT_SHA256, and Slurm's variables in JOB.
"""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
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
INFINIBAND = Path("/sys/class/infiniband")
LONGEST_S = 20  # that nvidia-smi may take
JOB = {"job": "SLURM_JOB_ID", "nodes": "SLURM_JOB_NODELIST", "partition": "SLURM_JOB_PARTITION"}


def tell(plan: dict[str, Any], off: dict[str, str] | None = None) -> None:
    """Print the line; only rank 0 does. `off`: optimizations of the plan that these packages cannot do, and why."""
    if os.environ.get("RANK", "0") == "0":
        facts = found(plan) | ({"optimizations_off": off} if off else {})
        print(f"ftgen environment: {json.dumps(facts)}", flush=True)
        if folder := os.environ.get("FTGEN_RUN_DIR"):
            _write(Path(folder, "environment.json"), facts | more(plan))


def found(plan: dict[str, Any]) -> dict[str, Any]:
    """The environment as names and values; what this machine does not have is left out."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": packages(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        **{name: os.environ[variable] for name, variable in JOB.items() if os.environ.get(variable)},
        **({"script_sha256": script} if (script := os.environ.get("FTGEN_SCRIPT_SHA256")) else {}),
    }
    return facts | (_gpu() if plan["gpu"]["name"] != "cpu" else {})


def packages() -> dict[str, str]:
    """Versions of the packages that decide what is computed."""
    return {name: number for name in PACKAGES if (number := installed(name))}


def more(plan: dict[str, Any]) -> dict[str, Any]:
    """What is too long for a line of the log; what this machine does not have is left out."""
    every = {each.name: each.version for each in distributions() if each.name}
    firmware = {path.parent.name: path.read_text().strip() for path in sorted(INFINIBAND.glob("*/fw_ver"))}
    facts: dict[str, Any] = {"all_packages": dict(sorted(every.items())), "infiniband": firmware}
    if plan["gpu"]["name"] != "cpu":
        facts |= {"topology": _nvidia_smi("topo", "-m")}
        facts |= {"vbios": _nvidia_smi("--query-gpu=vbios_version", "--format=csv,noheader", "--id=0")}
    return {name: value for name, value in facts.items() if value}


def _nvidia_smi(*words: str) -> str | None:
    """What nvidia-smi prints; None if it is not there or fails, as in an image without it."""
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=LONGEST_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _write(file: Path, facts: dict[str, Any]) -> None:
    """Write the file. The training goes on without it: a disk may be full."""
    try:
        file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"ftgen: warning: {file} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def _gpu() -> dict[str, Any]:
    import torch

    here = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": here.name,
        "gpu_memory_gib": round(here.total_memory / 2**30, 2),
        "cuda": torch.version.cuda,
        "cudnn": _cudnn(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "driver": DRIVER.read_text().strip() if DRIVER.is_file() else None,
    }


def _cudnn() -> int | None:
    """The version of cuDNN that is loaded. If it is not the one for this PyTorch, PyTorch refuses to say it."""
    import torch

    try:
        found: int | None = torch.backends.cudnn.version()
    except RuntimeError as error:
        what = str(error).partition(". ")[0]
        print(f"ftgen: warning: {what}", file=sys.stderr, flush=True)
        return None
    return found


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
    cat >"$1"/runtime/job/memory.py <<'END_OF_FTGEN_FILE' || return
"""Tell how much memory this process can still use.

In: /proc and the control groups of this process. Out: bytes.

A Slurm job or a container can have less than the machine. Its limit is in a control group, of version 1 or 2. Cached
files count as used there; the kernel frees those of the list `inactive_file` first, so they are free here.
"""

from collections.abc import Iterator
from pathlib import Path

# By version: the folder of all groups, the files of limit and use, and the key of cached files in memory.stat.
VERSION_1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file")


def available(root: Path = Path("/")) -> int:
    """Bytes that are free on the machine, or below the lowest limit. 0 if the system does not report it."""
    lines = _text(root / "proc/meminfo").splitlines()
    machine = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    return max(0, min([*machine, *_below_limits(root)], default=0))


def _below_limits(root: Path) -> Iterator[int]:
    """What each limit of this process's groups, and of the groups around them, leaves."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, limit, used, cached = VERSION_1 if controllers else VERSION_2
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            own = root / top / folder
            if _text(own / limit).isdigit() and _text(own / used).isdigit():
                yield int(_text(own / limit)) - int(_text(own / used)) + _stat(own, cached)


def _stat(folder: Path, key: str) -> int:
    lines = (line.split() for line in _text(folder / "memory.stat").splitlines())
    return next((int(words[1]) for words in lines if words[:1] == [key]), 0)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/names.py <<'END_OF_FTGEN_FILE' || return
"""Names for messages. In: keys of a plan. Out: words."""

ENGINES = {"nemo": "NeMo", "megatron_bridge": "Megatron-Bridge"}
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
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the GPU may still be at the step before
        if self.tool == "nsys":
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
from datetime import datetime, timezone


def say(text: str, *, any_rank: bool = False) -> None:
    """Print `ftgen: text` on rank 0. `any_rank` prints on every rank: for an event that happens on one rank only."""
    if any_rank or os.environ.get("RANK", "0") == "0":
        print(f"ftgen: {text}", flush=True)


def say_clock(step: int) -> None:
    """Print the time, and how many steps the run has made. The job's script prints it at its start and its end."""
    say(f"clock {datetime.now(timezone.utc).isoformat(timespec='seconds')} after step {step}")


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
    cat >"$1"/runtime/job/signals.py <<'END_OF_FTGEN_FILE' || return
"""Keep the signals of a job away from its helpers, so that the main thread always receives them.

In: a function and its arguments. Out: a running thread that ends with the process.

Python handles a signal in the main thread. If the system delivers it to another one, a long call of the main thread, such
as a sleep or a read, goes on as if nothing had happened, and the job ends only when Slurm kills it.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OF_A_JOB = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1}


@contextmanager
def blocked() -> Iterator[None]:
    """Block them. A thread or a process that is started in the block keeps them blocked, from its first moment on."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, OF_A_JOB)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def start_thread(work: Callable[..., None], *arguments: object) -> threading.Thread:
    """Run `work(*arguments)` in a thread that receives no signals."""
    thread = threading.Thread(target=work, args=arguments, daemon=True)
    with blocked():
        thread.start()
    return thread
END_OF_FTGEN_FILE
    cat >"$1"/runtime/job/stop.py <<'END_OF_FTGEN_FILE' || return
"""Stop a training when Slurm asks for it, after the current step instead of at once.

In: signals to this process. Out: `asked()`, the name of the first signal, or "".

SIGUSR1 is Slurm's warning before the time limit. SIGTERM comes with a pre-emption, a requeue and a cancellation.
"""

import signal
from types import FrameType

AGAIN = 85  # exit code of a training that was saved before its last step: run it again
_asked: list[str] = []


def listen(*signals: signal.Signals) -> None:
    """From now on these signals do not end this process; `asked` tells of them. Only the main thread may call this."""
    for one in signals:
        signal.signal(one, _note)


def asked() -> str:
    """Name of the first signal that asked this process to stop; "" if none did."""
    return _asked[0] if _asked else ""


def _note(number: int, _frame: FrameType | None) -> None:
    _asked.append(signal.Signals(number).name)
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
import sys
import threading
import time
import traceback
from pathlib import Path

from runtime.job import signals

QUIET_S = 600.0
POLLS = 20  # in FTGEN_QUIET_S: how often to look for the file
CALLS = 30  # of the innermost are written


def begin(command: str) -> None:
    """Start the thread. It ends with the process."""
    quiet = float(os.environ.get("FTGEN_QUIET_S") or QUIET_S)
    folder = Path(os.environ["FTGEN_RUN_DIR"], "stacks")
    signals.start_thread(_answer, folder, command, quiet)


def _answer(folder: Path, command: str, quiet: float) -> None:
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
    cat >"$1"/runtime/node/__init__.py <<'END_OF_FTGEN_FILE' || return
"""Check a node before the training, and record its GPUs while it runs, so that a slow figure is not blamed on the software.

In: a plan. Out: a line in the log for each node, the file nodes/<name>.json beside the log; an error if the plan says so.
Start with `beside.py`, which runs `check.py` in a process of its own while the training imports its packages, and with
`telemetry.py`, which runs `sampler.py` beside the training.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/node/beside.py <<'END_OF_FTGEN_FILE' || return
"""Check the node in a process of its own, beside the imports of the training, which take longer.

In: a plan. Out: a line in the log, `ftgen node: {...}`, a sentence for each problem, and the file nodes/<name>.json beside
the log. JobError if the node is not well and the plan says stop.

Environment: LOCAL_RANK (the first rank of a node checks for all), FTGEN_RUN_DIR.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.job.errors import JobError
from runtime.job.progress import say
from runtime.node.check import BAD, NO_GPU, RESULT, name

Plan = dict[str, Any]
LIMIT_S = 60.0  # after the imports of the training, which take as long as those of the check
LONGEST_LINE = 900  # bytes: srun may tear longer lines apart
SHOWN = ("node", "state", "gpu", "gpus", "gemm_tflops", "copy_gb_per_s", "host_gb_per_s", "all_reduce_gb_per_s", "seconds")


@contextmanager
def checked(plan: Plan) -> Iterator[None]:
    """Check the node while the block runs, and tell what was found when it ends. JobError: the plan says stop."""
    if not plan["node_check"]["on"] or os.environ.get("LOCAL_RANK", "0") != "0":
        yield
        return
    process = _start(plan)
    try:
        yield
        found = _found(process)
    finally:
        process.kill()
        process.wait()
    _tell(found)
    if found["state"] == BAD and plan["node_check"]["bad"] == "stop":
        hint = 'exclude the node (sbatch --exclude), or set bad = "warn" in [node_check] of the site profile'
        raise JobError(f"node {found['node']} is not well: {'; '.join(found['problems'])}", hint)


def _start(plan: Plan) -> "subprocess.Popen[str]":
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "runtime.node.check"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # CUDA counts GPUs as nvidia-smi does
        env=os.environ | {"PYTHONPATH": path, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
    )
    assert process.stdin  # noqa: S101 - it is a pipe
    asked = {key: plan[key] for key in ("gpu", "gpus_per_node", "node_check")}
    process.stdin.write(json.dumps(asked))
    process.stdin.close()
    process.stdin = None  # communicate() would flush it
    return process


def _found(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """What the process found; that it found nothing is a problem of the node too."""
    try:
        out, err = process.communicate(timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        return _nothing(f"the check did not end within {LIMIT_S:.0f} s: a GPU may hang")
    for line in out.splitlines():
        if line.startswith(RESULT):
            found: dict[str, Any] = json.loads(line.removeprefix(RESULT))
            return found
    last = next((line for line in reversed(err.splitlines()) if line.strip()), f"exit code {process.returncode}")
    return _nothing(f"the check failed: {last.strip()}")


def _nothing(why: str) -> dict[str, Any]:
    return {"node": name(), "state": BAD, "problems": [why]}


def _tell(found: dict[str, Any]) -> None:
    """Write all into the file, and what fits into a line of the log."""
    folder = Path(os.environ.get("FTGEN_RUN_DIR") or ".", "nodes")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        Path(folder, f"{found['node']}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"ftgen: warning: {folder} cannot be written: {error.strerror}", file=sys.stderr, flush=True)
    shown = {key: found[key] for key in SHOWN if key in found}
    print(f"ftgen node: {json.dumps(shown | {'problems': _fitting(found['problems'], shown)})}", flush=True)
    for problem in found["problems"]:
        say(f"warning: node {found['node']} is not well: {problem}", any_rank=True)
    if found["state"] == NO_GPU:
        say(f"node {found['node']}: no GPU to check")


def _fitting(problems: list[str], shown: dict[str, Any]) -> list[str]:
    """As many problems as fit into the line, and the number of the rest."""
    kept: list[str] = []
    for number, problem in enumerate(problems):
        line = json.dumps(shown | {"problems": [*kept, problem]})
        if len(line) > LONGEST_LINE:
            return [*kept, f"and {len(problems) - number} more"]
        kept.append(problem)
    return kept
END_OF_FTGEN_FILE
    cat >"$1"/runtime/node/check.py <<'END_OF_FTGEN_FILE' || return
"""Check this node: the program that `beside.py` starts once on each node.

In: on stdin, JSON with the plan's gpu, gpus_per_node and node_check. Out: on stdout, a line with RESULT and JSON: what was
found, and the problems. The program has the GPUs for itself and its memory is free again when it ends.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.node import judge, measure, smi

RESULT = "ftgen node check: "
WELL, BAD, NO_GPU = "well", "bad", "no GPU"
FIGURES = ("gemm_tflops", "copy_gb_per_s", "host_gb_per_s")

Found = dict[str, Any]


def main() -> None:
    """Check, and print what was found."""
    asked = json.loads(sys.stdin.read())
    begin = time.monotonic()
    found = check(asked["gpu"]["name"], asked["gpus_per_node"], asked["node_check"]["expected"])
    found["seconds"] = round(time.monotonic() - begin, 1)
    print(RESULT + json.dumps(found), flush=True)


def check(gpu: str, wanted: int, expected: dict[str, Any]) -> Found:
    """What was found of this node."""
    node: Found = {"node": name(), "state": NO_GPU, "problems": [], "host": host()}
    if gpu == "cpu":
        return node
    gpus, problems = _asked()
    all_reduce, more = _measured(gpus)
    problems += [*more, *judge.problems(gpus, wanted, expected), *judge.of_all_reduce(all_reduce, expected)]
    lowest = {figure: min((each[figure] for each in gpus if figure in each), default=None) for figure in FIGURES}
    return {
        **node,
        "state": BAD if problems else WELL,
        "gpu": next((each["name"] for each in gpus if each.get("name")), None),
        "gpus": len(gpus),
        **{figure: round(value, 1) for figure, value in {**lowest, "all_reduce_gb_per_s": all_reduce}.items() if value},
        "problems": problems,
        "devices": gpus,
    }


def name() -> str:
    """The name of this node."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def host() -> Found:
    """What the machine has besides GPUs: CPUs for us, free memory, load, the network's links."""
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    links = {
        path.parent.parent.parent.name: path.read_text().strip()
        for path in sorted(Path("/sys/class/infiniband").glob("*/ports/1/rate"))
    }
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory_free_gib": round(int(memory["MemAvailable"].split()[0]) / 2**20, 1),
        "load": os.getloadavg()[0],
        **({"infiniband": links} if links else {}),
    }


def _asked() -> tuple[list[Found], list[str]]:
    """What nvidia-smi says of each GPU at rest."""
    try:
        gpus: list[Found] = [dict(gpu) for gpu in smi.query(smi.AT_REST)]
        for gpu in gpus:
            gpu.update(next((rows for rows in smi.remapped_rows() if rows["uuid"] == gpu["uuid"]), {}))
        links = smi.nvlinks()
        for gpu in gpus:  # nvidia-smi counts all GPUs of the node here
            index = int(gpu["index"] or 0)
            gpu.update({"nvlinks": links[index]} if index < len(links) else {})
        return gpus, []
    except smi.SmiError as error:
        return [], [f"nvidia-smi: {error}"]


def _measured(gpus: list[Found]) -> tuple[float | None, list[str]]:
    """Add the figures to the GPUs; the all-reduce, and what failed. A GPU that fails is a finding, not an error of ours."""
    problems: list[str] = []

    def at_work() -> None:
        try:
            for gpu, facts in zip(gpus, smi.query(smi.AT_WORK), strict=False):
                gpu.update(facts)
        except smi.SmiError as error:
            problems.append(f"nvidia-smi under load: {error}")

    def part(what: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except (RuntimeError, AssertionError) as error:  # PyTorch's for CUDA and NCCL
            problems.append(f"the {what} failed: {str(error).partition(chr(10))[0]}")
            return None

    seen = part("look for GPUs", measure.count) or 0
    gpus += [{} for _ in range(seen - len(gpus))]
    if not seen:
        return None, [*problems, "PyTorch finds no GPU"]
    for what, work in (("GEMM", lambda: measure.gemms(at_work)), ("copy", measure.copies)):
        for gpu, figures in zip(gpus, part(what, work) or [], strict=False):
            gpu.update(figures)
    return part("all-reduce", measure.all_reduce), problems


if __name__ == "__main__":
    main()
END_OF_FTGEN_FILE
    cat >"$1"/runtime/node/judge.py <<'END_OF_FTGEN_FILE' || return
"""Judge what was found of a node's GPUs. In: facts, and what the catalogue expects of the GPU. Out: a line for each problem.

The thresholds are fractions that healthy GPUs keep away from. docs/how-to/node-check.md says where each comes from.
"""

import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

GEMM = 0.75  # of the measured rate of the same GPU
GEMM_OF_PEAK = 0.5  # of the dense peak, for a GPU whose rate nobody has measured for the catalogue; an H200 reaches 0.74
COPY = 0.6  # of the published memory bandwidth
NEIGHBOURS = {"gemm_tflops": 0.9, "copy_gb_per_s": 0.9, "host_gb_per_s": 0.6}  # of the median of the node's GPUs
ALL_REDUCE = 0.25  # of NVLink's bandwidth; over PCIe it would be less
CLOCK = 0.6  # of the highest clock, while a GEMM runs at the power limit
USED = 0.05  # of the memory, before the training has any
# Bits of clocks_event_reasons.active, from nvml.h. A power cap (0x4) is normal under a GEMM.
THROTTLED = {0x8: "hardware slowdown", 0x20: "thermal slowdown", 0x40: "thermal slowdown by hardware", 0x80: "power brake"}
BROKEN = re.compile(r"requires reset|Unknown Error|lost", re.IGNORECASE)

Facts = Mapping[str, Any]
Expected = Mapping[str, Any]


def problems(gpus: Sequence[Facts], wanted: int, expected: Expected) -> list[str]:
    """Everything that is wrong with the GPUs of a node. Each has the fields of smi.py and the figures of measure.py."""
    found = [] if len(gpus) >= wanted else [f"{len(gpus)} GPUs, the plan needs {wanted}"]
    for number, gpu in enumerate(gpus):
        found += [f"GPU {gpu.get('index') or number}: {what}" for what in _of_one(gpu, expected, alone=len(gpus) == 1)]
    return [*found, *_beside_each_other(gpus)]


def of_all_reduce(gb_per_s: float | None, expected: Expected) -> Iterator[str]:
    """An all-reduce inside the node that does not use NVLink."""
    nvlink = expected.get("nvlink_gb_per_s")
    if gb_per_s is not None and nvlink and gb_per_s < ALL_REDUCE * nvlink:
        yield f"the all-reduce inside the node reaches {gb_per_s:.0f} GB/s, NVLink has {nvlink:g} GB/s"


def _of_one(gpu: Facts, expected: Expected, *, alone: bool) -> Iterator[str]:
    yield from (f"{field} is {value}" for field, value in gpu.items() if isinstance(value, str) and BROKEN.search(value))
    word, name = expected.get("driver_name"), gpu.get("name")
    if word and name and word not in str(name).split():
        yield f"is a {name}, the plan is for {word}"
    yield from _memory(gpu)
    yield from _clocks(gpu)
    yield from _links(gpu, expected, alone=alone)
    yield from _speed(gpu, expected)


def _memory(gpu: Facts) -> Iterator[str]:
    if errors := _number(gpu, "ecc.errors.uncorrected.volatile.total"):
        yield f"{errors:.0f} uncorrected ECC errors since the driver was loaded"
    if gpu.get("ecc.mode.current") == "Disabled":
        yield "ECC is off"
    if _is_yes(gpu.get("remapped_rows.pending")):
        yield "memory rows wait to be replaced: the GPU must be reset"
    if _is_yes(gpu.get("remapped_rows.failure")):
        yield "memory rows could not be replaced"
    total, used = _number(gpu, "memory.total"), _number(gpu, "memory.used")
    if total and used is not None and used > USED * total:
        yield f"{used / 1024:.1f} GiB of its memory are in use by somebody else"


def _clocks(gpu: Facts) -> Iterator[str]:
    mask = re.fullmatch("0x([0-9a-fA-F]{1,16})", str(gpu.get("clocks_event_reasons.active")))
    reasons = [reason for bit, reason in THROTTLED.items() if mask and int(mask[1], 16) & bit]
    clock, highest = _number(gpu, "clocks.sm"), _number(gpu, "clocks.max.sm")
    if reasons:
        yield f"its clock is held back: {', '.join(reasons)}{_at(gpu)}"
    elif clock and highest and "gemm_tflops" in gpu and clock < CLOCK * highest:
        yield f"its clock is {clock:.0f} of {highest:.0f} MHz under load{_at(gpu)}"


def _at(gpu: Facts) -> str:
    temperature = _number(gpu, "temperature.gpu")
    return "" if temperature is None else f" at {temperature:.0f} °C"


def _links(gpu: Facts, expected: Expected, *, alone: bool) -> Iterator[str]:
    for what, field in (("width", "pcie.link.width"), ("generation", "pcie.link.gen")):
        now, most = _number(gpu, f"{field}.current"), _number(gpu, f"{field}.max")
        if now and most and now < most:
            yield f"its PCIe link has {what} {now:.0f}, it can have {most:.0f}"
    links = gpu.get("nvlinks")
    if links is None or alone:  # a GPU alone in a virtual machine has none to talk to
        return
    active = [speed for speed in links if speed]
    wanted = max(int(expected.get("nvlinks", 0)), len(links))
    if len(active) < wanted:
        yield f"{len(active)} of {wanted} NVLinks are active"
    elif active and min(active) < 0.95 * max(active):
        yield f"an NVLink has {min(active):g} GB/s, another {max(active):g} GB/s"


def _speed(gpu: Facts, expected: Expected) -> Iterator[str]:
    gemm, measured, peak = gpu.get("gemm_tflops"), expected.get("gemm_tflops"), expected.get("peak_bf16_tflops")
    if gemm and measured and gemm < GEMM * measured:
        yield f"a GEMM reaches {gemm:.0f} TFLOP/s, this GPU was measured at {measured:g}"
    elif gemm and peak and not measured and gemm < GEMM_OF_PEAK * peak:
        yield f"a GEMM reaches {gemm:.0f} TFLOP/s, the peak is {peak:g}"
    copy, memory = gpu.get("copy_gb_per_s"), expected.get("memory_gb_per_s")
    if copy and memory and copy < COPY * memory:
        yield f"a copy reaches {copy:.0f} GB/s, its memory has {memory:g} GB/s"


def _beside_each_other(gpus: Sequence[Facts]) -> Iterator[str]:
    """GPUs that are much slower than the others of the node."""
    for figure, least in NEIGHBOURS.items():
        known = [(number, gpu[figure]) for number, gpu in enumerate(gpus) if gpu.get(figure)]
        middle = statistics.median(value for _, value in known) if len(known) > 2 else None
        for number, value in known:
            if middle and value < least * middle:
                index = gpus[number].get("index") or number
                yield f"GPU {index}: {figure} is {value:.0f}, that of the node's other GPUs {middle:.0f}"


def _number(gpu: Facts, field: str) -> float | None:
    try:
        return float(str(gpu.get(field)))
    except ValueError:
        return None


def _is_yes(value: Any) -> bool:
    return value is not None and str(value).lower() not in {"no", "0"}
END_OF_FTGEN_FILE
    cat >"$1"/runtime/node/measure.py <<'END_OF_FTGEN_FILE' || return
"""Measure the GPUs of this node: a GEMM, a copy in their memory, one from the host, an all-reduce between them.

In: a function that is called while the GEMMs run. Out: figures of each GPU, and the bandwidth of the all-reduce. All GPUs
multiply at the same time, as in a training, so that a power limit or the heat of neighbours shows.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

SIZE = 8192  # of the square matrices: 1.1 TFLOP, large enough for every GPU's best rate
WARM, TIMED = 100, 800  # GEMMs: an H200 takes 1.4 s. A GPU takes about 1,000 launches at a time
COPY_BYTES, COPIES = 1 << 30, 40
HOST_BYTES, HOST_COPIES = 256 << 20, 6
REDUCE_BYTES, REDUCTIONS = 256 << 20, 10


def count() -> int:
    """The GPUs that PyTorch finds."""
    import torch

    return int(torch.cuda.device_count())


def gemms(at_work: Callable[[], None]) -> list[dict[str, float]]:
    """TFLOP/s of each GPU in BF16. `at_work` is called while they run."""
    import torch

    timers = []
    for device in range(count()):
        with torch.cuda.device(device):
            # of random numbers, as in a training: zeros need less power, and run faster
            left, right = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            result = torch.empty_like(left)
            for _ in range(3):  # choose and load the kernel
                torch.mm(left, right, out=result)
            torch.cuda.synchronize()
            timers.append((left, right, result, *(torch.cuda.Event(enable_timing=True) for _ in range(2))))
    for number in range(WARM + TIMED):
        for device, (left, right, result, begin, _) in enumerate(timers):
            with torch.cuda.device(device):
                if number == WARM:
                    begin.record()
                torch.mm(left, right, out=result)
    for device, (*_, end) in enumerate(timers):
        with torch.cuda.device(device):
            end.record()
    at_work()
    for device in range(count()):
        torch.cuda.synchronize(device)
    return [{"gemm_tflops": 2e-12 * SIZE**3 * TIMED / _seconds(begin, end)} for *_, begin, end in timers]


def copies() -> list[dict[str, float]]:
    """GB/s of each GPU: in its memory, counting what is read and what is written, and from pinned memory of the host."""
    import torch

    found = []
    for device in range(count()):
        with torch.cuda.device(device):
            here, there = (torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
            host = torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=True)
            inside = _timed(partial(there.copy_, here), COPIES)
            outside = _timed(partial(here[:HOST_BYTES].copy_, host, non_blocking=True), HOST_COPIES)
            found.append({"copy_gb_per_s": 2e-9 * COPY_BYTES / inside, "host_gb_per_s": 1e-9 * HOST_BYTES / outside})
    return found


def all_reduce() -> float | None:
    """GB/s of an all-reduce between the GPUs, as bus bandwidth: 2 (n-1)/n of the bytes. None for one GPU.

    RuntimeError: the sum is wrong, or NCCL fails.
    """
    import torch
    from torch.cuda import nccl

    gpus = count()
    if gpus < 2:
        return None
    small = [torch.full((1024,), float(device + 1), device=f"cuda:{device}") for device in range(gpus)]
    nccl.all_reduce(small)
    if any((tensor != gpus * (gpus + 1) / 2).any().item() for tensor in small):
        raise RuntimeError("the all-reduce inside the node gives a wrong sum")
    tensors = [torch.zeros(REDUCE_BYTES // 2, dtype=torch.bfloat16, device=f"cuda:{device}") for device in range(gpus)]

    def reduce(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            nccl.all_reduce(tensors)
        for device in range(gpus):
            torch.cuda.synchronize(device)
        return (time.perf_counter() - begin) / times

    reduce(2)
    return 2e-9 * (gpus - 1) / gpus * REDUCE_BYTES / reduce(REDUCTIONS)


def _timed(work: Callable[[], Any], times: int) -> float:
    """Seconds of the work, once it is warm."""
    import torch

    work()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return _seconds(begin, end) / times


def _seconds(begin: Any, end: Any) -> float:
    return float(begin.elapsed_time(end)) / 1000
END_OF_FTGEN_FILE
    cat >"$1"/runtime/node/nvml.py <<'END_OF_FTGEN_FILE' || return
"""Ask NVML, the driver's library behind nvidia-smi, for the state of this node's GPUs.

In: nothing, or a GPU. Out: names, and the figures of FIGURES as numbers. None: a GPU or a driver does not have the figure.

Once a second, nvidia-smi would be too slow: each of its calls is a process. The names and numbers are those of nvml.h.
"""

import ctypes
from collections.abc import Callable
from typing import Any

LIBRARY = "libnvidia-ml.so.1"  # of the driver
LONGEST_TEXT = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE, and the size for UUIDs
NOT_FOUND = 13  # NVML_ERROR_FUNCTION_NOT_FOUND
SM, MEMORY = 1, 2  # nvmlClockType_t
ON_GPU = 0  # nvmlTemperatureSensors_t

Handle = ctypes.c_void_p
Figures = dict[str, float | int | None]


class NvmlError(Exception):
    """Why NVML says nothing."""


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


class Nvml:
    """NVML, loaded and initialized. NvmlError: it is not there, or the driver does not answer."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise NvmlError(f"NVML cannot be loaded: {error}") from None
        self._must("nvmlInit_v2")

    def gpus(self) -> list[tuple[Handle, dict[str, str | None]]]:
        """Every GPU that this process may see, with its index, UUID and name."""
        count = ctypes.c_uint()
        self._must("nvmlDeviceGetCount_v2", ctypes.byref(count))
        found = []
        for index in range(count.value):
            gpu = Handle()
            self._must("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(gpu))
            uuid, name = (self._text(function, gpu) for function in ("nvmlDeviceGetUUID", "nvmlDeviceGetName"))
            found.append((gpu, {"index": str(index), "uuid": uuid, "name": name}))
        return found

    def figures(self, gpu: Handle) -> Figures:
        """What FIGURES names, of one GPU, now."""
        return {name: ask(self, gpu) for name, ask in FIGURES.items()}

    def number(self, gpu: Handle, function: str, *arguments: Any, kind: Any = ctypes.c_uint) -> int | None:
        """The number that a function writes behind its last argument."""
        value = kind()
        status = self._call(function, gpu, *arguments, ctypes.byref(value))
        return None if status else int(value.value)

    def memory_used(self, gpu: Handle) -> int | None:
        """Bytes that are in use."""
        memory = _Memory()
        return None if self._call("nvmlDeviceGetMemoryInfo", gpu, ctypes.byref(memory)) else int(memory.used)

    def _text(self, function: str, gpu: Handle) -> str | None:
        text = ctypes.create_string_buffer(LONGEST_TEXT)
        status = self._call(function, gpu, text, ctypes.c_uint(LONGEST_TEXT))
        return None if status else text.value.decode(errors="replace")

    def _call(self, function: str, *arguments: Any) -> int:
        """The function's status; 0 is success."""
        found = getattr(self._library, function, None)
        return int(found(*arguments)) if found else NOT_FOUND

    def _must(self, function: str, *arguments: Any) -> None:
        if status := self._call(function, *arguments):
            raise NvmlError(f"{function}: {self._said(status)}")

    def _said(self, status: int) -> str:
        describe = getattr(self._library, "nvmlErrorString", None)
        if not describe:
            return f"error {status}"
        describe.restype = ctypes.c_char_p
        return f"{(describe(status) or b'').decode(errors='replace')} ({status})"


def _power(nvml: Nvml, gpu: Handle) -> float | None:
    milliwatts = nvml.number(gpu, "nvmlDeviceGetPowerUsage")
    return None if milliwatts is None else milliwatts / 1000


def _energy(nvml: Nvml, gpu: Handle) -> float | None:
    millijoules = nvml.number(gpu, "nvmlDeviceGetTotalEnergyConsumption", kind=ctypes.c_ulonglong)
    return None if millijoules is None else millijoules / 1000


def _reasons(nvml: Nvml, gpu: Handle) -> int | None:
    for function in ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"):  # before 535
        bits = nvml.number(gpu, function, kind=ctypes.c_ulonglong)
        if bits is not None:
            return bits
    return None


def _memory_gib(nvml: Nvml, gpu: Handle) -> float | None:
    used = nvml.memory_used(gpu)
    return None if used is None else round(used / 2**30, 3)


FIGURES: dict[str, Callable[[Nvml, Handle], float | int | None]] = {
    "power_w": _power,  # since Ampere the mean of the last second, but for GA100, which tells the moment's
    "energy_j": _energy,  # since the driver was loaded
    "sm_clock_mhz": lambda nvml, gpu: nvml.number(gpu, "nvmlDeviceGetClockInfo", ctypes.c_int(SM)),
    "memory_clock_mhz": lambda nvml, gpu: nvml.number(gpu, "nvmlDeviceGetClockInfo", ctypes.c_int(MEMORY)),
    "throttle_reasons": _reasons,  # bits nvmlClocksEventReason…
    "temperature_c": lambda nvml, gpu: nvml.number(gpu, "nvmlDeviceGetTemperature", ctypes.c_int(ON_GPU)),
    "memory_used_gib": _memory_gib,
}
END_OF_FTGEN_FILE
    cat >"$1"/runtime/node/sampler.py <<'END_OF_FTGEN_FILE' || return
"""Write the telemetry of this node's GPUs into a file: the program that `telemetry.py` starts once on each node.

    python -m runtime.node.sampler FILE NODE GPUS PARENT

In: on stdin, a line `STEP TIME` for the end of each step. Out: lines of JSON, appended to FILE: a head with "gpus", then a
sample a second with a list of each figure, one value for each GPU, and a line for each step. TIME and "time_s" are seconds
since 1970, UTC. Exit code: 1, no NVML; else the number of the error with which FILE could not be written.

The program ends when its stdin ends or process PARENT is gone, so with the training, whatever ends that. `telemetry.py`
starts it with the job's signals blocked: Slurm sends them to every process, and the training decides what they mean.
"""

import json
import os
import select
import sys
import time
from typing import Any

from runtime.node import smi
from runtime.node.nvml import FIGURES, Handle, Nvml, NvmlError

FORMAT = 1
INTERVAL_S = 1.0
NO_NVML = 1
LAZY = 19  # the least that a scheduler gives


def main(file: str, node: str, wanted: int, parent: int) -> int:
    """Sample until the training ends."""
    os.nice(LAZY)
    try:
        nvml = Nvml()
        gpus = chosen(nvml, wanted)
    except NvmlError as error:
        print(f"ftgen: no telemetry of node {node}: {error}", flush=True)
        return NO_NVML
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the log must not wait for this process
    os.dup2(1, 2)
    try:
        with open(file, "ab", buffering=0) as output:  # noqa: PTH123 - unbuffered: nothing is lost when it is killed
            if output.tell():
                output.write(b"\n")  # the last line of an attempt that was killed may be torn
            _write(output, {"format": FORMAT, "node": node, "interval_s": INTERVAL_S, "gpus": [facts for _, facts in gpus]})
            _sample(nvml, [gpu for gpu, _ in gpus], output, parent)
    except OSError as error:
        return error.errno or NO_NVML
    return 0


def chosen(nvml: Nvml, wanted: int) -> list[tuple[Handle, dict[str, str | None]]]:
    """The GPUs of the training: as many as it has here, of those that CUDA_VISIBLE_DEVICES names. NvmlError: none."""
    if "MIG-" in os.environ.get("CUDA_VISIBLE_DEVICES", ""):
        raise NvmlError("a part of a GPU (MIG) has no power of its own")
    found = nvml.gpus()
    seen = [facts["uuid"] for facts in smi.visible([facts for _, facts in found])]
    gpus = [(gpu, facts) for gpu, facts in found if facts["uuid"] in seen][:wanted]
    if not gpus:
        raise NvmlError("NVML finds no GPU")
    return gpus


def _sample(nvml: Nvml, gpus: list[Handle], output: Any, parent: int) -> None:
    due, told = time.monotonic(), b""
    while os.getppid() == parent:
        _write(output, sample(nvml, gpus))
        due = max(due + INTERVAL_S, time.monotonic())  # a driver that was slow is not asked twice at once
        while (left_s := due - time.monotonic()) > 0:
            if select.select([0], [], [], left_s)[0]:
                if not (more := os.read(0, 65536)):
                    return
                *lines, told = (told + more).split(b"\n")
                for line in lines:
                    step, time_s = line.split()
                    _write(output, {"step": int(step), "time_s": float(time_s)})


def sample(nvml: Nvml, gpus: list[Handle]) -> dict[str, Any]:
    """The time, and for each figure a list with the value of each GPU."""
    time_s = round(time.time(), 3)
    found = [nvml.figures(gpu) for gpu in gpus]
    return {"time_s": time_s, **{name: [figures[name] for figures in found] for name in FIGURES}}


def _write(output: Any, line: dict[str, Any]) -> None:
    output.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
END_OF_FTGEN_FILE
    cat >"$1"/runtime/node/smi.py <<'END_OF_FTGEN_FILE' || return
"""Ask nvidia-smi for the state of this node's GPUs.

In: the names of fields. Out: a dictionary of texts for each GPU. A field that a driver does not know is left out, and a
value that it does not have, such as [N/A], is None.

Environment: CUDA_VISIBLE_DEVICES, the GPUs that this process may use.
"""

import os
import re
import subprocess
from collections.abc import Sequence

Gpu = dict[str, str | None]
LONGEST_S = 20
IDENTITY = ("index", "uuid", "name", "driver_version", "vbios_version")
AT_REST = ("memory.total", "memory.used", "ecc.mode.current", "ecc.errors.uncorrected.volatile.total")
REMAPPED = ("remapped_rows.pending", "remapped_rows.failure")
AT_WORK = (
    "clocks.sm",
    "clocks.max.sm",
    "clocks_event_reasons.active",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
    "pcie.link.width.current",
    "pcie.link.width.max",
)
FORMER_NAMES = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}  # before driver 535
UNKNOWN_FIELD = re.compile(r'Field "([^"]+)" is not a valid field')
LINK = re.compile(r"^\s*Link (\d+): (?:<inactive>|([\d.]+) GB/s)", re.MULTILINE)


class SmiError(Exception):
    """Why nvidia-smi says nothing."""


def query(fields: Sequence[str]) -> list[Gpu]:
    """The fields of each GPU that this process may use, in the order of their numbers. SmiError."""
    asked = list(fields)
    while asked:
        code, said = _nvidia_smi(f"--query-gpu={','.join((*IDENTITY, *asked))}", "--format=csv,noheader,nounits")
        if code == 0:
            return visible([rename(gpu) for gpu in parse(said, (*IDENTITY, *asked))])
        unknown = UNKNOWN_FIELD.search(said)
        if not unknown or unknown[1] not in asked:
            raise SmiError(_first_line(said) or f"exit code {code}")
        other = FORMER_NAMES.get(unknown[1])
        asked = [other if field == unknown[1] else field for field in asked if field != unknown[1] or other]  # type: ignore[misc]
    return []


def remapped_rows() -> list[Gpu]:
    """Whether memory rows of each GPU wait to be replaced, or could not be. Empty before Ampere."""
    code, said = _nvidia_smi(f"--query-remapped-rows=gpu_uuid,{','.join(REMAPPED)}", "--format=csv,noheader,nounits")
    return visible(parse(said, ("uuid", *REMAPPED))) if code == 0 else []


def nvlinks() -> list[list[float | None]]:
    """The speed of each NVLink of each GPU, in GB/s and one direction; None for one that is inactive."""
    code, said = _nvidia_smi("nvlink", "--status")
    return parse_nvlinks(said) if code == 0 else []


def parse(text: str, fields: Sequence[str]) -> list[Gpu]:
    """The lines of a CSV answer."""
    rows = ([word.strip() for word in line.split(", ")] for line in text.splitlines() if line.strip())
    return [
        {field: _value(word) for field, word in zip(fields, row, strict=False)} for row in rows if len(row) >= len(fields)
    ]


def parse_nvlinks(text: str) -> list[list[float | None]]:
    """`nvidia-smi nvlink --status`: a head for each GPU, then a line for each link."""
    parts = re.split(r"^GPU \d+: .*$", text, flags=re.MULTILINE)[1:]
    return [[float(speed) if speed else None for _, speed in LINK.findall(part)] for part in parts]


def rename(gpu: Gpu) -> Gpu:
    """Fields by their present names."""
    present = {former: name for name, former in FORMER_NAMES.items()}
    return {present.get(field, field): value for field, value in gpu.items()}


def visible(gpus: list[Gpu]) -> list[Gpu]:
    """The GPUs in CUDA_VISIBLE_DEVICES, by number or UUID. All of them if it is not set, or counts in another way."""
    words = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    chosen = [gpu for gpu in gpus if _is_named(gpu, words)]
    return chosen if words and len(chosen) == len(words) else gpus


def _is_named(gpu: Gpu, words: list[str]) -> bool:
    uuid = gpu.get("uuid") or "-"
    return gpu.get("index") in words or any(word.startswith("GPU-") and uuid.startswith(word) for word in words)


def _value(word: str) -> str | None:
    return None if word in {"", "N/A", "[N/A]", "[Not Supported]", "[Insufficient Permissions]"} else word


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _nvidia_smi(*words: str) -> tuple[int, str]:
    try:
        done = subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=LONGEST_S, check=False)
    except FileNotFoundError:
        raise SmiError("nvidia-smi is not installed here") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SmiError(f"nvidia-smi does not answer: {error}") from None
    return done.returncode, done.stdout + done.stderr
END_OF_FTGEN_FILE
    cat >"$1"/runtime/node/telemetry.py <<'END_OF_FTGEN_FILE' || return
"""Record power, clocks and temperature of the GPUs while a training runs, and when its steps end.

In: a plan. Out: `telemetry.<node>.jsonl` beside the log, which a process of its own writes (`sampler.py`).

The first rank of a node starts the sampler and tells it the end of each step through a pipe that never blocks. Whatever
becomes of the sampler, the training goes on. The sampler ends when the pipe ends, and that ends with this process.

Environment: LOCAL_RANK, RANK, FTGEN_RUN_DIR.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from runtime.job import signals
from runtime.job.places import run_directory
from runtime.job.progress import say
from runtime.node.check import name
from runtime.node.sampler import NO_NVML

Plan = dict[str, Any]


class Sampler:
    """The process, as far as the training needs it."""

    def __init__(self, process: "subprocess.Popen[bytes]", pipe: int) -> None:
        self.process, self.pipe = process, pipe
        self.began = False  # whether the beginning of the first step was told

    def tell(self, step: int, time_s: float) -> None:
        """Tell when a step ended. OSError: nobody listens, or not fast enough."""
        os.write(self.pipe, f"{step} {time_s:.3f}\n".encode())


_running: list[Sampler] = []


def begin(plan: Plan) -> None:
    """Start the sampler, on the first rank of a node, if the plan has GPUs and does not refuse it."""
    if not plan["telemetry"] or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    if plan["gpu"]["name"] == "cpu":
        say("no telemetry: the run has no GPU")
        return
    try:
        _running[:] = [_start(run_directory() / f"telemetry.{name()}.jsonl", plan["gpus_per_node"])]
    except OSError as error:
        _warn(f"its sampler cannot be started: {error.strerror}")


def is_on() -> bool:
    """Whether this process has a sampler."""
    return bool(_running)


def before_step(step: int) -> None:
    """Tell the sampler when the first step of this process begins: at the end of the one before it."""
    if _running and not _running[0].began:
        _running[0].began = True
        after_step(step - 1)


def after_step(step: int, time_s: float | None = None) -> None:
    """Tell the sampler that a step, counted from 0, has ended: now, or at this time in seconds since 1970."""
    if not _running:
        return
    try:
        _running[0].tell(step, time.time() if time_s is None else time_s)
    except OSError:
        _tell_why(_running.pop())


def _start(file: Path, gpus: int) -> Sampler:
    here = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    file.parent.mkdir(parents=True, exist_ok=True)
    theirs, ours = os.pipe()
    os.set_blocking(ours, False)
    try:
        with signals.blocked():
            process = subprocess.Popen(
                # without site: it needs no package, and in some environments that takes seconds
                [sys.executable, "-S", "-m", "runtime.node.sampler", str(file), name(), str(gpus), str(os.getpid())],
                stdin=theirs,
                env=os.environ | {"PYTHONPATH": path},
            )
    finally:
        os.close(theirs)
    return Sampler(process, ours)


def _tell_why(sampler: Sampler) -> None:
    """Why the sampler does not listen. Without NVML, it has said so itself."""
    os.close(sampler.pipe)
    code = sampler.process.poll()
    if code is None:
        _warn("its sampler does not keep up with the steps, and was told to end")
    elif code != NO_NVML:
        _warn(f"its sampler ended: {os.strerror(code) if code > 0 else f'signal {-code}'}")


def _warn(why: str) -> None:
    say(f"warning: no telemetry of node {name()} from here on: {why}", any_rank=True)
END_OF_FTGEN_FILE
    cat >"$1"/runtime/show_data.py <<'END_OF_FTGEN_FILE' || return
"""Show the training data of a plan: its counts, and one example as the model sees it, with the trained text marked.

In: a plan. Out: text on stdout, exit code 0. Needs no GPU. JobError: faulty data, or no tokenizer.

The data is prepared as for a training, so a training that starts later finds it ready.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from runtime import engines
from runtime.data import packing, prepare, report, store
from runtime.data.split import SPLITS, is_recipes
from runtime.data.tokenizer import Tokenizer
from runtime.hub import find
from runtime.hub.fetch import fetch
from runtime.job.names import ENGINES
from runtime.weights import checkpoint, hub, random_llama

Plan = dict[str, Any]
BEGIN, END = "{+", "+}"  # around trained text, as `git diff --word-diff` marks what was added
GREEN, PLAIN = "\x1b[1;32m", "\x1b[0m"
# transformers imports torch if it can, which takes seconds, and tokenizers do not need it
WITHOUT_TORCH = {"USE_TORCH": "0", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1"}
SHOWN = 4000  # characters of the example


def show(plan: Plan) -> int:
    """Prepare the data and print what it is."""
    if plan["data"]["kind"] not in prepare.READ_BY_ENGINES:
        os.environ |= WITHOUT_TORCH
    with tempfile.TemporaryDirectory() as scratch:
        folder = tokenizer(plan, Path(scratch))
        own = packing if plan["engine"] == "nemo" else engines.module(plan, "packing")
        tokens = prepare.tokenize(plan, folder, own)
        counted = report.read(tokens)
        print("\n".join([*_source(plan, counted), "", *_table(counted), "", *_steps(plan, counted)]))
        print(f"\nThe first example of the training, as the model sees it. The loss counts the text in {BEGIN}...{END}:\n")
        print(
            example(Tokenizer(folder, plan["data"]["chat_template"]), store.Examples(tokens, "training"), colour=_colour())
        )
    return 0


def tokenizer(plan: Plan, scratch: Path) -> Path:
    """The folder of the model's tokenizer: of the converted checkpoint, or else of its source. Writes only to `scratch`."""
    if checkpoint.converted(plan):
        return checkpoint.tokenizer(plan)
    source, model = plan["checkpoint"]["source"], plan["model"]
    if source == "directory":
        return checkpoint.user_directory(plan)
    if source == "random":
        random_llama.write_tokenizer(model["vocab_size"], model["max_position_embeddings"], scratch)
        return scratch
    return find.find(hub.repository(plan)) or fetch(hub.tokenizer(plan), plan["name"], into_home=True)


def example(reader: Tokenizer, examples: store.Examples, *, colour: bool) -> str:
    """The text of the first example, with marks around its trained text. At most `SHOWN` characters."""
    ids, trained, _ = examples[0]
    text = ""
    for is_trained, group in groupby(zip(trained.tolist(), ids.tolist(), strict=True), key=lambda pair: pair[0]):
        part = _printable(reader.text([number for _, number in group]))
        marked = f"{BEGIN}{part}{END}"
        text += (f"{GREEN}{marked}{PLAIN}" if colour else marked) if is_trained else part
        if len(text) > SHOWN:
            return f"{text[:SHOWN]}{PLAIN if colour else ''} ..."
    return text


def _source(plan: Plan, counted: report.Report) -> Iterator[str]:
    data = plan["data"]
    where = data["path"] or data["dataset"] or ""
    yield f"{plan['experiment']}: {data['kind']} data {where}".rstrip()
    yield f"sha256 {counted['sha256']}"
    for warning in report.warnings(plan, counted):
        yield f"warning: {warning}"


def _table(counted: report.Report) -> Iterator[str]:
    """A row for each count, a column for each split."""
    yield f"{'':18}" + "".join(f"{split:>14}" for split in SPLITS)
    counts = [counted[split] for split in SPLITS]
    rows = {
        "examples": [f"{each['examples']:,}" for each in counts],
        "tokens": [f"{each['tokens']:,}" for each in counts],
        "trained tokens": [f"{each['trained_tokens']:,}" for each in counts],
        "longest example": [f"{each['longest']['tokens']:,}" for each in counts],
        "too long": [f"{each['too_long']:,}" for each in counts],
        "truncated": [f"{each['truncated']:,}" for each in counts],
        "dropped": [f"{each['dropped']:,}" for each in counts],
    }
    if any("packs" in each for each in counts):
        rows["packs"] = [f"{each.get('packs', 0):,}" for each in counts]
        rows["fill of a pack"] = [f"{each.get('fill', 0):.1%}" for each in counts]
    for name, values in rows.items():
        yield f"{name:18}" + "".join(f"{value:>14}" for value in values)


def _steps(plan: Plan, counted: report.Report) -> Iterator[str]:
    if plan["data"]["packed"] and is_recipes(plan):
        engine, length = ENGINES[plan["engine"]], plan["seq_length"]
        yield f"{engine} packs these examples into sequences of {length} tokens when the job runs."
        return
    samples, what = report.samples_of(counted["training"])
    batch = plan["global_batch_size"]
    if plan["epochs"]:
        yield report.epochs_text(plan, counted)
    else:
        yield f"{plan['max_steps']} steps of {batch} {what} are {plan['max_steps'] * batch / samples:.1f} epochs."


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() or character in "\n\t" else "\ufffd" for character in text)


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/__init__.py <<'END_OF_FTGEN_FILE' || return
"""Weights in Hugging Face format: which repository has them, or random ones; and read a checkpoint ahead.

In: a plan. Out: a repository, or a folder with safetensors. Start with `hub.py`.
"""
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/adapter.py <<'END_OF_FTGEN_FILE' || return
"""Write LoRA adapters in the format of PEFT.

In: A and B of each adapted weight. Out: adapter_config.json and adapter_model.safetensors.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.weights import shards
from runtime.weights.shards import Entry

if TYPE_CHECKING:
    import torch

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # PEFT's wrapper of the model
Pair = tuple["torch.Tensor", "torch.Tensor"]


def write(
    folder: Path, modules: list[str], pair_of: Callable[[str], Pair], lora: dict[str, Any], base: str, revision: str | None
) -> None:
    """Write both files.

    `modules` are names of linear layers such as model.layers.0.self_attn.q_proj; `pair_of` gives A [rank, in] and
    B [out, rank] of each. `lora` is the plan's; `base` and `revision` say where the base model is.
    """
    entries = {}
    for module in modules:
        for matrix, tensor in zip("AB", pair_of(module), strict=True):
            entries[tensor_name(module, matrix)] = Entry(shards.header_name(tensor.dtype), tuple(tensor.shape), FILE)
    shards.write(folder, entries, lambda name: pair_of(module_of(name))[".lora_B." in name], index=False)
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": lora["alpha"],
        "lora_dropout": lora["dropout"],
        "peft_type": "LORA",
        "r": lora["rank"],
        "revision": revision,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "task_type": "CAUSAL_LM",
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def tensor_name(module: str, matrix: str) -> str:
    """PEFT's name of matrix "A" or "B" of a linear layer."""
    return f"{PREFIX}{module}.lora_{matrix}.weight"


def module_of(name: str) -> str:
    """The linear layer of a name of PEFT."""
    return name.removeprefix(PREFIX).partition(".lora_")[0]
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/base.py <<'END_OF_FTGEN_FILE' || return
"""Keep what a base model has beside its weights: config, tokenizer, chat template, license, and the list of its tensors.

In: a directory in Hugging Face format. Out: a folder with these small files and tensors.json.

A conversion keeps them beside the converted checkpoint, because the engines' own formats lose them. An export puts them
beside the exported weights, and compares the exported tensors with tensors.json.
"""

import json
import shutil
from collections.abc import Container
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from runtime.job.errors import JobError
from runtime.weights import shards
from runtime.weights.shards import Entry

FOLDER = "hugging_face"  # in a converted checkpoint
TENSORS = "tensors.json"
# Small files of a model, in the top folder of its repository. Licenses such as Llama's must go with every copy.
SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def keep(model: Path, folder: Path) -> None:
    """Copy the small files of `model` into the new `folder`, and list its tensors. JobError: a file is damaged."""
    try:
        tensors = shards.entries(model, shards.files_of(model))
    except (OSError, ValueError) as error:
        raise JobError(f"the weights in {model} are damaged: {error}", "download or copy them again") from error
    folder.mkdir()
    copy(model, folder)
    listed = {name: {"dtype": it.dtype, "shape": it.shape, "file": it.file} for name, it in tensors.items()}
    (folder / TENSORS).write_text(json.dumps(listed, indent=1) + "\n")


def copy(model: Path, folder: Path, without: Container[str] = ()) -> None:
    """Copy the small files of `model` into `folder`. A file of the hub's cache is a link; the copy is a file."""
    for path in sorted(model.iterdir()):
        if path.is_file() and path.name not in without and any(fnmatch(path.name, pattern) for pattern in SMALL):
            shutil.copyfile(path, folder / path.name)


def set_chat_template(folder: Path, text: str) -> None:
    """Give the tokenizer in `folder` the chat template that the training used. Older versions of transformers read it from
    tokenizer_config.json, newer ones from the file.
    """
    (folder / "chat_template.jinja").write_text(text)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": text}, indent=2) + "\n")


def tensors(folder: Path) -> dict[str, Entry]:
    """The tensors of the base, by name, in the order of its files."""
    document: dict[str, Any] = json.loads((folder / TENSORS).read_text())
    return {name: Entry(it["dtype"], tuple(it["shape"]), it["file"]) for name, it in document.items()}


def config(folder: Path) -> dict[str, Any]:
    """config.json."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/card.py <<'END_OF_FTGEN_FILE' || return
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
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/distributed.py <<'END_OF_FTGEN_FILE' || return
"""Read tensors of a distributed checkpoint (torch.distributed.checkpoint) in one process, one tensor or layer at a time.

In: the folder with `.metadata` and `*.distcp`, as Megatron's format "torch_dist" has them, or the folder around it, which
Megatron-Bridge makes. Out: `torch.Tensor`s.

However many processes wrote the checkpoint, and however they split its tensors, each tensor here is whole. Neither a
model nor a process group is needed. `.metadata` is a pickle that names classes of the framework that wrote it. This
module never imports them: only torch's own classes are real, and a stand-in takes the place of every other class.
"""

import pickle
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.job.errors import JobError

if TYPE_CHECKING:
    import torch

METADATA = ".metadata"
PREFIX = "module."  # Megatron's wrapper of the model
NOT_WEIGHTS = ("optimizer", "rng_state", "rerun_state")  # the first word of other tensors
REAL = ("torch.distributed.checkpoint", "torch.serialization", "collections", "pathlib")  # whose classes are unpickled


class Checkpoint:
    """The weights of a distributed checkpoint, by their names without Megatron's prefix."""

    def __init__(self, folder: Path) -> None:
        """JobError: there is no such checkpoint in the folder."""
        self.folder = inner(folder)
        self._reader = _reader(self.folder)
        self._saved = {
            name.removeprefix(PREFIX): (name, saved)
            for name, saved in self._reader.read_metadata().state_dict_metadata.items()
            if hasattr(saved, "chunks") and not name.startswith(NOT_WEIGHTS)
        }

    @property
    def names(self) -> set[str]:
        """Names of all weights, without optimizer states."""
        return set(self._saved)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor; the first dimension of a layer's weight is the layer."""
        return tuple(self._tensor(name).size)

    def read(self, name: str, layer: int | None = None) -> "torch.Tensor":
        """The whole tensor, or its row `layer`, which alone is then read. JobError: it is not there, or not complete."""
        import torch
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
        from torch.distributed.checkpoint.planner import LoadPlan
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        saved = self._tensor(name)
        begin, shape = [0] * len(saved.size), list(saved.size)
        if layer is not None:
            begin[0], shape[0] = layer, 1
        found = torch.empty(shape, dtype=saved.properties.dtype)
        wanted = ChunkStorageMetadata(offsets=torch.Size(begin), sizes=torch.Size(shape))
        items = create_read_items_for_chunk_list(self._saved[name][0], saved, [wanted])
        if sum(prod(item.lengths) for item in items) != found.numel():
            raise JobError(f"{self.folder}: {name} is not complete", "use another checkpoint of the run")
        self._reader.read_data(LoadPlan(items), _planner(found)).wait()
        return found if layer is None else found[0]

    def _tensor(self, name: str) -> Any:
        if name not in self._saved:
            raise JobError(f"{self.folder} has no tensor {name}", "use the script that trained this checkpoint")
        return self._saved[name][1]


def inner(folder: Path) -> Path:
    """The folder with `.metadata`: this one, or with Megatron-Bridge its only iter_<N>."""
    return next((path.parent for path in folder.glob(f"iter_*/{METADATA}")), folder)


def _reader(folder: Path) -> Any:
    """torch's reader, with our way to read the metadata."""
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):  # type: ignore[misc]
        def read_metadata(self, *_args: Any, **_kwargs: Any) -> Any:
            with (folder / METADATA).open("rb") as file:
                return _Unpickler(file).load()

    reader = Reader(folder)
    try:
        reader.set_up_storage_reader(reader.read_metadata(), is_coordinator=True)
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise JobError(
            f"{folder} has no distributed checkpoint: {error}", "give a folder whose weights/ has .metadata and *.distcp"
        ) from error
    return reader


def _planner(target: "torch.Tensor") -> Any:
    """A planner that copies what is read to its place in `target`."""
    from torch.distributed.checkpoint import DefaultLoadPlanner

    class IntoTarget(DefaultLoadPlanner):  # type: ignore[misc]
        def resolve_tensor(self, read_item: Any) -> "torch.Tensor":
            place = target
            for dimension, (begin, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
                place = place.narrow(dimension, begin, length)
            return place

        def commit_tensor(self, read_item: Any, tensor: "torch.Tensor") -> None:
            """Do nothing: the tensor is already in its place."""

    return IntoTarget()


class _StandIn:
    """Stands in for a class of the framework that wrote the checkpoint."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Imports nothing but torch and the standard library, so that neither Megatron nor Transformer Engine is needed."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" or module.startswith(REAL):
            return super().find_class(module, name)
        return type(name, (_StandIn,), {"__module__": module})
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/hub.py <<'END_OF_FTGEN_FILE' || return
"""Name the repository of a model's weights, and the files of it that the importer reads.

In: a plan with checkpoint.source = "hub". Out: a `Repository`.
"""

from typing import Any

from runtime.hub.repository import Repository
from runtime.weights import base

TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template*")
# What the importer reads, or an export needs. Many repositories also have the weights in other formats: "original/" and
# *.pth of Meta, consolidated.* of Mistral.
WANTED = (*base.SMALL, "model*.safetensors*")
NEEDED = ("config.json", "tokenizer.*", "model*.safetensors")


def repository(plan: dict[str, Any]) -> Repository:
    """The repository of the plan's model."""
    return Repository(plan["model"]["hf_id"], "model", plan["checkpoint"]["revision"] or "main", WANTED, NEEDED)


def tokenizer(plan: dict[str, Any]) -> Repository:
    """The same repository, without the weights."""
    return repository(plan)._replace(wanted=TOKENIZER, needed=("tokenizer.*",))
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
    write_tokenizer(model["vocab_size"], model["max_position_embeddings"], directory)
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


def write_tokenizer(vocab_size: int, max_length: int, directory: Path) -> None:
    """Write a byte-level BPE with exactly `vocab_size` entries."""
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
"""Read the checkpoint into the page cache while the engine is imported, so that loading it is faster.

In: a folder. Out: a thread that reads the folder's files.

The training does not depend on it: the thread stops at the first error, and does not start if the files need more
than half of the available memory.
"""

import contextlib
import os
import threading
from pathlib import Path

from runtime.job import memory, signals

PIECE = 16 << 20  # bytes


def begin(folder: Path) -> threading.Thread | None:
    """Start the thread. None on ranks other than the first of a node, and if the files are too large."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return None
    try:
        files = sorted(path for path in folder.glob("*") if path.is_file())
        if sum(path.stat().st_size for path in files) > memory.available() // 2:
            return None
    except OSError:
        return None
    return signals.start_thread(_read, files)


def _read(files: list[Path]) -> None:
    """Read the files. Plain reads release the GIL; a shared file system may ignore posix_fadvise."""
    buffer = bytearray(PIECE)
    with contextlib.suppress(OSError):
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/reload.py <<'END_OF_FTGEN_FILE' || return
"""Load an exported model with transformers, on the CPU and in float32, and use it as its users do.

In: a folder in Hugging Face format, or a base and the folder of an adapter. Out: logits, and a greedy completion.

transformers builds the model from the exported config.json and fills it from the exported files. A weight that is
missing, left over or of another shape is an error here; transformers only warns, and leaves random weights.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.job import memory
from runtime.job.errors import JobError

if TYPE_CHECKING:
    import torch

BYTES = 4  # of a weight in float32
ROOM = 1.25  # times the weights: one file of weights, activations
NEW_TOKENS = 12


class Reloaded:
    """A model that transformers has loaded."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        """JobError: transformers misses a weight, or finds one too many."""
        import torch
        from transformers import AutoModelForCausalLM, logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._folder = folder
        self._model, found = AutoModelForCausalLM.from_pretrained(
            str(folder), torch_dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        if wrong := {key: sorted(map(str, names))[:5] for key, names in found.items() if names}:
            raise JobError(f"transformers does not load {folder} as it is: {wrong}", "please report this export")
        if adapter:
            from peft import PeftModel

            self._model = PeftModel.from_pretrained(self._model, str(adapter))
        self._model.eval()

    def logits(self, tokens: list[int]) -> "torch.Tensor":
        """Logits [tokens, vocabulary] of one sequence."""
        import torch

        with torch.no_grad():
            found: torch.Tensor = self._model(input_ids=torch.tensor([tokens])).logits[0]
        return found

    def complete(self, prompt: str) -> tuple[str, bool]:
        """The most probable continuation, and whether it is one token repeated to the end."""
        import torch
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(self._folder), local_files_only=True)
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            made = self._model.generate(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], do_sample=False,
                temperature=None, top_p=None, top_k=None, max_new_tokens=NEW_TOKENS, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        new = made[0, inputs["input_ids"].shape[1] :].tolist()
        return str(tokenizer.decode(new)), len(new) == NEW_TOKENS and len(set(new)) == 1


def missing(parameters: int, *packages: str) -> str:
    """Why a model of this size cannot be loaded here; "" if it can."""
    need, free = int(parameters * BYTES * ROOM), memory.available()
    if need > free:
        return f"loading it needs {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
    return next((f"{name} is not installed" for name in ("transformers", *packages) if not find_spec(name)), "")
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/runs.py <<'END_OF_FTGEN_FILE' || return
"""Find the checkpoint that is to be exported.

In: a plan, and a run directory, a checkpoint, or nothing. Out: a `Run`: the checkpoint, and the plan that trained it.

Environment: FTGEN_RUN_DIR, the directory of this job: <runs>/<experiment>_<id>/<experiment>.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from runtime.guard import checkpoints
from runtime.job.errors import JobError
from runtime.weights import distributed

Plan = dict[str, Any]
# Step lines of the engines: the number of the step, and the loss. NeMo counts from 0, Megatron-Bridge from 1.
NEMO_LINE = re.compile(r"^Training epoch \d+, iteration (\d+)/.* reduced_train_loss: (\S+)", re.MULTILINE)
BRIDGE_LINE = re.compile(r"^ \[.*\] iteration +(\d+)/.*\| lm loss: (\S+) \|", re.MULTILINE)
DATA = re.compile(r"^ftgen data: (\{.*\})$", re.MULTILINE)
VALIDATION = re.compile(r"^ftgen: validation after step (\d+): loss (\S+)", re.MULTILINE)


class Run(NamedTuple):
    """A checkpoint, and the plan that trained it."""

    checkpoint: Path  # .../step_<N>
    plan: Plan
    manifest: dict[str, Any]  # of the checkpoint; empty if the engine saved it without ftgen

    @property
    def weights(self) -> Path:
        """The folder of the distributed checkpoint."""
        return self.checkpoint / "weights"

    @property
    def directory(self) -> Path:
        """The run directory."""
        above = self.checkpoint.parent
        return above.parent if above.name == "checkpoints" else above

    def export(self, what: str) -> Path:
        """The folder of an export."""
        return self.directory / "exports" / self.checkpoint.name / what

    def data(self) -> dict[str, Any]:
        """What the newest log of the run says of its data: hash and counts; empty if no log is here."""
        lines = [line for log in self._logs() for line in DATA.findall(log)]
        return _document(lines[-1]) if lines else {}

    def losses(self) -> dict[str, str]:
        """First and last loss up to this checkpoint, and the last validation loss, as the logs of the run have them."""
        end = self.manifest.get("step", 0)
        logs = self._logs()
        made = {int(step) + 1: loss for log in logs for step, loss in NEMO_LINE.findall(log)}
        made |= {int(step): loss for log in logs for step, loss in BRIDGE_LINE.findall(log)}
        steps = {step: loss for step, loss in made.items() if step <= end}
        validations = {int(step): loss for log in logs for step, loss in VALIDATION.findall(log) if int(step) <= end}
        found = {f"loss of step {step}": steps[step] for step in sorted({min(steps), max(steps)})} if steps else {}
        return found | {f"validation loss after step {step}": validations[step] for step in sorted(validations)[-1:]}

    def _logs(self) -> list[str]:
        return [path.read_text(errors="replace") for path in sorted(self.directory.glob("log-*.out"), key=_age)]


def _document(text: str) -> dict[str, Any]:
    """A JSON object of the log; empty if the line was cut."""
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}


def find(plan: Plan, given: str) -> Run:
    """The checkpoint to export. `given`: a run directory or a checkpoint; "": this run, or the newest run of the experiment.

    JobError: there is no checkpoint, or it is damaged.
    """
    folder = Path(given or os.environ["FTGEN_RUN_DIR"]).resolve()
    if (distributed.inner(folder / "weights") / distributed.METADATA).is_file():
        return _run(folder, plan)
    here = [folder, *(path.parent for path in folder.glob("*/checkpoints"))]
    others = [] if given else sorted(folder.parent.parent.glob(f"*/{folder.name}"), key=_age, reverse=True)
    for directory in [*here, *others]:
        if found := checkpoints.newest(directory / "checkpoints"):
            return _run(found.path, plan)
    raise JobError(
        f"there is no checkpoint in {given or folder.parent.parent}: neither weights/ nor checkpoints/step_<N>/weights/",
        "give the directory of a run that saved, or one of its checkpoints; [save] in the spec makes runs save",
    )


def _run(checkpoint: Path, plan: Plan) -> Run:
    file = checkpoint / checkpoints.NAME
    if not file.is_file():
        return Run(checkpoint, plan, {})
    if flaw := checkpoints.flaw(checkpoint):
        raise JobError(f"the checkpoint {checkpoint} is damaged: {flaw}", "give another checkpoint of the run")
    manifest = json.loads(file.read_text())
    return Run(checkpoint, manifest["plan"], manifest)


def _age(path: Path) -> float:
    return path.stat().st_mtime
END_OF_FTGEN_FILE
    cat >"$1"/runtime/weights/shards.py <<'END_OF_FTGEN_FILE' || return
"""Write and read safetensors files one tensor at a time, so that memory holds one tensor and not one file.

In: what each file contains, and a function that gives each tensor. Out: the files, and their index.

A safetensors file is the length of its header (8 bytes, little-endian), the header as JSON, and the bytes of the
tensors one after the other (https://github.com/huggingface/safetensors, "Format").
"""

import json
import struct
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from runtime.job.errors import JobError

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The types that models have, by their names in a header.
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ALIGNMENT = 8  # bytes; the header is padded with spaces


class Entry(NamedTuple):
    """What a header says of a tensor."""

    dtype: str  # BF16, F32
    shape: tuple[int, ...]
    file: str

    @property
    def size(self) -> int:
        """Bytes."""
        import torch

        return prod(self.shape) * int(torch.finfo(torch_dtype(self.dtype)).bits) // 8


def torch_dtype(name: str) -> "torch.dtype":
    """The type of a header as torch's. JobError: weights of another type, such as quantized ones."""
    import torch

    if name not in DTYPES:
        raise JobError(f"weights of type {name} cannot be exported", f"use a base with {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[name])


def header_name(dtype: "torch.dtype") -> str:
    """The name of torch's type in a header."""
    return next(name for name, known in DTYPES.items() if f"torch.{known}" == str(dtype))


def files_of(folder: Path) -> list[str]:
    """Names of the weight files of a folder in Hugging Face format. OSError, ValueError: it is none."""
    if (folder / INDEX).exists():
        return sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    return [SINGLE]


def entries(folder: Path, files: Iterable[str]) -> dict[str, Entry]:
    """What the headers of the files say, by tensor, in the order of the bytes. OSError, ValueError: a file is damaged."""
    return {
        name: Entry(said["dtype"], tuple(said["shape"]), file)
        for file in files
        for name, said in sorted(_header(folder / file).items(), key=lambda item: item[1]["data_offsets"])
    }


def read(folder: Path, name: str, entry: Entry) -> "torch.Tensor":
    """One tensor of a file."""
    from safetensors import safe_open

    with safe_open(folder / entry.file, framework="pt") as file:
        return file.get_tensor(name)


def write(
    folder: Path, tensors: dict[str, Entry], tensor_of: Callable[[str], "torch.Tensor"], *, index: bool = True
) -> None:
    """Write each tensor into its file, in the order of `tensors`; and the index of a model that has several files.

    JobError: `tensor_of` gives another shape or type than the entry has, or a value that is no number.
    """
    files = list(dict.fromkeys(entry.file for entry in tensors.values()))
    for file in files:
        _write_file(folder / file, {name: entry for name, entry in tensors.items() if entry.file == file}, tensor_of)
    if index and files != [SINGLE]:
        total = sum(entry.size for entry in tensors.values())
        weight_map = {name: entry.file for name, entry in sorted(tensors.items())}
        document = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n")


def _write_file(path: Path, tensors: dict[str, Entry], tensor_of: Callable[[str], "torch.Tensor"]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in tensors.items():
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [end, end + entry.size]}
        end += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, entry in tensors.items():
            file.write(_bytes(name, entry, tensor_of(name)))


def _bytes(name: str, entry: Entry, tensor: "torch.Tensor") -> memoryview:
    import torch

    if tuple(tensor.shape) != entry.shape or tensor.dtype != torch_dtype(entry.dtype):
        raise JobError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, but the base has {entry.dtype} {list(entry.shape)}",
            "use the script and the base that this checkpoint was trained with",
        )
    # NaN and infinity are in the smallest or the largest value; isfinite of all values needs memory for three more tensors
    if not torch.isfinite(torch.stack(tensor.aminmax())).all():
        raise JobError(f"{name} has values that are no numbers: the training diverged", "export an earlier checkpoint")
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")


def _header(path: Path) -> dict[str, Any]:
    """The header of a complete file, without its metadata."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
        if length > path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file")
        document: dict[str, Any] = json.loads(file.read(length))
    document.pop("__metadata__", None)
    end = 8 + length + max((said["data_offsets"][1] for said in document.values()), default=0)
    if end != path.stat().st_size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, but its header says {end}")
    return document
END_OF_FTGEN_FILE
    cat >"$1"/sft_bf16_16.py <<'END_OF_FTGEN_FILE' || return
#!/usr/bin/env python3
"""sft_nemo_llama3_8b_bf16_16: the program that each task of the job runs.

In: the plan below and one command. Out: an exit code.

Written by ftgen 0.1.0 from sft_bf16_16.toml. The job's script runs it. To run it by hand:

    STAGE_PATH=/shared/folder python3 sft_bf16_16.py COMMAND

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
  "name": "sft_bf16_16",
  "experiment": "sft_nemo_llama3_8b_bf16_16",
  "spec_file": "sft_bf16_16.toml",
  "spec_sha256": "1f47c190f46d23839e3481051aab389c0307d7c3f9d6aa2ea7bb35519d6754fb",
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
  "gpus": 16,
  "nodes": 2,
  "gpus_per_node": 8,
  "max_steps": 100,
  "epochs": null,
  "global_batch_size": 64,
  "micro_batch_size": 1,
  "seq_length": 4096,
  "seed": 1234,
  "parallelism": {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": null,
    "sequence_parallel": false,
    "data_parallel_size": 16
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
END_OF_FTGEN_FILE
}

main "$@"
