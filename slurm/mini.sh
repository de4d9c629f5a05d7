#!/usr/bin/env bash
# Tunes the embedded mini world on two nodes, one rank each, on the CPU or (--gpus-per-node=1) a GPU: a first look at
# whether a cluster, its network and slurm/site.sh are in order. Needs no data and no weights.
#
#     sbatch slurm/mini.sh
#     sbatch --gpus-per-node=1 slurm/mini.sh --max_steps 200
#SBATCH --job-name=nt-mini
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --time=00:30:00
#SBATCH --signal=B:USR2@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
source slurm/lib.sh || { echo "submit from the root of the checkout" >&2; exit 2; }

tune --preset mini --deepspeed ds_configs/z2.json --output_dir "$NT_RUNS/$SLURM_JOB_NAME-$SLURM_JOB_ID" "$@"
