#!/usr/bin/env bash
# Trains the SMoE ResNet at 5.625 degrees (recipe weather_smoe_5p625deg), from statistics to scores:
#
#   SMOE_DATA=/where/era5_5p625deg/is sbatch slurm/smoe_5p625deg.sh
#   SMOE_SYNTHETIC=1 sbatch slurm/smoe_5p625deg.sh                  makes data of its own
#   sbatch --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 slurm/smoe_5p625deg.sh
#
# Every line below can be overridden on sbatch's command line, as in the last example; there is one task a GPU. Where there
# are no GPUs, as in the Slurm of launch/local_slurm.sh, train on CPUs:
#
#   sbatch --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0 slurm/smoe_5p625deg.sh
#
# common.sh says which variables it reads.
#SBATCH --job-name=smoe_5p625deg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail

# Slurm runs a copy of this script elsewhere: the checkout is where sbatch was called, or where the script itself lies
script="$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n 's/^ *Command=\([^ ]*\).*/\1/p')" || true
for place in "${SLURM_SUBMIT_DIR:-}" "${script%/slurm/*}" "$(realpath -m "$0/../..")"; do
    [ ! -f "$place/slurm/common.sh" ] || SMOE_ROOT="${SMOE_ROOT:-$place}"
done
SMOE_ROOT="${SMOE_ROOT:-}"
SMOE_ROOT="${SMOE_ROOT/#\~\//${HOME:-}/}" # in quotes no shell has done it
if [ ! -f "$SMOE_ROOT/slurm/common.sh" ]; then
    echo "error: no checkout at ${SMOE_ROOT:-$PWD}: call sbatch there, or set SMOE_ROOT to it" >&2
    exit 2
fi
# shellcheck source-path=SCRIPTDIR
. "$SMOE_ROOT/slurm/common.sh"

train_recipe weather_smoe_5p625deg data/era5_5p625deg "--grid 32x64 --years 2"
