#!/usr/bin/env bash
# Usage: launch/posttrain.sh [--help] [--dry-run] [--smollm2] [section.key=value ...]
#
# Every algorithm of post-training from one checkpoint, on the CPU: runs configs/posttrain.yaml behind the stages of the
# quickstart, which it runs first where they are missing. Started again, it goes on where it was.
#   --smollm2  instead, what needs a pretrained model: reward model, best of N and PPO by it, self-rewarding, constitutional
#              AI on SmolLM2-135M-Instruct (configs/posttrain-smollm2.yaml), which it imports where it is missing
#
# Environment: as launch/quickstart.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

smollm2=false
while [[ ${1:-} == -* ]]; do
  if [[ $1 == --smollm2 ]]; then smollm2=true; else common_option "$1"; fi
  shift
done
cd "$root"
if $smollm2; then
  $dry_run || ensure_venv smollm2
  if [[ ! -f runs/smollm2/hf/config.json ]]; then
    (run "$venv/bin/python" -m llmtrain.model.hf smollm2 runs/smollm2/hf)
  fi
  run "$venv/bin/llmtrain" run configs/posttrain-smollm2.yaml "$@"
  exit
fi
$dry_run || ensure_venv data
if [[ ! -f runs/quickstart/sft/done.json ]]; then
  (run "$venv/bin/llmtrain" run configs/quickstart.yaml)
fi
run "$venv/bin/llmtrain" run configs/posttrain.yaml "$@"
