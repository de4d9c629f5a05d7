#!/usr/bin/env bash
# Packs MMUD into shards by an array of jobs: task i of n makes every n-th shard from the i-th on, the last to end joins
# them. Flags of pipeline/shard_mmud.py, if there are any, take the place of all those below.
#
#     sbatch slurm/shard_mmud.sh
#     sbatch --array=1-32 slurm/shard_mmud.sh
#     sbatch slurm/shard_mmud.sh --source refcoco --refcoco_root refer/refcoco+ --image_root images/train2014
#     NT_PARTS=8 sbatch --array=3,5 slurm/shard_mmud.sh                   # some parts of eight once more
#
# A part that was stopped goes on where it was when it is submitted again.
#SBATCH --job-name=nt-shards
#SBATCH --array=1-8
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
source slurm/lib.sh || { echo "submit from the root of the checkout" >&2; exit 2; }
prepare

part="$SLURM_ARRAY_TASK_ID/${NT_PARTS:-$SLURM_ARRAY_TASK_MAX}"
[ $# -gt 0 ] || set -- --source mmud --mmud_root "$NT_MMUD" --image_root "$NT_MMUD/MergedImages" --out "$NT_SHARDS"
srun python pipeline/shard_mmud.py --workers "${SLURM_CPUS_PER_TASK:-1}" --part "$part" "$@"
