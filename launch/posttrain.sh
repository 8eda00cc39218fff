#!/usr/bin/env bash
# Usage: launch/posttrain.sh [--help] [--dry-run] [section.key=value ...]
#
# Every algorithm of post-training from one checkpoint, on the CPU: runs configs/posttrain.yaml behind the stages of the
# quickstart, which it runs first where they are missing. Started again, it goes on where it was.
#
# Environment: as launch/quickstart.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while [[ ${1:-} == -* ]]; do
  common_option "$1"
  shift
done
cd "$root"
# shellcheck disable=SC2119 # no extras
$dry_run || ensure_venv
if [[ ! -f runs/quickstart/sft/done.json ]]; then
  (run "$venv/bin/llmtrain" run configs/quickstart.yaml)
fi
run "$venv/bin/llmtrain" run configs/posttrain.yaml "$@"
