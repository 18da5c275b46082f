#!/usr/bin/env bash
# Set up (tools/bootstrap.sh dev), then lint, types and tests. Further arguments go to pytest:
#
#   bash tools/test.sh                        everything
#   bash tools/test.sh tests/nn -k rotary     a part of it
#   bash tools/test.sh -n 0                   one test at a time (two files run beside each other otherwise)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The tests' models are tiny: one thread each is fastest, and sums are the same on every machine.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# No test needs a hub; a mistake that reaches for one fails at once instead of waiting.
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

stage() { # NAME COMMAND...: runs it and says how long it took
    local name=$1 start=$SECONDS status=0
    shift
    printf '== %s\n' "$name"
    "$@" || status=$?
    printf '== %s: %d s%s\n' "$name" $((SECONDS - start)) "$([[ $status == 0 ]] || echo " (failed, exit code $status)")"
    return "$status"
}

stage "setup" bash tools/bootstrap.sh dev
# All four run even where one fails: one call tells everything that is wrong.
failed=()
stage "lint" .venv/bin/ruff check || failed+=(lint)
stage "format" .venv/bin/ruff format --check || failed+=(format)
stage "types" .venv/bin/mypy || failed+=(types)
stage "tests" .venv/bin/python -m pytest -n 2 --dist loadfile "$@" || failed+=(tests)
if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'failed: %s\n' "${failed[*]}" >&2
    exit 1
fi
