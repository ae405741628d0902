#!/usr/bin/env bash
# One recipe on several machines with torchrun: FSDP2 or ZeRO-3. Run it on every one of them, each with its own NODE_RANK:
#
#     HEAD=10.0.0.1 NODE_RANK=0 launch/torchrun_2nodes.sh llama3_70b_math_qlora
#     HEAD=10.0.0.1 NODE_RANK=1 launch/torchrun_2nodes.sh llama3_70b_math_qlora train.learning_rate=1e-4
#
# The clone, the base and output_dir lie under the same path on all of them (a shared file system), and the overrides
# are the same too; a path in an override counts from the clone, where the job runs.
#
# Elastic: RESTARTS=3 starts all ranks again, up to three times, when one fails; they go on from the last checkpoint.
# NODES=1:2 goes on with the machines that are left when one is lost, which takes one of the RESTARTS on each of those;
# the machine HEAD cannot be spared, for they meet there. train.global_batch_size must divide by the ranks of one machine
# and of two.
#
#     HEAD=10.0.0.1 NODE_RANK=0 RESTARTS=3 NODES=1:2 launch/torchrun_2nodes.sh llama3_70b_math_qlora
#     HEAD=10.0.0.1 NODE_RANK=1 RESTARTS=3 NODES=1:2 launch/torchrun_2nodes.sh llama3_70b_math_qlora
#
# For these two: ADDRESS=10.0.0.2 is this machine's own address, where the others do not find it by its name; LAST_CALL is
# how many seconds those that are there wait for more machines (30); RDZV_CONF is more for torchrun's --rdzv-conf, as
# keep_alive_interval=1,keep_alive_max_attempt=3 with which a lost machine is given up after 3 s instead of 15.
set -euo pipefail

recipe=${1:?usage: HEAD=host NODE_RANK=n $0 recipe [section.key=value ...]}
shift
: "${HEAD:?the address of the machine with NODE_RANK=0}"

nodes=${NODES:-2}
: "${NODE_RANK:?0 on the machine HEAD, 1 on the second, ...}"
if [[ $nodes == *:* || ${RESTARTS:-0} -gt 0 ]]; then
    # Without is_host torchrun compares HEAD with the machine's own name, and an address it does not know itself by is
    # nobody's: then nobody listens there.
    conf=is_host=$([ "$NODE_RANK" = 0 ] && echo 1 || echo 0),last_call_timeout=${LAST_CALL:-30}
    meet=(--rdzv-backend c10d --rdzv-endpoint "$HEAD:${PORT:-29500}" --rdzv-id "${JOB:-nslora}"
        --rdzv-conf "$conf${RDZV_CONF:+,$RDZV_CONF}" ${ADDRESS:+--local-addr "$ADDRESS"})
else
    meet=(--master-addr "$HEAD" --master-port "${PORT:-29500}" --node-rank "$NODE_RANK")
fi

[ ! -f "$recipe" ] || recipe=$(realpath "$recipe")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec torchrun \
    --nnodes "$nodes" \
    --nproc-per-node "${GPUS:-8}" \
    --max-restarts "${RESTARTS:-0}" \
    "${meet[@]}" \
    launch/train.py --recipe "$recipe" "$@"
