#!/usr/bin/env bash
# Usage: launch/local.sh [--help] [--dry-run] [--ranks N] COMMAND CONFIG.yaml [section.key=value ...]
#
# Runs a command of llmtrain on N ranks of this machine, through torchrun. N: the number of GPUs, or 1 without any.
#
#   launch/local.sh --ranks 4 pretrain configs/pretrain/tiny.yaml parallel.pp=2 parallel.tp=2
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ranks=$(ranks_of_node)
while [[ ${1:-} == -* ]]; do
  case $1 in
    --ranks) ranks=$(number_option "$1" "${2:-}"); shift 2 ;;
    *) common_option "$1"; shift ;;
  esac
done
check_job "$@"
run "$(python_of_project)" -m torch.distributed.run --standalone --nproc-per-node "$ranks" -m llmtrain "$@"
