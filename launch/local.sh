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
source launch/dry_run.sh

run "$PYTHON" -m mil_jax.main ${arguments[@]+"${arguments[@]}"}
