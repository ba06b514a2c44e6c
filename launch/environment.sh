# shellcheck shell=bash
# Read by quickstart.sh and test.sh. `prepare EXTRA ...` leaves PYTHON, an interpreter that has everything, saying
# each step and how long it took; what is there already is reused. What goes wrong is one line and exit status 2.
#
#   SMOE_PYTHON         an interpreter to use as it is: no environment is made, and only what it lacks is installed into it
#   SMOE_VENV           where the environment goes instead of .venv in the checkout
#   SMOE_TORCH          a requirement or a wheel that replaces the choice of torch's build
#   SMOE_WITH_DALI=1    install NVIDIA DALI as well
#   SMOE_MIN_FREE_MIB   free disk space below which nothing is installed

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
LOG="$(mktemp -u "${TMPDIR:-/tmp}/smoe-install-XXXXXXXXXXXX.log" 2>/dev/null || true)" # a name that nobody can guess
TORCH_VERSION=2.13.0
CUDA_OF_DEFAULT_BUILD=13.0
NEWEST_PYTHON=14 # torch publishes no builds for a newer 3.x yet

export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_ROOT_USER_ACTION=ignore
export PIP_RETRIES="${PIP_RETRIES:-3}"
export DS_BUILD_OPS=0 # DeepSpeed's own kernels are not used: do not compile them while installing

say() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }

die() {
    [ -s "$LOG" ] || rm -f "$LOG"
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# shellcheck source-path=SCRIPTDIR
. "$ROOT/launch/paths.sh"
expand_paths SMOE_PYTHON SMOE_VENV SMOE_TORCH SMOE_SLURM_DIR
VENV="$(realpath -m "${SMOE_VENV:-$ROOT/.venv}")"

# quietly DESCRIPTION COMMAND...: runs it, says how long it took; its output goes to the log; returns its status.
quietly() {
    local begin=$SECONDS status=0
    printf '[%4d s] %s ... ' "$SECONDS" "$1"
    "${@:2}" >>"$LOG" 2>&1 </dev/null || status=$?
    if [ "$status" = 0 ]; then printf '%d s\n' $((SECONDS - begin)); else printf 'no (%d s)\n' $((SECONDS - begin)); fi
    return "$status"
}

# why_failed WHAT: ends with one line that names the likely reason, read from the log.
why_failed() {
    local reason
    if grep -qi 'no space left on device' "$LOG"; then
        reason="the disk is full; free some space (temporary files go to ${TMPDIR:-/tmp}, see TMPDIR)"
    elif grep -qiE 'connection (refused|broken|reset)|failed to establish|name resolution|resolve host|timed out|max retries|network is unreachable|could not resolve' "$LOG"; then
        reason="no network, or the package registry does not answer; check the connection, or your pip's proxy and index settings"
    else
        reason="$(grep -E '^(ERROR|E:|error)' "$LOG" | tail -1)"
    fi
    die "$1 failed: ${reason:-see the log} (log: $LOG)"
}

is_root() { [ "$(id -u)" = 0 ]; }
has() { command -v "$1" >/dev/null 2>&1; }

# apt DESCRIPTION PACKAGE...: installs Debian packages; false where that is not ours to do.
apt() {
    is_root && has apt-get || return 1
    local install=(apt-get install -y -q --no-install-recommends "${@:2}")
    quietly "$1 (apt-get: ${*:2})" "${install[@]}" && return 0
    quietly "package lists (apt-get update)" apt-get update -q || true
    quietly "$1, once more" "${install[@]}" || why_failed "apt-get install ${*:2}"
}

suits() { "$1" -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, $NEWEST_PYTHON))" >/dev/null 2>&1; }
makes_venvs() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

# find_python: prints the first suitable interpreter: python3 as it is on PATH, else the newest python3.x.
find_python() {
    local minor name wanted
    for wanted in makes_venvs true; do
        for name in python3 $(for ((minor = NEWEST_PYTHON; minor >= 10; minor--)); do echo "python3.$minor"; done); do
            if has "$name" && suits "$name" && "$wanted" "$name"; then
                "$name" -c 'import sys; print(sys.executable)'
                return
            fi
        done
    done
}

check_space() {
    local free needed=4000 # the CPU environment takes 2.0 GB with the test tools, and pip unpacks beside it
    [ -z "$(cuda_of_driver)" ] || needed=14000
    needed="${SMOE_MIN_FREE_MIB:-$needed}"
    free=$(($(df -Pk "$1" | awk 'NR == 2 { print $4 }') / 1024))
    [ "$free" -ge "$needed" ] ||
        die "$free MiB are free at $1, installing needs $needed MiB; free some, or set SMOE_VENV to a folder on a larger disk"
}

check_compiler() {
    has "${CXX:-g++}" || apt "C++ compiler" g++ ||
        die "no C++ compiler (${CXX:-g++}): install g++ or load your centre's compiler module, or set CXX to one"
}

# cuda_of_driver: newest CUDA version the NVIDIA driver runs; "unknown" where it does not say; nothing without a GPU.
cuda_of_driver() {
    has nvidia-smi && nvidia-smi -L 2>/dev/null | grep GPU >/dev/null || return 0
    local version
    version="$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Za-z ]*Version: *\([0-9][0-9.]*\).*/\1/p' | head -1)"
    echo "${version:-unknown}"
}

add() { "$PYTHON" -m pip install "$@"; }

# by_uv BACKEND: installs torch by uv, which knows where torch's builds for each driver are.
by_uv() {
    quietly "uv" add uv &&
        quietly "torch $TORCH_VERSION ($1 build, by uv)" "$PYTHON" -m uv pip install --python "$PYTHON" --torch-backend "$1" "torch==$TORCH_VERSION"
}

install_torch() {
    local cuda
    cuda="$(cuda_of_driver)"
    if [ -n "${SMOE_TORCH:-}" ]; then
        quietly "torch as SMOE_TORCH says ($SMOE_TORCH)" add "$SMOE_TORCH" || why_failed "installing $SMOE_TORCH"
    elif [ -z "$cuda" ]; then
        quietly "torch $TORCH_VERSION (CPU build: no NVIDIA GPU)" add "torch==$TORCH_VERSION+cpu" || by_uv cpu || {
            say "no CPU build to be had: taking the default one, which brings several GB of CUDA libraries along"
            quietly "torch $TORCH_VERSION (default build)" add "torch==$TORCH_VERSION" || why_failed "installing torch"
        }
    elif [ "$cuda" != unknown ] && printf '%s\n' "$CUDA_OF_DEFAULT_BUILD" "$cuda" | sort -VC; then
        quietly "torch $TORCH_VERSION (default build: driver runs CUDA $cuda)" add "torch==$TORCH_VERSION" || why_failed "installing torch"
    else
        by_uv auto ||
            die "the driver runs CUDA $cuda, torch's default build needs $CUDA_OF_DEFAULT_BUILD: set SMOE_TORCH to a requirement or wheel that fits (log: $LOG)"
    fi
}

make_venv() {
    local base version
    if "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && suits "$VENV/bin/python"; then return; fi
    base="$(find_python)"
    if [ -z "$base" ] && apt "Python" python3 python3-venv; then base="$(find_python)"; fi
    [ -n "$base" ] || die "no Python from 3.10 to 3.$NEWEST_PYTHON on PATH: install one or load your centre's module, or set SMOE_PYTHON"
    version="$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    # Debian keeps venv apart from Python
    if ! makes_venvs "$base" && { ! apt "Python's venv" "python$version-venv" || ! makes_venvs "$base"; }; then
        die "$base cannot make environments: install python$version-venv, or set SMOE_PYTHON to an interpreter with pip"
    fi
    rm -rf "$VENV"
    quietly "environment $VENV with Python $version" "$base" -m venv "$VENV" || why_failed "making $VENV"
}

# needs EXTRA...: the requirements that $PYTHON does not meet, one a line.
needs() { "$PYTHON" "$ROOT/launch/requirements.py" "$@"; }

# wanted_state EXTRA...: a checksum of all that decides what is installed.
wanted_state() {
    { "$PYTHON" -VV && cat "$ROOT/setup.cfg" && echo "$ROOT $* $TORCH_VERSION ${SMOE_TORCH:-}"; } 2>/dev/null | sha256sum
}

# prepare_venv EXTRA...: the environment, with this checkout in it.
prepare_venv() {
    local parent stamp extras
    parent="$(dirname "$VENV")"
    if ! mkdir -p "$parent" 2>/dev/null || [ ! -w "$parent" ]; then
        die "cannot write in $parent: set SMOE_VENV to a folder that you may write in"
    fi
    PYTHON="$VENV/bin/python"
    extras="$(IFS=, && echo "$*")"
    stamp="$VENV/.smoe-${extras:-base}"
    if has flock; then # two starts at once would install over each other
        exec 9<"$parent"
        flock -n 9 || { say "waiting for another start that is installing" && flock 9; }
    fi
    if [ -s "$stamp" ] && [ "$(cat "$stamp")" = "$(wanted_state "$@")" ]; then
        say "$VENV is as setup.cfg wants it"
    else
        check_space "$parent"
        make_venv
        if [ -n "${SMOE_TORCH:-}" ] || needs | grep '^torch\b' >/dev/null; then install_torch; fi
        quietly "smoe-hpc and what it needs${extras:+ ($extras)}" add -e "$ROOT${extras:+[$extras]}" ||
            why_failed "installing smoe-hpc"
        wanted_state "$@" >"$stamp"
    fi
    exec 9<&-
}

# may_install: whether pip may install for $PYTHON; a distribution marks its own Python as not pip's (PEP 668).
may_install() {
    "$PYTHON" -c 'import os, sys, sysconfig
marker = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
sys.exit(sys.prefix == sys.base_prefix and os.path.exists(marker))'
}

# prepare_given EXTRA...: the user's own interpreter; the checkout is put on its path and not installed into it.
prepare_given() {
    local missing
    PYTHON="$(command -v "$SMOE_PYTHON")" || die "SMOE_PYTHON=$SMOE_PYTHON does not exist; name an interpreter, or unset it"
    PYTHON="$(realpath -s "$PYTHON")"
    suits "$PYTHON" || die "SMOE_PYTHON=$SMOE_PYTHON is no Python from 3.10 to 3.$NEWEST_PYTHON; name another one, or unset it"
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    missing="$(needs "$@" 2>>"$LOG")" || die "SMOE_PYTHON=$SMOE_PYTHON has no pip; name another interpreter, or unset it (log: $LOG)"
    if [ -z "$missing" ]; then
        say "$PYTHON has everything"
        return
    fi
    may_install || die "SMOE_PYTHON=$SMOE_PYTHON is the distribution's own Python, which lacks what is needed and into which pip may not install; name the interpreter of an environment of yours (python3 -m venv ENV, then SMOE_PYTHON=ENV/bin/python), or unset SMOE_PYTHON and .venv is made"
    check_space "$("$PYTHON" -c 'import sys; print(sys.prefix)')"
    if grep '^torch\b' <<<"$missing" >/dev/null; then
        install_torch
        missing="$(needs "$@")"
    fi
    local list
    mapfile -t list <<<"$missing"
    [ -z "$missing" ] || quietly "into $PYTHON: ${list[*]}" add "${list[@]}" || why_failed "installing into $PYTHON"
}

# prepare EXTRA...: everything; extras as in setup.cfg.
prepare() {
    local extras=("$@")
    [ "${SMOE_WITH_DALI:-0}" = 0 ] || extras+=(dali)
    : 2>/dev/null >"$LOG" || die "cannot write $LOG: set TMPDIR to a folder that you may write in, with space in it"
    check_compiler
    if [ -n "${SMOE_PYTHON:-}" ]; then prepare_given "${extras[@]}"; else prepare_venv "${extras[@]}"; fi
    rm -f "$LOG"
    PATH="$(dirname "$PYTHON"):$PATH" # ninja, mpirun and smoe-hpc live beside the interpreter
    export PATH
}
