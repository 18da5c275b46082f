#!/usr/bin/env bash
# From nothing to generated text: sets up, prepares the default corpus, trains configs/quickstart.yaml
# under accelerate (one GPU if there is one), evaluates, plots and generates. Run it again to go on where
# it stopped; what is done already is not done again.
#
#   bash launch/quickstart.sh                                        everything as the configuration says
#   bash launch/quickstart.sh optimizer.lr=1e-3 training.steps=200   with overrides of it
#   bash launch/quickstart.sh run_dir=runs/second seed=1             beside the first run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
config=configs/quickstart.yaml

for argument in "$@"; do
    case "$argument" in
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
        training.device=*) export LLMNORM_DEVICE=${argument#*=} ;;
    esac
done

began=$SECONDS
stage() { # NAME COMMAND...: runs it and says how long it took
    local name=$1 start=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    "$@"
    printf '== %s: %d s\n' "$name" $((SECONDS - start))
}
llmnorm() { .venv/bin/python -m llmnorm "$@"; }

stage "setup" bash tools/bootstrap.sh

# One process may use every core, as torch alone would; accelerate would give it one.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(.venv/bin/python -c 'import torch; print(torch.get_num_threads())')}
# Threads that wait asleep instead of spinning leave the core to whatever else wants it: twice the rate
# of a training step on two cores that three busy processes share.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

# Read before any work, so that a mistake in an override is answered at once.
resolved=$(llmnorm config "$config" "$@")
run=$(.venv/bin/python -c 'import sys, yaml; print(yaml.safe_load(sys.stdin)["run_dir"])' <<<"$resolved")

stage "data" llmnorm data "$config" "$@"
stage "training" .venv/bin/accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 1 \
    -m llmnorm train "$config" "$@"
stage "plot" llmnorm plot "$run"
stage "generation" llmnorm generate "$run"

cat <<END

== done in $((SECONDS - began)) s
run        $run
  config.yaml      the resolved configuration
  metrics.jsonl    a line a logged step
  checkpoints/     newest: $(ls "$run/checkpoints" 2>/dev/null | grep '^step_' | sort | tail -n 1)
  plots/loss.png   loss, rates, bits per byte beside gzip and xz
END
