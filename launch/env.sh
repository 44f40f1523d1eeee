# Sourced by local.sh and slurm.sh. Each line keeps what the caller has set already.
# shellcheck shell=bash

# The virtual environment of `make test`, if there is one.
if [[ -z "${PYTHON:-}" ]]; then
    if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi

# Share of each GPU's memory that JAX takes at its start. Its default of 0.75 is too little
# for a teacher and a student of 8B; cuDNN and NCCL need some of the rest.
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"

# Moves collectives so that they overlap with computation; matters from two GPUs on.
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"

# Compiled programs are kept, so that a resumed run starts without compiling again.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/mil_jax/jax}"

# NCCL says what failed instead of only that something failed.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
