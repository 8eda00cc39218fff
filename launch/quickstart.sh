#!/usr/bin/env bash
# Usage: launch/quickstart.sh [--help] [--dry-run] [section.key=value ...]
#
# From real text to a small reasoning model on this machine: installs into .venv when needed, then runs
# configs/quickstart.yaml and writes runs/quickstart/report/index.html. Started again, it goes on where it was.
#
# Environment: PYTHON (3.11 or 3.12), LLMTRAIN_TORCH_INDEX (pip index for torch), LLMTRAIN_INDEX (for all the rest).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while [[ ${1:-} == -* ]]; do
  common_option "$1"
  shift
done
cd "$root"
$dry_run || ensure_venv data
if [[ $(gpu_count) -gt 0 && $(gpu_count) -lt 4 ]]; then
  note "the quickstart starts four ranks, one a GPU: with fewer GPUs it runs on the CPU"
  export CUDA_VISIBLE_DEVICES=
fi
run "$venv/bin/llmtrain" run configs/quickstart.yaml "$@"
