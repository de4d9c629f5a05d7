#!/usr/bin/env bash
# Runs a study of pipeline/ablate.py by an array of jobs, one GPU each: task i of n makes every n-th run from the i-th on.
# The study and its flags may follow.
#
#     sbatch slurm/ablate.sh table4
#     sbatch --array=1-6 slurm/ablate.sh baselines --seeds 0,1
#     python pipeline/ablate.py table4 --table_only                       # the table, when all have ended
#
# A part that was stopped goes on where it was when it is submitted again. One beyond the study's last run has nothing to
# do.
#SBATCH --job-name=nt-ablate
#SBATCH --array=1-20
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=6
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
source slurm/lib.sh || { echo "submit from the root of the checkout" >&2; exit 2; }
prepare

[ $# -gt 0 ] || set -- table4
# Without a step of srun: the trainings that it starts are processes of their own, not ranks.
python pipeline/ablate.py "$1" --part "$SLURM_ARRAY_TASK_ID/${NT_PARTS:-$SLURM_ARRAY_TASK_MAX}" "${@:2}"
