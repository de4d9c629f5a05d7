#!/usr/bin/env bash
# Scores a run's newest checkpoint on the test split, on one GPU or several; flags of pipeline/evaluate_mmud.py may
# follow and count more than those below.
#
#     sbatch slurm/evaluate.sh --checkpoint runs/nt-13b-1234
#     sbatch slurm/evaluate.sh --checkpoint runs/nt-13b-1234/checkpoint-20000 --split valid --report_dir runs/valid
#     sbatch --ntasks=4 --gpus-per-node=4 slurm/evaluate.sh --checkpoint runs/nt-13b-1234
#SBATCH --job-name=nt-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
source slurm/lib.sh || { echo "submit from the root of the checkout" >&2; exit 2; }
prepare
rendezvous

srun python pipeline/evaluate_mmud.py --split test --condition all "$@"
