#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Purpose:  train over several machines with SLURM.
# Hardware: 4 machines of 8 GPUs; not run.
# Run:      sbatch configuration/accelerate/slurm.sh stage2 configuration/recipes/stage2/geode_1.5b_8x80gb.yaml
#SBATCH --job-name=geode
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=96
#SBATCH --output=%x-%j.log
set -euo pipefail

STAGE=${1:?stage: alignment, stage1 or stage2}
RECIPE=${2:?the recipe}
shift 2
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# Single quotes: SLURM_NODEID is that of each machine.
srun --kill-on-bad-exit=1 bash -c 'accelerate launch \
    --config_file configuration/accelerate/multi_node_fsdp2.yaml \
    --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * $0))" \
    --machine_rank "$SLURM_NODEID" --main_process_ip "$1" --main_process_port 29500 \
    "trainers/$2.py" --config "$3" "${@:4}"' "$GPUS_PER_NODE" "$MASTER" "$STAGE" "$RECIPE" "$@"
