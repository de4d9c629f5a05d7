# shellcheck shell=bash
# What the job scripts of this folder share; they source it from the root of the checkout, inside a job.

set -euo pipefail
# shellcheck source=slurm/site.sh
source slurm/site.sh

fail() { # fail MESSAGE
    echo "error: $1" >&2
    exit 2
}

prepare() { # the environment of every job
    [ -n "${SLURM_JOB_ID:-}" ] || fail "this is a job script: submit it with sbatch"
    [ -x "$NT_VENV/bin/python" ] || fail "no Python in $NT_VENV/bin: run \`make install\`, or set NT_VENV in slurm/site.sh"
    if [ -n "${SBATCH_PARTITION:-}" ] && [ "$SBATCH_PARTITION" != "${SLURM_JOB_PARTITION:-}" ]; then
        echo "note: slurm/site.sh names partition $SBATCH_PARTITION, this job is in ${SLURM_JOB_PARTITION:-none}:" \
            "run \`. slurm/site.sh\` before sbatch" >&2
    fi
    # sbatch passes on its shell's variables, and those of another launcher would count more than srun's.
    unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
    # DeepSpeed looks for ninja on PATH.
    PATH="$(cd "$NT_VENV" && pwd)/bin:$PATH"
    export PATH PYTHONUNBUFFERED=1
    # Since 22.05 srun does not take this over from sbatch by itself.
    export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}"
    echo "[$(date '+%F %T')] job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), on ${SLURM_JOB_NODELIST:-?}"
}

rendezvous() { # where the ranks meet: the first node, a port of the job's own
    local hosts first
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    first=${hosts%%$'\n'*}
    # A node's name in SLURM need not be a name in the network.
    getent hosts "$first" >/dev/null || first=$(scontrol show node -o "$first" | grep -oP 'NodeAddr=\K\S+')
    export MASTER_ADDR="$first" MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000))
}

output_dir() { # output_dir FLAG...: the last --output_dir among the flags
    local found=""
    while [ $# -gt 0 ]; do
        case "$1" in
        --output_dir | --output-dir)
            found=${2:-}
            shift
            ;;
        --output_dir=* | --output-dir=*) found=${1#*=} ;;
        esac
        [ $# -eq 0 ] || shift
    done
    echo "$found"
}

requeue() { # requeue OUTPUT_DIR: sends this job back to the queue; SLURM ends the script meanwhile
    local job=$SLURM_JOB_ID restarts=${SLURM_RESTART_COUNT:-0}
    [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job="${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
    local how="submit it again with --output_dir $1"
    if [ "$restarts" -ge "$NT_MAX_RESTARTS" ]; then
        echo "error: the run is not done after $restarts restarts (NT_MAX_RESTARTS in slurm/site.sh); to go on, $how" >&2
        exit 1
    fi
    echo "[$(date '+%F %T')] back to the queue: restart $((restarts + 1)) of at most $NT_MAX_RESTARTS"
    if ! scontrol requeue "$job"; then
        echo "error: SLURM does not requeue job $job; to go on, $how" >&2
        exit 1
    fi
    exit 0
}

# Runs pipeline/train.py with these flags, one rank per task of the job, and ends the script. Before the time limit
# SLURM signals this shell alone (--signal=B:USR2@...), which passes it on through srun; the ranks save, leave REQUEUE
# and exit with 0. The marker files decide, since srun's exit code is a race where ranks end at different moments.
tune() { # tune FLAG...
    local out step="" before asked=0 cancelled=0 status=0
    prepare
    rendezvous
    out=$(output_dir "$@")
    mkdir -p "$out"
    # An earlier job may have left them.
    rm -f "$out/DONE" "$out/REQUEUE"
    trap 'asked=$((asked + 1)); echo "[$(date "+%F %T")] SLURM asks for the end: saving"; kill -USR2 "$step" || true' USR2
    # scancel, or a preemption after which SLURM itself requeues: the ranks hear it from SLURM.
    trap 'cancelled=1' TERM
    srun --kill-on-bad-exit=1 --unbuffered python pipeline/train.py "$@" &
    step=$!
    [ "$asked" -eq 0 ] || kill -USR2 "$step"
    # A trap interrupts `wait`: its answer is srun's only if no signal came meanwhile.
    while :; do
        before=$asked$cancelled
        wait "$step" && status=0 || status=$?
        [ "$before" = "$asked$cancelled" ] && break
    done
    if [ -e "$out/DONE" ]; then
        exit 0
    elif [ "$cancelled" -eq 1 ]; then
        echo "cancelled; to go on, submit it again with --output_dir $out" >&2
        exit 1
    elif [ -e "$out/REQUEUE" ]; then
        requeue "$out"
    elif [ "$asked" -gt 0 ] && [ "$status" -gt 128 ]; then
        # Python had not come so far as to watch for signals.
        requeue "$out"
    fi
    exit "$status"
}
