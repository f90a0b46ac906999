#!/usr/bin/env bash
# A real SLURM cluster on this one machine, for tests: controller, two node daemons and munge, with state in one folder.
#   scripts/slurm_up.sh install   installs Debian's packages if they are missing
#   scripts/slurm_up.sh up        starts it
#   scripts/slurm_up.sh env       prints what a shell must export to use it
#   scripts/slurm_up.sh down      ends its jobs and daemons, and removes the folder
# As root, on Debian or Ubuntu, without systemd or cgroups; it listens on the loopback interface only.
# SLURM_TEST_ROOT names the folder (needed, but by install), SLURM_TEST_PORT the first of its ports (26800),
# SLURM_TEST_CPUS how many CPUs each node claims to have (8: more than there are, so that toy jobs need not wait),
# SLURM_TEST_ARRAY the most jobs of one array (1001).
set -euo pipefail
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
root=${SLURM_TEST_ROOT:-}
port=${SLURM_TEST_PORT:-26800}
cpus=${SLURM_TEST_CPUS:-8}
array=${SLURM_TEST_ARRAY:-1001}
host=$(hostname -s)
socket=$root/munge/socket
export SLURM_CONF=$root/slurm.conf

say() { echo "slurm_up: $*" >&2; }
alive() { # a daemon that was killed keeps its name until its parent has looked
    local of
    [ -s "$root/$1.pid" ] && of=/proc/$(cat "$root/$1.pid") || return 1
    [ "$(cat "$of/comm" 2>/dev/null)" = "${1%%.*}" ] && ! grep -q '^State:[[:space:]]*Z' "$of/status" 2>/dev/null
}
await() { # await SECONDS WHAT COMMAND...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$end" ] || { say "$what did not come up; see $root/*.log"; exit 1; }
        sleep 0.2
    done
}

installed() { for name in slurmctld slurmd munged sbatch; do command -v "$name" >/dev/null || return 1; done; }

install() {
    installed && return
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -qq || apt-get update -qq; } >/dev/null
    apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge \
        </dev/null >/dev/null
}

configure() {
    mkdir -p "$root"/{munge,state,spool}
    chmod 755 "$root" "$root"/*/
    (umask 077; [ -s "$root/munge.key" ] || head -c 1024 /dev/urandom >"$root/munge.key")
    # Jobs that are queued again begin after two minutes unless told otherwise; `KillWait` is short for tests' sake, and
    # so is `BatchStartTimeout`, before which a job that was lost with its node is taken for one still to start.
    # `scavenge` gives way to `main`: its jobs are preempted and queued again.
    cat >"$SLURM_CONF" <<CONF
ClusterName=vlarl
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPidFile=$root/slurmctld.pid
SlurmdPidFile=$root/slurmd.%n.pid
SlurmctldLogFile=$root/slurmctld.log
SlurmdLogFile=$root/slurmd.%n.log
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
JobRequeue=1
KillWait=5
BatchStartTimeout=1
OverTimeLimit=0
MinJobAge=600
MaxArraySize=$array
DefMemPerCPU=256
NodeName=DEFAULT CPUs=$cpus CoresPerSocket=$cpus RealMemory=$(awk '/MemTotal/{print int($2/1024)}' /proc/meminfo) State=UNKNOWN
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1))
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2))
PartitionName=main Nodes=n1 Default=YES MaxTime=INFINITE State=UP PriorityTier=10
PartitionName=scavenge Nodes=n1 MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE
PartitionName=pair Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10
CONF
}

up() {
    [ "$(id -u)" = 0 ] || { say "needs root"; exit 1; }
    installed || { say "SLURM is not installed; run: $0 install"; exit 1; }
    configure
    if ! alive munged; then
        rm -f "$socket"*
        munged --force --num-threads=2 --key-file="$root/munge.key" --socket="$socket" --pid-file="$root/munged.pid" \
            --log-file="$root/munged.log" --seed-file="$root/munge/seed" 2>>"$root/munged.log"
    fi
    await 10 munged munge -n --socket="$socket"
    alive slurmctld || slurmctld
    await 20 slurmctld timeout 5 scontrol ping
    for node in n1 n2; do
        alive slurmd.$node || slurmd -N $node
    done
    await 30 slurmd nodes_are_ready
    say "up: $(sinfo -h -p pair -o '%D nodes, %c CPUs each, %T'), slurm $(sinfo -V | cut -d' ' -f2)"
}
nodes_are_ready() { [ "$(timeout 5 sinfo -h -N -p pair -t idle,mix,alloc -o %N | wc -l)" = 2 ]; }

stop() {
    alive "$1" || return 0
    local pid
    pid=$(cat "$root/$1.pid")
    kill "$pid"
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.2; done
    kill -9 "$pid"
}

down() {
    if alive slurmctld; then
        scancel --user="$(id -un)" || true
        for _ in $(seq 50); do [ -n "$(timeout 5 squeue -h -t R,CG,S)" ] || break; sleep 0.2; done
    fi
    stop slurmd.n1; stop slurmd.n2; stop slurmctld; stop munged
    rm -rf "$root"
}

case ${1:-} in up | env | down) [ -n "$root" ] || { say "SLURM_TEST_ROOT: missing; name a folder for the state"; exit 2; } ;; esac
case ${1:-} in
    install) install ;;
    up) up ;;
    env) echo "export SLURM_CONF=$SLURM_CONF" ;;
    down) down ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
