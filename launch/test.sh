#!/usr/bin/env bash
# Usage: launch/test.sh [--help] [--dry-run] [--install-only] [pytest arguments]
#
# Installs what the tests need into .venv when needed, then runs ruff and pytest (all tests but the slow ones and those
# for a GPU: `launch/test.sh -m slow` runs the slow ones). Without arguments two processes share the files of tests.
#
# Environment: as launch/quickstart.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

limit_s=5400 # for all tests together, on a machine that other work slows down
install_only=false
while [[ ${1:-} =~ ^(-h|--help|--dry-run|--install-only)$ ]]; do
  if [[ $1 == --install-only ]]; then install_only=true; else common_option "$1"; fi
  shift
done
cd "$root"
$dry_run || ensure_venv data dev search smollm2
$install_only && exit 0
[[ $(gpu_count) -ge 8 ]] || export CUDA_VISIBLE_DEVICES= # tests start up to eight ranks, one a GPU
(run "$venv/bin/python" -m ruff check .)
[[ $# -gt 0 ]] || set -- -n 2 --dist loadfile --no-loadscope-reorder --durations 20 # one waits for its ranks half of the time
# INT, so that pytest stops what its tests started and still prints its summary
run timeout --signal=INT --kill-after=90 "$limit_s" "$venv/bin/python" -m pytest "$@"
