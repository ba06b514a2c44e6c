#!/usr/bin/env bash
# From a fresh clone to a trained Spatial Mixture-of-Experts and its pictures: makes the environment, then runs
# `smoe-hpc quickstart`, to which all arguments go. environment.sh lists the variables that change what is installed.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# shellcheck disable=SC2119  # the arguments are the command's, not extras
prepare
cd "$ROOT"
"$PYTHON" -m smoe_hpc quickstart "$@"
say "done"
