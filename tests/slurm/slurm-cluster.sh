#!/bin/bash
# slurm-cluster.sh - a REAL (small) Slurm cluster on one host, for tests.
#
#   slurm-cluster.sh install [sacct]           apt-get the Debian packages (Slurm 22.05 on Debian 12);
#                                              with "sacct" also slurmdbd and mariadb-server
#   slurm-cluster.sh up   DIR [NODES] [GPUS]   start a cluster in DIR (default 2 nodes, 8 fake GPUs each) and
#                                              print  export SLURM_CONF=DIR/etc/slurm.conf
#                                              (only print, if that cluster is already up)
#   slurm-cluster.sh status DIR                rc 0 if the controller and every node answer, else 1
#   slurm-cluster.sh down DIR                  cancel all jobs, stop the daemons; logs stay in DIR/log
#
# Environment, read by up:
#   SLURMLAB_CPUS=16  SLURMLAB_MEM=16000       CPUs and MB that each node claims (need not exist)
#   SLURMLAB_GPU_TYPE=                         e.g. h100, so that --gres=gpu:h100:8 is accepted too
#   SLURMLAB_GRES=                             another generic resource of each node and its count, e.g. nvme:2
#   SLURMLAB_PARTITIONS=main                   names, space separated; the first is the default
#   SLURMLAB_PREEMPT=                          1: a job of a later partition requeues those of earlier ones
#   SLURMLAB_SACCT=                            1: run mariadbd and slurmdbd, so that sacct works (+4 s)
#   SLURMLAB_PORT=                             first of 20 TCP ports (default: derived from DIR)
#
# Needs root.  No systemd; nothing under /etc or /run is used; daemons listen on 127.0.0.1
# (if the host's own name resolves to it, as on most machines; else on 0.0.0.0, and it says so).
#
# How it works
# * Debian builds Slurm with --enable-multiple-slurmd: one host may run many `slurmd -N nodeK`.
# * Each slurmd gets its own UTS namespace (hostname nodeK: `hostname` and %N are right in jobs) and
#   a mount namespace with nothing but a private /etc/hosts where nodeK is 127.0.0.1.
# * config_overrides makes Slurm believe the CPUs and memory we claim.
# * Fake GPUs are symlinks to /dev/null: gres/gpu wants character devices named *0..*N-1, and
#   sets CUDA_VISIBLE_DEVICES only when it has File=.
set -euo pipefail
# called with a job's environment (or a test's imitation of one): be no stray of ours, see strays()
[ -z "${SLURMD_NODENAME:-}" ] || exec env -u SLURMD_NODENAME "$0" "$@"

say() { echo "slurm-cluster: $*" >&2; }
die() { say "$*"; exit 1; }
pid_of() { cat "$DIR/run/$1.pid" 2>/dev/null || true; }

# running NAME PID: is PID a live process of that name?  (Pid files get stale, pids get reused, and
# a zombie is not alive: pid 1 of a container may be slow to reap.)
running() {
    [ -n "$2" ] && [ "$(cat "/proc/$2/comm" 2>/dev/null)" = "$1" ] &&
        ! grep -q '^State:.Z' "/proc/$2/status" 2>/dev/null
}
not() { ! "$@"; }

# wait_for SECONDS COMMAND...: poll until COMMAND succeeds.
wait_for() {
    local end=$((SECONDS + $1)); shift
    until "$@"; do [ $SECONDS -lt $end ] || return 1; sleep 0.1; done
}

# stop NAME PID: TERM, and KILL if that is not enough.
stop() {
    running "$1" "$2" || return 0
    kill "$2" 2>/dev/null || true
    wait_for 10 not running "$1" "$2" && return
    say "KILL $1 $2"; kill -KILL "$2" 2>/dev/null || true
}

# Job processes of THIS cluster that are left, also those that daemonized away, as "NAME PID" lines.
# SLURM_CONF alone is no proof (the caller's shell has it exported), hence SLURMD_NODENAME, which slurmd
# gives to every task; and never this script or what called it, whatever a test has put into its environment.
strays() {
    local env pid=$$ p ours=" "
    while ((pid > 0)); do ours+="$pid "; pid=$(awk '/^PPid:/ {print $2}' "/proc/$pid/status"); done
    for env in $(grep -lzxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2>/dev/null); do
        p=${env%/environ}
        [[ $ours != *" ${p#/proc/} "* ]] || continue
        if grep -qx slurmstepd "$p/comm" 2>/dev/null || grep -qz '^SLURMD_NODENAME=' "$env" 2>/dev/null; then
            echo "$(cat "$p/comm" 2>/dev/null) ${p#/proc/}"
        fi
    done
}

no_jobs() { [ -z "$(timeout 5 squeue -h -o %A 2>/dev/null)" ]; }

nodes_ready() {   # the controller answers, every node has registered, and its slurmd still runs
    local shape n have
    shape=$(cat "$DIR/run/shape" 2>/dev/null) || return 1
    for ((n = 1; n <= ${shape% *}; n++)); do running slurmd "$(pid_of "node$n")" || return 1; done
    have=$(timeout 5 sinfo -h -N -r -t idle,mixed,alloc,completing -o %N 2>/dev/null | sort -u | wc -l)
    [ "$have" = "${shape% *}" ]
}

do_install() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -q
    # libpmix-dev: only for the unversioned libpmix.so, which `srun --mpi=pmix` opens
    apt-get install -y -q -o DPkg::Lock::Timeout=300 --no-install-recommends munge slurmctld slurmd slurm-client libpmix-dev \
        ${1:+slurmdbd slurm-wlm-mysql-plugin mariadb-server}
}

write_config() {
    local host n i p cpus=${SLURMLAB_CPUS:-16} mem=${SLURMLAB_MEM:-16000} type=${SLURMLAB_GPU_TYPE:-} more=${SLURMLAB_GRES:-}
    local bind='CommunicationParameters=NoCtldInAddrAny,NoInAddrAny'   # listen on our own name's address
    host=$(hostname)
    if [[ $(getent ahostsv4 "$host" || true) != 127.* ]]; then
        say "$host does not resolve to 127.x: the daemons will listen on 0.0.0.0 (add it to /etc/hosts)"
        bind=
    fi
    rm -rf "${DIR:?}"/{etc,state,spool,log,run,munge,dev,db}
    mkdir -p "$DIR"/{etc,state,spool,log,run,munge,dev}
    touch "$DIR/.slurm-cluster"     # "this directory is ours": see the end of this script
    chmod 755 "$DIR"/{etc,run,dev}; chmod 700 "$DIR/munge"
    (umask 077; head -c 128 /dev/urandom >"$DIR/munge/key")
    cp /etc/hosts "$DIR/etc/hosts"
    for ((n = 1; n <= NODES; n++)); do
        mkdir -p "$DIR/spool/node$n/tmp"
        echo "127.0.0.1 node$n" >>"$DIR/etc/hosts"
    done
    for ((i = 0; i < GPUS; i++)); do ln -s /dev/null "$DIR/dev/nvidia$i"; done
    : >"$DIR/etc/gres.conf"
    ((GPUS == 0)) || echo "NodeName=node[1-$NODES] Name=gpu ${type:+Type=$type} File=$DIR/dev/nvidia[0-$((GPUS - 1))]" \
        >"$DIR/etc/gres.conf"
    [ -z "$more" ] || echo "NodeName=node[1-$NODES] Name=${more%:*} Count=${more#*:}" >>"$DIR/etc/gres.conf"
    cat >"$SLURM_CONF" <<CONF
ClusterName=lab
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
$bind
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire is also how long a requeued job waits before it starts again (default 120 s)
AuthInfo=socket=$DIR/run/munge.sock,cred_expire=5
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
# per node, because PMIx makes a directory in it that two nodes of one host must not share
TmpFS=$DIR/spool/%n/tmp
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/%n.log
SlurmdParameters=config_overrides
# no cgroups: works in containers, and leaves nothing behind in /sys/fs/cgroup
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# without it a job that does not say --mem takes all memory of its nodes
DefMemPerCPU=$((mem / cpus))
# reject what can never run (too many nodes, too long), rather than let it pend
EnforcePartLimits=ALL
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.txt
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
KillWait=5
GresTypes=gpu${more:+,${more%:*}}
Licenses=lab:9
NodeName=node[1-$NODES] Feature=lab TmpDisk=9000 NodeAddr=127.0.0.1 Port=[$((PORT + 1))-$((PORT + NODES))] CPUs=$cpus RealMemory=$mem$( ((GPUS == 0)) || echo " Gres=gpu:${type:+$type:}$GPUS${more:+,$more}")
CONF
    i=YES n=1
    for p in ${SLURMLAB_PARTITIONS:-main}; do
        echo "PartitionName=$p Nodes=ALL Default=$i DefaultTime=60 MaxTime=INFINITE State=UP PriorityTier=$n" >>"$SLURM_CONF"
        i=NO n=$((n + 1))
    done
    [ -z "${SLURMLAB_PREEMPT:-}" ] || printf 'PreemptType=preempt/partition_prio\nPreemptMode=REQUEUE\n' >>"$SLURM_CONF"
    echo "$NODES $GPUS" >"$DIR/run/shape"
}

sql() { mariadb --no-defaults --socket="$DIR/run/db.sock" -u root "$@" 2>/dev/null; }

start_accounting() {    # mariadbd + slurmdbd, for sacct
    cat >>"$SLURM_CONF" <<CONF
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 18))
AccountingStoragePass=$DIR/run/munge.sock
AccountingStorageTRES=gres/gpu
CONF
    (umask 077; cat >"$DIR/etc/slurmdbd.conf") <<CONF
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((PORT + 18))
CommunicationParameters=NoInAddrAny
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.sock
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((PORT + 19))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/run/slurmdbd.pid
CONF
    mariadb-install-db --no-defaults --user=root --datadir="$DIR/db" --skip-test-db >"$DIR/log/db.log" 2>&1
    setsid mariadbd --no-defaults --user=root --datadir="$DIR/db" --socket="$DIR/run/db.sock" \
        --pid-file="$DIR/run/mariadbd.pid" --bind-address=127.0.0.1 --port=$((PORT + 19)) \
        --innodb-lock-wait-timeout=900 >>"$DIR/log/db.log" 2>&1 </dev/null &
    wait_for 30 sql -e 'select 1' >/dev/null || die "mariadbd did not start, see $DIR/log/db.log"
    sql -e "create database slurm_acct_db; create user slurm@localhost identified by 'slurm';
            create user slurm@127.0.0.1 identified by 'slurm';
            grant all on slurm_acct_db.* to slurm@localhost; grant all on slurm_acct_db.* to slurm@127.0.0.1"
    slurmdbd
    wait_for 30 sacctmgr -n list cluster >/dev/null 2>&1 || die "slurmdbd did not start, see $DIR/log/slurmdbd.log"
}

start_slurmd() {    # NODE, in namespaces of its own if this machine lets us
    if unshare --uts --mount true 2>/dev/null; then
        unshare --uts --mount --propagation slave sh -ec '
            hostname "$1"; mount --bind "$2/etc/hosts" /etc/hosts; exec slurmd -N "$1"' sh "$1" "$DIR"
    else
        say "unshare is not permitted: on $1 \`hostname\` and %N will be $(hostname), and $1 will not resolve"
        slurmd -N "$1"
    fi
}

do_up() {
    local n
    if nodes_ready; then
        [ "$(cat "$DIR/run/shape")" = "$NODES $GPUS" ] || die "a cluster of another shape is up in $DIR: run down first"
        say "already up"
    else
        [ "$(id -u)" = 0 ] || die "needs root"
        ((NODES >= 1 && NODES <= 17)) || die "1 to 17 nodes"
        command -v munged slurmctld slurmd srun >/dev/null || die "not installed: run $0 install"
        do_down            # whatever is left of an earlier one
        write_config
        cd /
        munged --key-file="$DIR/munge/key" --seed-file="$DIR/munge/seed" --socket="$DIR/run/munge.sock" \
            --pid-file="$DIR/run/munged.pid" --log-file="$DIR/log/munged.log"
        [ -z "${SLURMLAB_SACCT:-}" ] || start_accounting
        slurmctld
        for ((n = 1; n <= NODES; n++)); do start_slurmd "node$n"; done
        wait_for 30 nodes_ready || die "the nodes did not come up, see $DIR/log"
    fi
    echo "export SLURM_CONF=$SLURM_CONF"
}

do_down() {
    local n f controller daemons=()
    controller=$(pid_of slurmctld)
    for f in "$DIR"/run/node*.pid; do [ ! -e "$f" ] || daemons+=("$(cat "$f")"); done
    if running slurmctld "$controller"; then
        # the jobs first (slurmd ends them properly), then all daemons at once
        squeue -h -o %A 2>/dev/null | sort -u | xargs -r scancel 2>/dev/null || true
        wait_for 20 no_jobs || say "some jobs would not end"
        scontrol shutdown 2>/dev/null || true
        wait_for 10 not running slurmctld "$controller" || true
        for n in ${daemons[@]+"${daemons[@]}"}; do wait_for 5 not running slurmd "$n" || true; done
    fi
    stop slurmctld "$controller"
    for n in ${daemons[@]+"${daemons[@]}"}; do stop slurmd "$n"; done
    strays | while read -r n f; do say "stray process $n $f"; stop "$n" "$f"; done
    for n in slurmdbd mariadbd munged; do stop "$n" "$(pid_of "$n")"; done   # munged last: all need it
    rm -rf "$DIR/run"
}

do_status() {
    running slurmctld "$(pid_of slurmctld)" || { say "down"; return 1; }
    timeout 5 scontrol ping || true
    timeout 5 sinfo -N -l || true
    timeout 5 squeue || true
    nodes_ready || { say "not every node is usable"; return 1; }
}

cmd=${1:-}
case $cmd in
install) do_install "${2:-}"; exit ;;
up | down | status) ;;
*) sed -n '2,/^set /{/^#/p}' "$0" >&2; exit 2 ;;
esac
[ $# -ge 2 ] || die "$cmd needs DIR"
DIR=$(realpath -m "$2"); NODES=${3:-2}; GPUS=${4:-8}
# up and down delete in DIR: never in a directory that is something else
[ ! -e "$DIR" ] || [ -e "$DIR/.slurm-cluster" ] || [ -z "$(ls -A "$DIR")" ] || die "$DIR holds other things"
PORT=${SLURMLAB_PORT:-$((20000 + $(cksum <<<"$DIR" | cut -d' ' -f1) % 500 * 20))}
export SLURM_CONF=$DIR/etc/slurm.conf
"do_$cmd"
