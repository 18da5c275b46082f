#!/usr/bin/env bash
# Two hosts on one machine: network namespaces with a cable between them, on which runs of two processes are tried.
#
#   bash tools/two_hosts.sh [DIRECTORY] [torchrun|accelerate|cut|gone ...]      (without names: all four)
#
#   torchrun     fsdp2, started by torchrun on both hosts, trained to its end
#   accelerate   ddp, started by accelerate launch on both hosts, trained to its end
#   cut          the cable is out for 20 seconds: the run waits and goes on to its end
#   gone         the cable stays out: both hosts end within parallel.timeout (TIMEOUT=20), and the run goes on with one
#
# Needs root and iproute2. Ends with 0 where all held, 1 where something did not, and 77 where this machine cannot do it,
# with the reason. Takes about three minutes on an idle machine.
#
# What would surprise: both hosts see one file system, as on a cluster, and one process table.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

cannot() {
    echo "cannot be tried here: $1" >&2
    exit 77
}
[[ $(id -u) == 0 ]] || cannot "network namespaces are made as root, and this is user $(id -un)"
command -v ip >/dev/null || cannot "there is no ip; apt-get install iproute2 brings it"

place=${1:-$(mktemp -d)}
shift || true
trials=("$@")
[[ ${#trials[@]} -gt 0 ]] || trials=(torchrun accelerate cut gone)
mkdir -p "$place"
export PYTHONPATH=$root HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
python=${PYTHON:-$root/.venv/bin/python}
hosts=("llmnorm$$a" "llmnorm$$b")
addresses=(10.77.0.1 10.77.0.2)
launchers=()

finish() {
    for launcher in "${launchers[@]}"; do
        kill -KILL -- "-$launcher" 2>/dev/null || true
    done
    for host in "${hosts[@]}"; do
        ip netns delete "$host" 2>/dev/null || true
        rm -rf "/etc/netns/$host"
    done
}
trap finish EXIT
for number in 0 1; do
    host=${hosts[$number]}
    ip netns add "$host" 2>"$place/netns.err" || cannot "no network namespace: $(cat "$place/netns.err")"
    # Inside of the namespace this file stands in place of /etc/hosts.
    mkdir -p "/etc/netns/$host"
    printf '127.0.0.1 localhost\n%s host0\n%s host1\n' "${addresses[@]}" >"/etc/netns/$host/hosts"
done
ip link add "cable$$" netns "${hosts[0]}" type veth peer name "cable$$" netns "${hosts[1]}" ||
    cannot "no pair of virtual network devices (veth)"
for number in 0 1; do
    ip -n "${hosts[$number]}" address add "${addresses[$number]}/24" dev "cable$$"
    ip -n "${hosts[$number]}" link set lo up
    ip -n "${hosts[$number]}" link set "cable$$" up
done

on() { # HOST LOG COMMAND...: starts a command on a host, in a session of its own
    local number=$1 log=$2
    shift 2
    setsid ip netns exec "${hosts[$number]}" unshare --uts bash -c 'hostname "$0" && exec "$@"' "host$number" \
        env GLOO_SOCKET_IFNAME="cable$$" "$@" >"$log" 2>&1 &
    launchers+=($!)
    disown $! # or bash would tell of each that is killed
}
failed() { # LOG MESSAGE
    echo "$2" >&2
    tail -n 25 "$1" >&2
    exit 1
}
await() { # SECONDS LOG WHAT COMMAND...: until the command succeeds
    local until=$((SECONDS + $1)) log=$2 what=$3
    shift 3
    until "$@"; do
        ((SECONDS < until)) || failed "$log" "not seen in time: $what"
        sleep 0.2
    done
}
steps() { # RUN: lines of steps in its metrics
    local lines
    lines=$(grep -c '"lr"' "$1/metrics.jsonl" 2>/dev/null) || true
    echo "${lines:-0}"
}
further() { (($(steps "$1") >= $2)); }
has_ended() { ! kill -0 "$1" 2>/dev/null; }
words() { # RUN
    echo "$root/configs/smoke.yaml run_dir=$1 data.dir=$place/data evaluation.every=null evaluation.samples=0" \
        "checkpoint.every=10 checkpoint.keep=2"
}
port=29600
start() { # NAME SHARDING STEPS [key=value ...]: one process on each host, by torchrun
    local name=$1 sharding=$2 steps=$3
    shift 3
    port=$((port + 1))
    for number in 0 1; do
        # shellcheck disable=SC2046 # the words are words
        on "$number" "$place/$name.$number.log" "$python" -m torch.distributed.run --nnodes=2 --nproc-per-node=1 \
            --rdzv-backend=c10d --rdzv-endpoint="${addresses[0]}:$port" --rdzv-id="$name" \
            --local-addr="${addresses[$number]}" -m llmnorm train $(words "$place/$name") training.steps="$steps" \
            parallel.sharding="$sharding" "$@"
    done
}
ended_well() { # NAME: both hosts have ended and the run is finished
    await 600 "$place/$1.0.log" "the end of $1" has_ended "${launchers[-2]}"
    await 60 "$place/$1.1.log" "the end of $1 on the second host" has_ended "${launchers[-1]}"
    [[ -f $place/$1/DONE ]] || failed "$place/$1.0.log" "$1: the run has ended without DONE"
}
cable() { # up|down
    ip -n "${hosts[0]}" link set "cable$$" "$1"
}

# shellcheck disable=SC2046
"$python" -m llmnorm data $(words "$place/torchrun") >"$place/data.log"
for trial in "${trials[@]}"; do
    rm -rf "${place:?}/$trial"
    case $trial in
    torchrun)
        start torchrun fsdp2 40
        ended_well torchrun
        grep -q "2 process(es) on cpu (gloo), sharding fsdp2" "$place/torchrun.0.log"
        echo "torchrun: fsdp2 over two hosts, finished at step $(cat "$place/torchrun/DONE")"
        ;;
    accelerate)
        port=$((port + 1))
        for number in 0 1; do
            # shellcheck disable=SC2046
            on "$number" "$place/accelerate.$number.log" "$python" -m accelerate.commands.launch \
                --config_file "$root/launch/accelerate/ddp.yaml" --num_processes 2 --num_machines 2 \
                --machine_rank "$number" --main_process_ip "${addresses[0]}" --main_process_port "$port" \
                -m llmnorm train $(words "$place/accelerate") training.steps=40
        done
        ended_well accelerate
        grep -q "2 process(es) on cpu (gloo), sharding ddp" "$place/accelerate.0.log"
        echo "accelerate: ddp over two hosts, finished at step $(cat "$place/accelerate/DONE")"
        ;;
    cut)
        start cut ddp 400 parallel.timeout=100
        await 300 "$place/cut.0.log" "step 20" further "$place/cut" 20
        cable down
        sleep 20
        before=$(steps "$place/cut")
        cable up
        ended_well cut
        [[ $(steps "$place/cut") == 400 ]] || failed "$place/cut.0.log" "cut: not every step once"
        echo "cut: without the cable for 20 s after step $before, finished at step $(cat "$place/cut/DONE")"
        ;;
    gone)
        start gone fsdp2 400 parallel.timeout="${TIMEOUT:-20}"
        await 300 "$place/gone.0.log" "step 20" further "$place/gone" 20
        cable down
        began=$SECONDS
        # torchrun itself waits up to 30 seconds for a process that it has told to end.
        for number in 0 1; do
            await $((${TIMEOUT:-20} + 60)) "$place/gone.$number.log" "the end of host $number" \
                grep -q "llmnorm: error: " "$place/gone.$number.log"
            echo "gone: host $number has ended after $((SECONDS - began)) s:" \
                "$(grep -m 1 "llmnorm: error: " "$place/gone.$number.log" | cut -c 1-200)"
        done
        kill -KILL -- "-${launchers[-1]}" "-${launchers[-2]}" 2>/dev/null || true
        before=$(steps "$place/gone")
        on 0 "$place/gone.alone.log" "$python" -m llmnorm train "$place/gone"
        await 300 "$place/gone.alone.log" "the end on one host" has_ended "${launchers[-1]}"
        [[ -f $place/gone/DONE && $(steps "$place/gone") == 400 ]] ||
            failed "$place/gone.alone.log" "gone: one host alone has not finished the run"
        echo "gone: after step $before one host alone went on, finished at step $(cat "$place/gone/DONE")"
        cable up
        ;;
    *)
        echo "no trial is called '$trial'; valid: torchrun, accelerate, cut, gone" >&2
        exit 2
        ;;
    esac
done
echo "all held; logs and runs lie in $place"
