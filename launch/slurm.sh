#!/usr/bin/env bash
#SBATCH --job-name=mil_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#
# Runs one stage on several nodes, one process per GPU. Submit it from the repository's root:
#
#   sbatch --nodes=4 launch/slurm.sh \
#       --config=configs/llama3_8b_mamba_50.py:stage=distill --workdir=runs/llama3_8b
#
# The tasks per node must equal the GPUs per node. --workdir must lie on a file system that
# all nodes share. `bash launch/slurm.sh --dry-run ...` prints the command of the job and
# runs nothing. All other arguments go to mil_jax.main.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
if [[ ! -f launch/env.sh ]]; then
    echo "error: submit this job from the root of the repository" >&2
    exit 2
fi
source launch/env.sh
source launch/dry_run.sh

# JAX reads the coordinator and the ranks from Slurm and gives each process the GPU of its
# local rank, so every task must see all GPUs of its node.
command=(
    srun --kill-on-bad-exit=1 --gpu-bind=none
    --cpus-per-task="${SLURM_CPUS_PER_TASK:-8}" # srun does not inherit it from sbatch
    "$PYTHON" -m mil_jax.main --distributed ${arguments[@]+"${arguments[@]}"}
)
run "${command[@]}"
