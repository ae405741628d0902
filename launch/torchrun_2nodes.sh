#!/usr/bin/env bash
# One recipe on several machines with torchrun: FSDP2 or ZeRO-3. Run it on every one of them, each with its own NODE_RANK:
#
#     HEAD=10.0.0.1 NODE_RANK=0 launch/torchrun_2nodes.sh llama3_70b_math_qlora
#     HEAD=10.0.0.1 NODE_RANK=1 launch/torchrun_2nodes.sh llama3_70b_math_qlora train.learning_rate=1e-4
#
# The clone, the base and output_dir lie under the same path on all of them (a shared file system), and the overrides
# are the same too.
set -euo pipefail

recipe=${1:?usage: HEAD=host NODE_RANK=n $0 recipe [section.key=value ...]}
shift
: "${HEAD:?the address of the machine with NODE_RANK=0}"
: "${NODE_RANK:?0 on the first machine, 1 on the second, ...}"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec torchrun \
    --nnodes "${NODES:-2}" \
    --nproc-per-node "${GPUS:-8}" \
    --node-rank "$NODE_RANK" \
    --master-addr "$HEAD" \
    --master-port "${PORT:-29500}" \
    launch/train.py --recipe "$recipe" "$@"
