#!/usr/bin/env bash
# Usage: launch/local.sh [--help] [--dry-run] [--ranks N] [--max-restarts N] COMMAND CONFIG.yaml [section.key=value ...]
#
# Runs a command of llmtrain on N ranks of this machine, through torchrun. N: the number of GPUs, or 1 without any.
# With --max-restarts, a rank that fails makes all start again from the newest checkpoint, at most so often.
#
#   launch/local.sh --ranks 4 pretrain configs/pretrain/tiny.yaml parallel.pp=2 parallel.tp=2
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ranks=$(ranks_of_node) max_restarts=0
while [[ ${1:-} == -* ]]; do
  case $1 in
    --ranks) ranks=$(number_option "$1" "${2:-}"); shift 2 ;;
    --max-restarts) max_restarts=$(number_option "$1" "${2:-}"); shift 2 ;;
    *) common_option "$1"; shift ;;
  esac
done
check_job "$@"
run "$(python_of_project)" -m torch.distributed.run --standalone --nproc-per-node "$ranks" \
  --max-restarts "$max_restarts" -m llmtrain "$@"
