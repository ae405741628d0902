#!/usr/bin/env bash
# One recipe on several machines with DeepSpeed's launcher, which reaches them by pdsh (apt install pdsh)
# over ssh without a password. Run it on one:
#
#     launch/deepspeed_hostfile.sh my_hostfile llama3_70b_math
#     launch/deepspeed_hostfile.sh my_hostfile llama3_70b_math train.micro_batch_size=2
#
# The hostfile lists the machines and their GPUs, as in launch/hostfile.example. Clone, environment, base and output_dir
# lie under the same path on all of them. Variables that every machine needs go into ~/.deepspeed_env, NAME=value a line.
# A path in an override counts from the clone, where the job runs.
#
# A job that failed, or was stopped, is continued by the same command; DeepSpeed's launcher does not restart one itself.
# To stop it, send SIGTERM to its ranks or press Ctrl-C: SIGTERM to the deepspeed command alone, on one machine, ends that
# and tells nobody; the ranks see it and end without a checkpoint (docs/troubleshooting.md).
set -euo pipefail

hostfile=${1:?usage: $0 hostfile recipe [section.key=value ...]}
recipe=${2:?usage: $0 hostfile recipe [section.key=value ...]}
shift 2
[ -r "$hostfile" ] || { echo "error: hostfile $hostfile: cannot be read" >&2; exit 2; }
hostfile=$(realpath "$hostfile")

[ ! -f "$recipe" ] || recipe=$(realpath "$recipe")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec deepspeed --hostfile "$hostfile" launch/train.py --recipe "$recipe" "$@"
