# Sourced by local.sh and slurm.sh: `arguments` are the caller's without --dry-run.
# shellcheck shell=bash

dry_run=false
arguments=()
for argument in "$@"; do
    if [[ "$argument" == --dry-run ]]; then
        dry_run=true
    else
        arguments+=("$argument")
    fi
done

# Turns into the command, or prints it. exec: a SIGTERM reaches the program itself, which
# then writes a checkpoint.
run() {
    if "$dry_run"; then
        printf '%q ' "$@"
        echo
    else
        exec "$@"
    fi
}
