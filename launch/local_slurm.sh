#!/usr/bin/env bash
# A Slurm of two nodes on this one machine, to try sbatch, srun, requeue and cancel without a cluster:
#
#   eval "$(bash launch/local_slurm.sh up)"     starts it (once) and tells this shell where it is
#   bash launch/local_slurm.sh status           what runs; exit status 3 where nothing does
#   bash launch/local_slurm.sh down             cancels its jobs and stops what `up` started, and nothing else
#
# It runs as whoever starts it, with daemons, ports, keys and state of its own. Both nodes have all cores of the machine
# (so two jobs may share them) and no GPUs. As root it installs Debian's slurm-wlm and munge where they are missing.
#
#   SMOE_SLURM_DIR      the folder of its state (default: that of SLURM_CONF where `up` gave it to this shell, or else
#                       ${TMPDIR:-/tmp}/smoe-slurm-$UID)
#   SMOE_SLURM_FORCE=1  start although this machine belongs to a Slurm cluster
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# ours: prints the folder of SLURM_CONF if this script wrote that file.
ours() {
    local folder
    folder="$(dirname "${SLURM_CONF:-}")"
    grep -qsxF "StateSaveLocation=$folder/controller" "${SLURM_CONF:-}" && grep -qxF ClusterName=smoe "$SLURM_CONF" && echo "$folder"
}

PLACE="${SMOE_SLURM_DIR:-$(ours || echo "${TMPDIR:-/tmp}/smoe-slurm-$UID")}"
STATE="$(realpath -m "$PLACE")"
CORES="$(getconf _NPROCESSORS_ONLN)" # nproc obeys OMP_NUM_THREADS
CONF="$STATE/slurm.conf"
NODES=(node1 node2)
PATH="$PATH:/usr/sbin:/sbin" # where the daemons live, which is not on every user's path

note() { say "$@" >&2; }

# check_owner: daemons take keys, programs and process ids from the folder, whose default name others can guess.
check_owner() {
    local there
    for there in "$PLACE" "$STATE"; do
        [ -e "$there" ] || [ -L "$there" ] || continue
        [ "$(stat -c %u "$there")" = "$(id -u)" ] || die "$there belongs to $(stat -c %U "$there"): set SMOE_SLURM_DIR to a folder of your own"
    done
    [ ! -e "$STATE" ] || [ -z "$(find "$STATE" -maxdepth 0 -perm /022)" ] ||
        die "others may write in $STATE: set SMOE_SLURM_DIR to another folder, or take their right away (chmod go-w)"
}

# alive DAEMON: prints the process id of a daemon of ours that runs. An id may have gone to another process since.
alive() {
    local pid
    pid="$(cat "$STATE/$1.pid" 2>/dev/null)" || return 1
    [ -n "$pid" ] && tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -F -- "${1%-*}" | grep -qF -- "$STATE" || return 1
    echo "$pid"
}

all_alive() {
    local daemon
    for daemon in munged slurmctld "${NODES[@]/#/slurmd-}"; do alive "$daemon" >/dev/null || return 1; done
}

# until_true SECONDS COMMAND...: waits until the command succeeds.
until_true() {
    local end=$((SECONDS + $1))
    until "${@:2}" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || return 1
        sleep 0.2
    done
}

refuse_a_cluster() {
    local there="${SLURM_CONF:-}" file
    [ "$there" != "$CONF" ] || there=""
    for file in /etc/slurm/slurm.conf /etc/slurm-llnl/slurm.conf; do [ ! -e "$file" ] || there="$file"; done
    if [ -n "$there" ] && [ "${SMOE_SLURM_FORCE:-0}" = 0 ]; then
        die "this machine belongs to a Slurm cluster ($there): use that one, or set SMOE_SLURM_FORCE=1 to start a second"
    fi
}

check_programs() {
    local program missing=""
    for program in slurmctld slurmd sbatch srun scontrol munged; do has "$program" || missing="$missing $program"; done
    if [ -n "$missing" ]; then
        apt "Slurm" slurm-wlm munge >&2 ||
            die "there is no$missing, and only root can install it; ask for Debian's slurm-wlm and munge"
    fi
}

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# free_ports: prints the first of three ports in a row that nothing listens on.
free_ports() {
    local first
    for ((first = 17000 + RANDOM % 200 * 10; first < 19990; first += 10)); do
        if ! listens "$first" && ! listens $((first + 1)) && ! listens $((first + 2)); then
            echo "$first"
            return
        fi
    done
    die "no three ports in a row are free from 17000 to 19990"
}

write_configuration() {
    local host port memory index
    host="$(hostname -s)"
    port="$(free_ports)"
    memory=$(($(awk '/^MemTotal/ { print $2 }' /proc/meminfo) * 9 / 10 / 1024))
    cat >"$CONF" <<CONFIGURATION
ClusterName=smoe
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$STATE/munge.sock
CredType=cred/munge
StateSaveLocation=$STATE/controller
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdPidFile=$STATE/slurmd-%n.pid
SlurmdLogFile=$STATE/slurmd-%n.log
SlurmdSpoolDir=$STATE/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=10
MinJobAge=3600
CONFIGURATION
    for index in "${!NODES[@]}"; do
        echo "NodeName=${NODES[$index]} NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1 + index)) CPUs=$CORES RealMemory=$memory" >>"$CONF"
    done
    echo "PartitionName=local Nodes=$(IFS=, && echo "${NODES[*]}") Default=YES MaxTime=INFINITE State=UP" >>"$CONF"
    : >"$STATE/cgroup.conf"
}

# start DAEMON COMMAND...: a daemon that puts itself into the background and writes its own pid file.
start() {
    alive "$1" >/dev/null && return
    rm -f "$STATE/$1.pid"
    "${@:2}" >>"$STATE/start.log" 2>&1 </dev/null || die "$1 does not start: see $STATE/start.log"
    until_true 20 alive "$1" || die "$1 did not stay: see $STATE/*.log"
}

nodes_are_idle() { [ "$(scontrol show nodes --oneliner | grep -cE 'State=(IDLE|MIXED|ALLOCATED)\b')" = "${#NODES[@]}" ]; }

up() {
    refuse_a_cluster
    check_programs
    [ "${#STATE}" -le 90 ] || die "$STATE is too long for the name of a socket: set SMOE_SLURM_DIR to a shorter one"
    if ! (umask 077 && mkdir -p "$STATE/controller") 2>/dev/null || [ ! -w "$STATE" ]; then
        die "cannot write in $STATE: set SMOE_SLURM_DIR to another folder"
    fi
    check_owner # once more: somebody may have made it in between
    export SLURM_CONF="$CONF"
    if ! all_alive; then
        stop_daemons
        rm -rf "$STATE/controller" "$STATE"/spool-* && mkdir -p "$STATE/controller" # jobs of a Slurm that died are gone
        write_configuration
        (umask 077 && head -c 1024 /dev/urandom >"$STATE/munge.key")
        start munged munged --key-file="$STATE/munge.key" --socket="$STATE/munge.sock" --pid-file="$STATE/munged.pid" \
            --log-file="$STATE/munged.log" --seed-file="$STATE/munge.seed" --force
        start slurmctld slurmctld -f "$CONF"
        local node
        for node in "${NODES[@]}"; do start "slurmd-$node" slurmd -N "$node" -f "$CONF"; done
        until_true 30 nodes_are_idle || die "the nodes do not come up: see $STATE/slurmctld.log and $STATE/slurmd-*.log"
    fi
    note "Slurm runs: ${#NODES[@]} nodes of $CORES cores, state in $STATE"
    note "try: sbatch --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0 slurm/smoe_5p625deg.sh"
    echo "export SLURM_CONF=$CONF"
}

no_jobs() { [ -z "$(squeue --noheader)" ]; }

stop_daemons() {
    local daemon pid
    for daemon in "${NODES[@]/#/slurmd-}" slurmctld munged; do
        pid="$(alive "$daemon")" || continue
        kill "$pid"
        until_true 15 eval "! alive $daemon" || kill -KILL "$pid" || true
    done
}

any_alive() {
    local daemon
    for daemon in munged slurmctld "${NODES[@]/#/slurmd-}"; do ! alive "$daemon" >/dev/null || return 0; done
    return 1
}

down() {
    if ! any_alive; then
        note "nothing runs in $STATE"
        return
    fi
    export SLURM_CONF="$CONF"
    if alive slurmctld >/dev/null && has scancel; then
        mapfile -t jobs < <(timeout 20 squeue --noheader --format=%A | sort -u)
        if [ "${#jobs[@]}" -gt 0 ]; then
            timeout 20 scancel "${jobs[@]}" || true
            until_true 20 no_jobs || note "jobs that do not end: $(timeout 5 squeue --noheader --format=%A | xargs)"
        fi
    fi
    stop_daemons
    note "Slurm of $STATE is stopped; its logs stay there"
}

status() {
    if ! all_alive; then
        echo "no Slurm runs in $STATE"
        exit 3
    fi
    echo "export SLURM_CONF=$CONF"
    SLURM_CONF="$CONF" sinfo --Node --long
    SLURM_CONF="$CONF" squeue
}

case "${1:-}" in
up | down | status)
    check_owner
    "$1"
    ;;
*) die "usage: bash launch/local_slurm.sh up|down|status" ;;
esac
