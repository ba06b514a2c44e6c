# shellcheck shell=bash
# What the scripts beside this one share; each of them says where the checkout is (SMOE_ROOT) and calls
# `train_recipe RECIPE DATA SYNTHETIC`. What is missing is one line on stderr and exit status 2, within seconds.
#
#   SMOE_DATA            folder (or file) of the data, in the store of docs/weather.md
#   SMOE_RUNS            folder of runs (default runs, where sbatch was called); the run goes to SMOE_RUNS/<name>
#   SMOE_ENV             a virtual environment, or a script to read (module load ..., conda activate ...); default .venv of
#                        the checkout, which launch/quickstart.sh makes
#   SMOE_ARGS            changes to the recipe, e.g. "training.batch=32 model.num_experts=512"
#   SMOE_SYNTHETIC=1     train on synthetic data; made by all tasks in SMOE_DATA where they are not there yet
#   SMOE_SYNTHETIC_ARGS  what to make, for `smoe-hpc data synthesize`, e.g. "--grid 32x64 --days 60"
#   SMOE_REQUEUE=0       a job that was asked to stop (time nearly up, preemption) saves, and does not go back into the queue
#   SMOE_ROOT            the checkout, where it is neither the folder in which sbatch was called nor the script's
#
# srun starts everything; nothing is reached by ssh. NCCL's variables are left as they are.

SHORT_LIMIT=600 # seconds: in a job that may run no longer, the warning (--signal) comes at once, and at each start again

LOOK_FOR_PACKAGES='
import importlib.util, sys
needed = ("torch", "deepspeed", "h5py", "omegaconf", "typer")
print(", ".join(name for name in needed if importlib.util.find_spec(name) is None))
sys.exit(sys.version_info < (3, 10))'
PRINT_VERSIONS='
import importlib.metadata, platform
versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "deepspeed", "h5py", "numpy")]
print(", ".join([f"python {platform.python_version()}", *versions]))'

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# shellcheck source-path=SCRIPTDIR
. "$(dirname "${BASH_SOURCE[0]}")/../launch/paths.sh"
expand_paths SMOE_DATA SMOE_RUNS SMOE_ENV

row() { printf '  %-12s %s\n' "$1" "${*:2}"; }

check_job() {
    [ -n "${SLURM_JOB_ID:-}" ] ||
        die "this is no Slurm job: submit the script with sbatch (bash launch/local_slurm.sh up starts a Slurm on one machine)"
    TASKS="${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))}"
    GPUS="${SLURM_GPUS_ON_NODE:-0}"
    if [ "$GPUS" != 0 ] && [ "$GPUS" != "$TASKS" ]; then
        die "$TASKS tasks and $GPUS GPUs a node: each task takes one GPU; give sbatch --ntasks-per-node=$GPUS --gpus-per-node=$GPUS"
    fi
    [ "$GPUS" != 0 ] || export CUDA_VISIBLE_DEVICES="" # a GPU that is there but not ours stays untouched
}

# use_environment: leaves python, with the checkout's package on its path.
use_environment() {
    local place="${SMOE_ENV:-$SMOE_ROOT/.venv}" found missing
    if [ -f "$place/bin/activate" ]; then
        place="$place/bin/activate"
    elif [ -x "$place/bin/python" ]; then # a conda environment
        PATH="$place/bin:$PATH"
        place=/dev/null
    elif [ ! -f "$place" ]; then
        die "no environment at $place: make it with $SMOE_ROOT/launch/quickstart.sh, or set SMOE_ENV to a virtual environment or a script to read"
    fi
    set +eu # other people's scripts
    # shellcheck source=/dev/null
    . "$place"
    set -eu
    export PYTHONPATH="$SMOE_ROOT${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
    found="$(command -v python)" || die "no python in ${SMOE_ENV:-$SMOE_ROOT/.venv}; set SMOE_ENV to another environment"
    missing="$(python -c "$LOOK_FOR_PACKAGES" 2>/dev/null)" || missing="a Python from 3.10 on"
    [ -z "$missing" ] || die "$found lacks $missing: set SMOE_ENV to an environment that has it, or pip install -e $SMOE_ROOT there"
    if [ "$GPUS" != 0 ]; then
        local seen
        seen="$(python -c 'import torch; print(torch.cuda.device_count())')" || seen=0
        [ "$seen" -ge "$GPUS" ] ||
            die "Slurm gives $GPUS GPUs a node and torch ($found) sees $seen: install torch for this driver, or train on CPUs with sbatch --gpus-per-node=0"
    fi
}

# choose_data DEFAULT SYNTHETIC_DEFAULT
choose_data() {
    if [ "${SMOE_SYNTHETIC:-0}" = 0 ]; then
        DATA="$(realpath -m "${SMOE_DATA:-$1}")"
        [ -e "$DATA" ] ||
            die "no data at $DATA: set SMOE_DATA to a folder of stores (docs/weather.md says how ERA5 is written into one), or try with SMOE_SYNTHETIC=1"
    else
        DATA="$(realpath -m "${SMOE_DATA:-$2}")"
    fi
    RUNS="$(realpath -m "${SMOE_RUNS:-runs}")"
    if ! mkdir -p "$RUNS" 2>/dev/null || [ ! -w "$RUNS" ]; then die "cannot write in $RUNS: set SMOE_RUNS to another folder"; fi
}

# forbid_endless_requeue: a time limit shorter than the warning would requeue the job at each start.
forbid_endless_requeue() {
    local words start end
    words="$(scontrol show job "$SLURM_JOB_ID" --oneliner 2>/dev/null)" || return 0
    [[ "$words" =~ \ StartTime=([0-9T:-]+)\ EndTime=([0-9T:-]+)\  ]] || return 0 # EndTime=Unknown: there is no limit
    start="$(date -d "${BASH_REMATCH[1]}" +%s)"
    end="$(date -d "${BASH_REMATCH[2]}" +%s)"
    if [ $((end - start)) -lt "$SHORT_LIMIT" ]; then
        export SMOE_REQUEUE=0
        row requeue "never: the time limit is below $((SHORT_LIMIT / 60)) minutes"
    fi
}

# every_task COMMAND...: runs it in every task of the job.
every_task() {
    # --export: the tasks get the environment as it is here, whatever sbatch was told (--export=NONE) or a site's profile says
    # (SBATCH_EXPORT); --mpi=none: they find each other by what srun says; --wait: where one ends, the others are not for ever
    srun --export=ALL --mpi=none --wait=120 --kill-on-bad-exit=0 "$@"
}

first_page() {
    local changes=""
    [ -z "$(git -C "$SMOE_ROOT" status --porcelain --untracked-files=no 2>/dev/null)" ] || changes=" with changes"
    echo "$(date --iso-8601=seconds) $1${SLURM_RESTART_COUNT:+, restart $SLURM_RESTART_COUNT}"
    row job "$SLURM_JOB_ID, $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), $TASKS tasks a node, $SRUN_CPUS_PER_TASK cores a task"
    if [ "$GPUS" = 0 ]; then row GPUs "none asked for: trains on the CPU"; else row GPUs "$GPUS a node"; fi
    row data "$DATA$([ "${SMOE_SYNTHETIC:-0}" = 0 ] || echo " (SYNTHETIC: its scores say nothing about the weather)")"
    row code "$SMOE_ROOT, commit $(git -C "$SMOE_ROOT" rev-parse --short HEAD 2>/dev/null || echo unknown)$changes"
    row python "$(command -v python), $(python -c "$PRINT_VERSIONS")"
    row Slurm "$(srun --version), restarts so far: ${SLURM_RESTART_COUNT:-0}"
    forbid_endless_requeue
}

# step WHAT COMMAND...: runs it in every task; where it does not end well, says so and ends the job with its status.
step() {
    local status=0
    every_task "${@:2}" || status=$?
    case "$status" in
    0) return ;;
    75) echo "$(date --iso-8601=seconds) $1 has stopped as asked; a requeued job goes on by itself, any other when it is submitted again" ;;
    *) echo "$(date --iso-8601=seconds) $1 failed with status $status; see above" >&2 ;;
    esac
    exit "$status"
}

# make_synthetic_data DEFAULT: files that are there already are kept; other data there than asked for are an error.
make_synthetic_data() {
    local what
    read -r -a what <<<"${SMOE_SYNTHETIC_ARGS:-$1}"
    echo "making synthetic data: ${what[*]}"
    step "making synthetic data" python -m smoe_hpc data synthesize "$DATA" --step 6 --channels rt38 "${what[@]}"
}

# train_recipe RECIPE DATA SYNTHETIC: DATA is where the data are looked for, SYNTHETIC what is made otherwise.
train_recipe() {
    local recipe="$1" changes own splits
    check_job
    choose_data "$2" "data/synthetic_${recipe##*_}"
    use_environment
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun does not take it from sbatch
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}"
    trap : TERM USR1 USR2 # the tasks answer them; this shell stays to see how they end
    first_page "$recipe"
    changes=("data.store=$DATA" "run.root=$RUNS")
    if [ "${SMOE_SYNTHETIC:-0}" != 0 ]; then
        make_synthetic_data "$3"
        splits="$(python -m smoe_hpc data splits "$DATA")" || die "the days of $DATA cannot be shared out; see above"
        mapfile -t -O "${#changes[@]}" changes <<<"$splits"
        changes+=("name=${recipe}_synthetic")
    fi
    read -r -a own <<<"${SMOE_ARGS:-}"
    changes+=("${own[@]}")
    row train "python -m smoe_hpc train $recipe ${changes[*]}"
    step "taking statistics" python -m smoe_hpc data statistics "$recipe" "${changes[@]}"
    step "$recipe" python -m smoe_hpc train "$recipe" "${changes[@]}"
    echo "$(date --iso-8601=seconds) $recipe has ended; runs are in $RUNS"
}
