#!/usr/bin/env bash
# Try launch/slurm/train.sbatch on a Slurm of this machine alone, which is started for it and ended again:
#
#   bash tools/slurm_here.sh [DIRECTORY]
#
# Needs root and Debian's package slurm-wlm (apt-get install slurm-wlm). A small run is warned twice, as before a time limit,
# goes back into the queue each time, and finishes; its curve must have every step once. Ends with 0 where all held, 1 where
# something did not, and 77 where this machine cannot do it, with the reason. Takes two to five minutes.
#
# What would surprise: no time limit is waited for, since Slurm keeps it only to the minute. `scancel --batch --signal=USR1`
# sends what --signal=B:USR1 sends, to the same shell.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

cannot() {
    echo "cannot be tried here: $1" >&2
    exit 77
}
[[ $(id -u) == 0 ]] || cannot "Slurm's daemons are started as root, and this is user $(id -un)"
for command in munged slurmctld slurmd sbatch srun scontrol scancel; do
    command -v "$command" >/dev/null || cannot "there is no $command; apt-get install slurm-wlm brings it"
done

place=${1:-$(mktemp -d)}
mkdir -p "$place/state" "$place/spool"
node=$(hostname -s)
export SLURM_CONF=$place/slurm.conf
cat >"$SLURM_CONF" <<CONF
ClusterName=here
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=16817
SlurmdPort=16818
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has expired: 120 seconds, if this is left out.
AuthInfo=socket=$place/munge.socket,cred_expire=10
StateSaveLocation=$place/state
SlurmdSpoolDir=$place/spool
SlurmctldPidFile=$place/slurmctld.pid
SlurmdPidFile=$place/slurmd.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdLogFile=$place/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=here Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF

finish() {
    for file in slurmd slurmctld munged; do
        [[ -f $place/$file.pid ]] && kill "$(cat "$place/$file.pid")" 2>/dev/null || true
    done
}
trap finish EXIT
(umask 077 && head -c 1024 /dev/urandom >"$place/munge.key")
chmod 755 "$place" # munged refuses a socket in a directory that others cannot enter
munged --force --key-file="$place/munge.key" --socket="$place/munge.socket" --pid-file="$place/munged.pid" \
    --log-file="$place/munged.log" --seed-file="$place/munged.seed" 2>"$place/munged.err" ||
    cannot "munged does not start: $(tail -n 1 "$place/munged.err")"
slurmctld -c || cannot "slurmctld does not start: $(tail -n 1 "$place/slurmctld.log")"
slurmd || cannot "slurmd does not start: $(tail -n 1 "$place/slurmd.log")"
until [[ $(sinfo --noheader --format=%t 2>/dev/null) == idle ]]; do
    ((SECONDS < 60)) || cannot "the node is not ready after a minute: $(tail -n 1 "$place/slurmd.log")"
    sleep 1
done
echo "Slurm $(sinfo --version | cut -d ' ' -f 2) on $node"

export PYTHON=${PYTHON:-$root/.venv/bin/python} PYTHONPATH=$root HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PROCESSES=${PROCESSES:-2} LOG_DIR=$place/logs
run=$place/run
words=("$root/configs/smoke.yaml" "data.dir=$place/data" "training.steps=400" "evaluation.every=null"
    "evaluation.samples=0" "checkpoint.every=5000")
"$PYTHON" -m llmnorm data "${words[@]}" >"$place/data.log"
cd "$place"
job=$(sbatch --parsable --nodes=1 --gpus-per-node=0 --cpus-per-task="$(nproc)" --time=30 --output="$place/job.out" \
    "$root/launch/slurm/train.sbatch" "$run" "${words[@]}")
steps() {
    local lines
    lines=$(grep -c '"lr"' "$run/metrics.jsonl" 2>/dev/null) || true
    echo "${lines:-0}"
}
state() { squeue --noheader --job "$job" --format=%T 2>/dev/null || true; }
await() { # SECONDS WHAT COMMAND...: until the command succeeds
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        ((SECONDS < until)) || {
            echo "not seen: $what; the job is '$(state)'" >&2
            tail -n 30 "$place/job.out" "$place/slurmctld.log" >&2
            exit 1
        }
        sleep 0.2
    done
}
further() { (($(steps) >= $1)); }
gone() { [[ -z $(state) || $(state) == COMPLETED ]]; }
requeued() { [[ $(grep -c "goes back into the queue" "$place/job.out") == "$1" ]]; }
for warning in 1 2; do
    await 300 "step $((50 * warning))" further $((50 * warning))
    scancel --batch --signal=USR1 "$job"
    await 300 "warning $warning has put the job back" requeued "$warning"
    echo "warned: stopped at step $(cat "$run/PREEMPT"), back in the queue"
done
await 600 "the job's end" gone
[[ -f $run/DONE ]] || {
    echo "the job has ended without DONE:" >&2
    tail -n 30 "$place/job.out" >&2
    exit 1
}
[[ $(grep -o '^{"step": [0-9]*, "tokens": [0-9]*, "loss"' "$run/metrics.jsonl" | cut -d , -f 1 | sort -u | wc -l) == 400 ]] &&
    [[ $(steps) == 400 ]] || {
    echo "metrics.jsonl does not have every step once" >&2
    exit 1
}
echo "finished at step $(cat "$run/DONE"), every step once; everything lies in $place"
