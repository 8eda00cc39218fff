#!/usr/bin/env bash
# Usage: launch/torchrun.sh [--help] [--dry-run] [options] COMMAND CONFIG.yaml [section.key=value ...]
#
# Runs a command of llmtrain over several nodes: start it once on every node, with the same arguments but for the node's
# rank. Node 0 is the one at the master address; the nodes find each other there (rendezvous c10d).
#
#   --nnodes N           number of nodes              (default: $NNODES, or 1)
#   --node-rank R        0 .. N-1                     (default: $NODE_RANK, or $SLURM_NODEID, or 0)
#   --master-addr HOST   name or address of node 0    (default: $MASTER_ADDR, or localhost)
#   --master-port PORT   a free port of node 0        (default: $MASTER_PORT, or 29500)
#   --ranks N            ranks on each node           (default: the number of GPUs, or 1 without any)
#   --max-restarts N     restarts after a failed rank, from the newest checkpoint (default: 0; a rank that was told to
#                        stop by USR1 counts as failed, so not under Slurm, which queues the job again)
#   --id NAME            tells jobs apart             (default: llmtrain)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

nnodes=${NNODES:-1} node_rank=${NODE_RANK:-${SLURM_NODEID:-0}}
addr=${MASTER_ADDR:-localhost} port=${MASTER_PORT:-29500}
ranks=$(ranks_of_node) max_restarts=0 id=llmtrain
while [[ ${1:-} == -* ]]; do
  case $1 in
    --nnodes) nnodes=$(number_option "$1" "${2:-}"); shift 2 ;;
    --node-rank) node_rank=$(text_option "$1" "${2:-}"); shift 2 ;;
    --master-addr) addr=$(text_option "$1" "${2:-}"); shift 2 ;;
    --master-port) port=$(number_option "$1" "${2:-}"); shift 2 ;;
    --ranks) ranks=$(number_option "$1" "${2:-}"); shift 2 ;;
    --max-restarts) max_restarts=$(number_option "$1" "${2:-}"); shift 2 ;;
    --id) id=$(text_option "$1" "${2:-}"); shift 2 ;;
    *) common_option "$1"; shift ;;
  esac
done
check_job "$@"
[[ $node_rank =~ ^[0-9]+$ && $node_rank -lt $nnodes ]] || die "node rank $node_rank: must be in 0 .. $((nnodes - 1))"
$dry_run || [[ $node_rank -ne 0 ]] || check_port "$port"

run "$(python_of_project)" -m torch.distributed.run \
  --nnodes "$nnodes" --node-rank "$node_rank" --nproc-per-node "$ranks" --max-restarts "$max_restarts" \
  --rdzv-backend c10d --rdzv-endpoint "$addr:$port" --rdzv-id "$id" --rdzv-conf "is_host=$((node_rank == 0))" \
  -m llmtrain "$@"
