#!/usr/bin/env bash
# lora_nemo_llama3_8b_bf16_4: LoRA BF16 fine-tuning of llama3_8b on 1 node of 4 h100
# Written by ftgen 0.1.0 from spec.toml (sha256 6c1a05396657fe04ddc7c83bc6d7d31b8925e344f522eb4613ee982bc6063bac).
# Overrides: --set window.last_steps=10.
# Do not change this file: change the spec and compile it again.
#
#   sbatch spec.sh           on a Slurm cluster; if you name several scripts, they run one after the other
#   bash spec.sh             on this machine
#   bash spec.sh --download  only download weights and data, where there is a network: needs Python 3.10 and huggingface_hub
#   bash spec.sh --data      only prepare the training data, and show its counts and an example; needs no GPU
#   bash spec.sh --unpack F  only write the entrypoint and the runtime files into folder F
#   bash spec.sh --export D  export a checkpoint to Hugging Face format; D: a run directory or a checkpoint, or nothing
#
# Reads: STAGE_PATH (folder of checkpoint, data and logs; default: /scratch/my project),
# HF_TOKEN (or the token file of huggingface_hub) if the model is gated, FTGEN_PYTHON (replaces the plan's interpreter),
# FTGEN_QUIET_S (seconds without output after which the log says where the job waits; default: 600).
#
#SBATCH --job-name=ftgen_llama3_8b
#SBATCH --dependency=singleton
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gres=gpu:h100:4
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR1@120
#SBATCH --output=sbatch_lora_nemo_llama3_8b_bf16_4_%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --comment=ftgen

# shellcheck disable=SC2016 # values from the spec are literal: bash expands nothing in them
set -euo pipefail

readonly name=spec
readonly experiment=lora_nemo_llama3_8b_bf16_4
readonly nodes=1 tasks_per_node=4 tasks=4
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
SBATCH_GPUS 
SBATCH_GPUS_PER_NODE 
SBATCH_GPUS_PER_TASK 
SBATCH_GRES gpu:h100:4
SBATCH_JOB_NAME ftgen_llama3_8b
SBATCH_MEM_PER_CPU 
SBATCH_MEM_PER_GPU 
SBATCH_MEM_PER_NODE 
SBATCH_NO_REQUEUE 
SBATCH_OPEN_MODE append
SBATCH_OUTPUT sbatch_lora_nemo_llama3_8b_bf16_4_%j.out
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
    local job copy script=$code/convert.sh defaults=("--job-name=${SLURM_JOB_NAME}_convert" --dependency=singleton --nodes=1 --ntasks=1 --gres=gpu:h100:1 --time=02:00:00)
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
    export STAGE_PATH=${STAGE_PATH:-'/scratch/my project'}
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
    python=("${STAGE_PATH}/venv/bin/python")
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
    python=("${STAGE_PATH}/venv/bin/python")
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

