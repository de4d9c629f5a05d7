#!/usr/bin/env bash
# Tunes LLaMA-2-7B on a node of four GPUs of 24 GB or more; flags of pipeline/train.py may follow and count more than
# those below.
#
#     sbatch slurm/train_7b.sh
#     sbatch slurm/train_7b.sh --mechanism released --seed 1
#     sbatch slurm/train_7b.sh --output_dir runs/nt-7b-1234               # go on with the run of job 1234
#SBATCH --job-name=nt-7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=6
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR2@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
source slurm/lib.sh || { echo "submit from the root of the checkout" >&2; exit 2; }

tune --preset 7b --deepspeed ds_configs/z2.json --output_dir "$NT_RUNS/$SLURM_JOB_NAME-$SLURM_JOB_ID" \
    --base "$NT_LLAMA_7B" --clip_weights "$NT_CLIP" --data "$NT_SHARDS" "$@"
