#!/usr/bin/env bash
# A pair for speculative decoding: trains configs/recipes/exspec/target.yaml, then the draft of draft.yaml
# beside it, distilled on the target. Run it again to go on where it stopped; what is done already is not
# done again. About an hour on 2 CPU cores.
#
#   bash launch/exspec_pair.sh                        to runs/target and runs/draft
#   bash launch/exspec_pair.sh DIRECTORY              to DIRECTORY/target and DIRECTORY/draft
#   bash launch/exspec_pair.sh DIRECTORY key=value    with overrides of both configurations
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

runs=runs
case "${1:-}" in
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    "" | *=*) ;;
    *) runs=$1; shift ;;
esac
llmnorm() { .venv/bin/python -m llmnorm "$@"; }
# Threads that wait asleep instead of spinning leave the core to whatever else wants it.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

recipes=configs/recipes/exspec
llmnorm train $recipes/target.yaml "$@" run_dir="$runs/target"
llmnorm train $recipes/draft.yaml "$@" run_dir="$runs/draft" objective.teacher="$runs/target"
