#!/usr/bin/env bash
# Tunes LLaMA-2-13B on a node of eight GPUs; flags of pipeline/train.py may follow and count more than those below.
#
#     sbatch slurm/train_13b.sh
#     sbatch slurm/train_13b.sh --preflight                               # only look whether all is there
#     sbatch --nodes=2 slurm/train_13b.sh --global_batch 32               # sixteen GPUs
#     sbatch --ntasks-per-node=3 --gpus-per-node=3 slurm/train_13b.sh --global_batch 12
#     sbatch slurm/train_13b.sh --output_dir runs/nt-13b-1234             # go on with the run of job 1234
#
# --global_batch is 16, as the paper's 12 cannot be cut over eight GPUs.
#SBATCH --job-name=nt-13b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=6
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
source slurm/lib.sh || { echo "submit from the root of the checkout" >&2; exit 2; }

tune --preset 13b --deepspeed ds_configs/z2.json --output_dir "$NT_RUNS/$SLURM_JOB_NAME-$SLURM_JOB_ID" \
    --base "$NT_LLAMA_13B" --clip_weights "$NT_CLIP" --data "$NT_SHARDS" --global_batch 16 "$@"
