#!/usr/bin/env bash
# What an hour on one GPU should answer, in the order of value:
#
#     benchmarks/gpu.sh                  # all parts that have not succeeded yet
#     benchmarks/gpu.sh kernels step_7b  # these parts, again if need be
#     benchmarks/gpu.sh --list           # the parts, their limits in seconds and their commands
#
# Each part is ended at its limit, and the next one begins. What a part prints is shown as it comes and kept in
# runs/gpu/<part>.log; runs/gpu/parts.csv gets a line for each (GPU, date, commit, versions, seconds, how it ended), and
# benchmarks that have a --csv add their own rows to benchmarks/results.csv. A part that succeeded is not run again, so
# that the same command goes on after a lost machine. PYTHON names the interpreter (.venv/bin/python), GPU_OUT the
# folder (runs/gpu). Ends with 1 if a part failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-.venv/bin/python}
# torch calls ninja by its name to build DeepSpeed's CPU Adam.
bin=$(cd "$(dirname "$(command -v "$PYTHON")")" && pwd)
export PATH="$bin:$PATH"
OUT=${GPU_OUT:-runs/gpu}
ROWS=benchmarks/results.csv
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
failed=0
list=0
chosen=()
for word in "$@"; do
    if [ "$word" = --list ]; then list=1; else chosen+=("$word"); fi
done
known=()

facts() { # GPU, memory in MiB, driver; then torch, CUDA, triton, transformers, deepspeed, bitsandbytes
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader,nounits 2>/dev/null | head -n 1
    "$PYTHON" -c '
import importlib.metadata as m
names = ("torch", "triton", "transformers", "deepspeed", "bitsandbytes", "liger_kernel")
have = {d.metadata["Name"].lower(): d.version for d in m.distributions()}
print(" ".join(f"{n} {have.get(n, None)}" for n in names))'
}

gpu_kind() { # the kind as plan.py names it, or nothing
    "$PYTHON" -c '
import torch
from pipeline.planning.gpus import of_device
kind = of_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
print(kind.name if kind else "")'
}

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 code=0 began state
    shift 2
    known+=("$name")
    if [ "$list" = 1 ]; then
        printf '%-14s %4s s  %s\n' "$name" "$limit" "$*"
        return
    fi
    if [ ${#chosen[@]} -gt 0 ]; then
        case " ${chosen[*]} " in *" $name "*) ;; *) return ;; esac
    elif [ -e "$OUT/$name.done" ]; then
        echo "== $name: done before, see $OUT/$name.log"
        return
    fi
    rm -f "$OUT/$name.done"
    echo "== $name: $* (at most $limit s)"
    began=$(date +%s)
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log" || code=${PIPESTATUS[0]}
    case $code in
    0) state="done" && touch "$OUT/$name.done" ;;
    124 | 137) state="ended at its limit" ;;
    *) state="failed with $code" ;;
    esac
    [ "$code" = 0 ] || failed=1
    echo "$(date -u +%FT%TZ),\"$gpu\",$commit,\"$versions\",$name,$(($(date +%s) - began)),$state" >>"$OUT/parts.csv"
    echo "== $name: $state after $(($(date +%s) - began)) s"
}

if [ "$list" = 0 ]; then
    mkdir -p "$OUT"
    { read -r gpu && read -r versions; } < <(facts) || { gpu="" versions=""; }
    if [ -z "$gpu" ] || [ -z "$versions" ]; then
        echo "gpu.sh: no GPU (nvidia-smi), or $PYTHON is no Python with the project's packages: make install" >&2
        exit 2
    fi
    commit=$(git describe --always --dirty 2>/dev/null || echo unknown)
    [ -s "$OUT/parts.csv" ] || echo "date,gpu,commit,versions,part,seconds,ended" >"$OUT/parts.csv"
    kind=$(gpu_kind)
    memory=$(echo "$gpu" | cut -d, -f2 | tr -d ' ')
    echo "$gpu; $versions; $commit"
else
    kind=GPU memory=100000
fi

# Do the kernels compute the right thing on hardware?
part kernels 480 "$PYTHON" -m pytest -q tests/test_sparse_vector.py tests/test_sparse_kernels.py tests/test_sparse_ops.py
# Does a whole run work on a GPU, in bf16?
part mini 240 "$PYTHON" pipeline/train.py --max_steps 60 --output_dir "$OUT/mini" --resume never
# The claim: a step at 7B's size beside its peers, and what the plan said of it.
if [ -e benchmarks/train_step.py ]; then
    part step_7b 420 "$PYTHON" benchmarks/train_step.py --size 7b --csv "$ROWS"
    if [ "$memory" -ge 39000 ]; then
        part step_13b 420 "$PYTHON" benchmarks/train_step.py --size 13b --gradient_checkpointing full --csv "$ROWS"
    fi
fi
# Do Liger's kernels and torch.compile compute the same, and do they help?
part speedups 180 "$PYTHON" -m pytest -q tests/test_speedups.py
part step_7b_fused 420 "$PYTHON" benchmarks/train_step.py --size 7b --liger --compile_layers --csv "$ROWS"
[ -z "$kind" ] || part plan_7b 60 "$PYTHON" pipeline/plan.py --preset 7b --gpu "$kind"
[ -z "$kind" ] || part plan_13b 60 "$PYTHON" pipeline/plan.py --preset 13b --gpu "$kind" --gradient_checkpointing full
# How long does an answer take?
if [ -e benchmarks/infer.py ]; then
    part infer_7b 300 "$PYTHON" benchmarks/infer.py --shape 7b --device cuda
fi
# What do the sparse kernels cost, alone and in a layer?
part layer 120 "$PYTHON" benchmarks/tuned_layer.py
part kernel_128 240 "$PYTHON" kernels/bench_sparse_vector.py --d 4096 --z 128
part layer_48 120 "$PYTHON" benchmarks/tuned_layer.py --batch 48
# Do bitsandbytes' kernels train, and DeepSpeed's CPU Adam?
part quantised 240 "$PYTHON" -m pytest -q -s tests/test_quantisation.py
part offload 180 "$PYTHON" pipeline/train.py --deepspeed ds_configs/z2_offload.json --max_steps 5 --output_dir "$OUT/z2_offload" --resume never
part offload_z3 180 "$PYTHON" pipeline/train.py --deepspeed ds_configs/z3_offload.json --max_steps 5 --output_dir "$OUT/z3_offload" --resume never
part kernel_fp16 300 "$PYTHON" kernels/bench_sparse_vector.py --d 4096 --z 128 --dtype fp16
# The shapes that are not timed by now. The last, so that the picture is of all shapes in bf16.
part kernel_times 780 "$PYTHON" kernels/bench_sparse_vector.py

for word in "${chosen[@]}"; do
    case " ${known[*]} " in
    *" $word "*) ;;
    *) echo "gpu.sh: there is no part $word; --list shows them" >&2 && failed=2 ;;
    esac
done
exit "$failed"
