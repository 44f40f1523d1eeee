#!/usr/bin/env bash
# Runs one stage on this machine, on all devices that JAX sees.
#
#   launch/local.sh --config=configs/demo.py:stage=pseudo_labels --workdir=build/demo
#
# CUDA_VISIBLE_DEVICES=0,1 picks GPUs, PYTHON another interpreter. --dry-run prints the
# command and runs nothing. All other arguments go to mil_jax.main; relative paths start at
# the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/env.sh

dry_run=false
arguments=()
for argument in "$@"; do
    if [[ "$argument" == --dry-run ]]; then
        dry_run=true
    else
        arguments+=("$argument")
    fi
done

command=("$PYTHON" -m mil_jax.main ${arguments[@]+"${arguments[@]}"})
if "$dry_run"; then
    printf '%q ' "${command[@]}"
    echo
    exit
fi
# exec: a SIGTERM reaches the program itself, which then writes a checkpoint.
exec "${command[@]}"
