#!/usr/bin/env bash
# A program of ring_jax over the hosts of a Slurm job, one process a GPU:
#
#     sbatch --nodes=2 examples/multi_host/slurm.sh examples/train_qwen3_5.py --config bundled --compute bfloat16 \
#         --data 2 --context 8 --out runs/slurm
#
# The program calls ring_jax.distributed.initialize() first; it needs no arguments here. The folder of --out lies on a file
# system that all hosts see. A process for each host with all of its GPUs works too: --ntasks-per-node=1.
#SBATCH --job-name=ring-jax
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
# Two minutes before the time is up all processes are told; the training example saves, ends and goes on when requeued.
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

[ $# -gt 0 ] || { echo "usage: sbatch [options] $0 script.py [arguments]" >&2; exit 2; }

# A requeued job goes on from its checkpoints.
resume=()
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then resume=(--resume); fi

# One process that fails ends all: the others would wait for it.
exec srun --kill-on-bad-exit=1 --label "${PYTHON:-python3}" -u "$@" "${resume[@]}"
