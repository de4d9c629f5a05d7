# shellcheck shell=bash
# This site's settings, in one place. Every script of this folder reads it inside its job. What concerns the queue has
# to be known when a job is submitted, so read it in the shell as well:
#
#     . slurm/site.sh && sbatch slurm/train_13b.sh
#
# A value that the environment has already counts instead of the one below.

# 1. The queue. sbatch reads these variables like options; options on its command line count more. Without them the
#    cluster's defaults are taken.
# export SBATCH_PARTITION="${SBATCH_PARTITION:-gpu}"
# export SBATCH_ACCOUNT="${SBATCH_ACCOUNT:-my_project}"
# export SBATCH_QOS="${SBATCH_QOS:-normal}"
# export SBATCH_CONSTRAINT="${SBATCH_CONSTRAINT:-a100_80}"

# 2. Software. DeepSpeed compiles what z2_offload, z3_offload, z3_quantized and z3_hpz need at their first start: that
#    takes a C++ compiler and, for the last two, the nvcc of the CUDA version that torch was built with.
# module purge && module load gcc/12 cuda/12.8
export NT_VENV="${NT_VENV:-.venv}" # virtual environment, on a file system that every node sees (`make install`)

# 3. Files, on a file system that every node sees.
export NT_LLAMA_7B="${NT_LLAMA_7B:-models/Llama-2-7b-hf}"
export NT_LLAMA_13B="${NT_LLAMA_13B:-models/Llama-2-13b-hf}"
export NT_CLIP="${NT_CLIP:-models/vit_l_14_openai.safetensors}"
export NT_MMUD="${NT_MMUD:-MMUD}"         # MMUD's pickles, and MergedImages/ with its pictures
export NT_SHARDS="${NT_SHARDS:-shards/mmud}" # what slurm/shard_mmud.sh makes of them
export NT_RUNS="${NT_RUNS:-runs}"         # each job gets a folder of its own in here

# 4. Restarts. A job that its time limit stops goes back to the queue at most so many times (SLURM counts preemptions
#    and failed nodes too).
export NT_MAX_RESTARTS="${NT_MAX_RESTARTS:-30}"

# 5. MLflow. Without a server each run has a database in its own folder.
# export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:-http://mlflow.example.org:5000}"

# 6. NCCL, the GPUs' communication. It finds its way by itself on most clusters; turn NCCL_DEBUG to INFO for one job and
#    read which network it took ("NET/IB" or "NET/Socket") before setting anything else.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# The interface for the first contact between nodes; needed where a node has several and the first is not routed to the
# others (then jobs hang at the start). The same for gloo.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# The InfiniBand cards to use, where some are for storage only.
# export NCCL_IB_HCA=mlx5_0,mlx5_1
# No InfiniBand, or it is broken: plain TCP, slow between nodes.
# export NCCL_IB_DISABLE=1
# GeForce cards (4090): their driver has no direct copies from card to card; where NCCL hangs or reports "peer access",
# say so.
# export NCCL_P2P_DISABLE=1
