#!/usr/bin/env bash
# Make the virtual environment .venv with llmnorm in it (editable), or find that there is nothing to do.
#
#   bash tools/bootstrap.sh                  the base install
#   bash tools/bootstrap.sh dev finetune     with extras: deepspeed flash fla finetune quant gguf eval serve structured track remote docs dev
#
# torch is installed first, by itself and pinned; everything else follows constraints.txt, which never
# moves torch. A torch >= 2.11 that is in .venv already is kept. Extras add up over calls. To build on the
# torch of a container: `python3 -m venv --system-site-packages .venv` before the first call.
#
# The environment may say:
#   LLMNORM_TORCH_INDEX   the package index that torch comes from (pip's --index-url). On Linux the default
#                         build brings CUDA (several GB); for a machine without an NVIDIA GPU:
#                         https://download.pytorch.org/whl/cpu, for an older driver: .../whl/cu126.
#                         Naming another index than last time replaces torch.
#   LLMNORM_PYTHON        the interpreter to build .venv with (3.11 or 3.12); default: the first that fits.
#   LLMNORM_DEVICE=cpu    do not stop where there is a GPU that torch cannot use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH_PIN=torch==2.13.0
EXTRAS=(deepspeed flash fla finetune quant gguf eval serve structured track remote docs dev)
stamp=.venv/llmnorm-stamp           # what the environment was made from; its extras; where it was made
busy=.venv/llmnorm-busy             # there while pip writes: found at the start, the last run was cut off
index_file=.venv/llmnorm-torch-index
python=.venv/bin/python

say() { printf 'bootstrap: %s\n' "$*"; }
fail() { printf 'bootstrap: error: %s\n' "$*" >&2; exit 2; }

for extra in "$@"; do
    case "$extra" in
        -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    esac
    [[ " ${EXTRAS[*]} " == *" $extra "* ]] || fail "no extra is called '$extra'; valid: ${EXTRAS[*]}"
done

fits() { # INTERPRETER: does it run, as a version that we support?
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_python() {
    local candidate without_venv=
    for candidate in ${LLMNORM_PYTHON:-python3 python3.12 python3.11}; do
        fits "$candidate" || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
        without_venv=$("$candidate" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    done
    [[ -z $without_venv ]] || fail "$without_venv has no venv module; install it (Debian, Ubuntu: apt install $without_venv-venv)"
    [[ -z ${LLMNORM_PYTHON:-} ]] || fail "LLMNORM_PYTHON=$LLMNORM_PYTHON is no Python 3.11 or 3.12"
    fail "needs Python 3.11 or 3.12 (Debian, Ubuntu: apt install python3.11 python3.11-venv; macOS: brew install python@3.12)"
}

recipe() { # one word that changes whenever the environment has to be looked at again
    { cat pyproject.toml constraints.txt tools/bootstrap.sh; "$python" --version; } | cksum | tr -d ' '
}

torch_there() { # prints the version of a torch that works and is new enough
    "$python" - 2>/dev/null <<'PY'
import torch
version = torch.__version__.split("+")[0]
assert tuple(int(part) for part in version.split(".")[:2]) >= (2, 11)
print(version)
PY
}

pip_install() {
    local quiet=--quiet
    [[ ! -t 1 ]] || quiet=
    : >"$busy"
    local status=0
    "$python" -m pip install $quiet --disable-pip-version-check "$@" || status=$?
    rm -f "$busy" # pip came back by itself: what it did is whole, even where it failed
    return "$status"
}

stage() { # NAME COMMAND...: runs it and says how long it took
    local name=$1 start=$SECONDS
    shift
    say "$name ..."
    "$@"
    say "$name: $((SECONDS - start)) s"
}

make_venv() {
    local found
    found=$(find_python)
    say "using $found ($("$found" --version))"
    rm -f "$stamp"
    "$found" -m venv --clear .venv
}

install_torch() {
    if [[ -n ${LLMNORM_TORCH_INDEX:-} && $LLMNORM_TORCH_INDEX != "$(cat "$index_file" 2>/dev/null)" ]]; then
        "$python" -m pip uninstall --quiet --yes torch
    elif torch_version=$(torch_there); then
        say "torch $torch_version is there and fits"
        return
    fi
    if [[ -n ${LLMNORM_TORCH_INDEX:-} ]]; then
        pip_install "$TORCH_PIN" --index-url "$LLMNORM_TORCH_INDEX"
        printf '%s\n' "$LLMNORM_TORCH_INDEX" >"$index_file"
    else
        pip_install "$TORCH_PIN" -c constraints.txt
    fi
    torch_version=$(torch_there) || fail "the torch in .venv does not work: $("$python" -c 'import torch' 2>&1 | tail -n 1)"
}

install_package() {
    local target=. isolation=()
    [[ -z $extras ]] || target=".[${extras// /,}]"
    # flash-attn is compiled against the torch that is there, so it must see it.
    if [[ " $extras " == *" flash "* ]]; then
        pip_install hatchling ninja packaging psutil wheel
        isolation=(--no-build-isolation)
    fi
    sed "s/^torch==.*/torch==$torch_version/" constraints.txt >.venv/llmnorm-constraints.txt
    pip_install ${isolation[@]+"${isolation[@]}"} -c .venv/llmnorm-constraints.txt -e "$target"
}

check_gpu() {
    "$python" -m llmnorm.machine.gpus "${LLMNORM_DEVICE:-auto}"
}

start=$SECONDS
[[ ! -e $busy ]] || { say "the last run was cut off while it installed; starting over"; rm -rf .venv; }
if [[ ! -e .venv ]]; then
    stage "virtual environment" make_venv
elif ! "$python" -c 'import pip' 2>/dev/null; then
    say "the .venv that is here is not whole; making it anew"
    stage "virtual environment" make_venv
elif [[ -e $stamp && $(sed -n 3p "$stamp") != "$(pwd -P)" ]]; then
    say "this directory was moved, and an environment cannot be; making it anew"
    stage "virtual environment" make_venv
elif ! fits "$python"; then
    fail ".venv holds $("$python" --version 2>&1), not Python 3.11 or 3.12; move it away and run this again"
fi

# Extras of earlier calls stay: tools/test.sh (dev) and launch/quickstart.sh (none) share one environment.
installed=$(sed -n 2p "$stamp" 2>/dev/null || true)
extras=$(printf '%s\n' $installed "$@" | sort -u | xargs)
if [[ $(sed -n 1p "$stamp" 2>/dev/null) == "$(recipe)" && $installed == "$extras" ]] &&
    [[ -z ${LLMNORM_TORCH_INDEX:-} || $LLMNORM_TORCH_INDEX == "$(cat "$index_file" 2>/dev/null)" ]]; then
    say ".venv is ready (extras: ${extras:-none})"
    exit 0
fi
stage "torch" install_torch
stage "llmnorm and what it needs (extras: ${extras:-none})" install_package
stage "GPU check" check_gpu
printf '%s\n%s\n%s\n' "$(recipe)" "$extras" "$(pwd -P)" >"$stamp"
say "done in $((SECONDS - start)) s; activate it with: source .venv/bin/activate"
