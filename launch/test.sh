#!/usr/bin/env bash
# Usage: launch/test.sh [--help] [--dry-run] [--install-only] [--without-vllm] [pytest arguments]
#
# Installs what the tests need into .venv when needed, then runs ruff and pytest (all tests but the slow ones and those
# for a GPU: `launch/test.sh -m slow` runs the slow ones). Without arguments two processes share the files of tests.
# On a machine without a GPU launch/vllm.sh makes .venv-vllm too, unless --without-vllm: then the tests of vLLM, which
# are made for its CPU build, are skipped, as they are with a GPU.
#
# Environment: as launch/quickstart.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

limit_s=5400 # for all tests together, on a machine that other work slows down
install_only=false
with_vllm=true
while [[ ${1:-} =~ ^(-h|--help|--dry-run|--install-only|--without-vllm)$ ]]; do
  case $1 in
    --install-only) install_only=true ;;
    --without-vllm) with_vllm=false ;;
    *) common_option "$1" ;;
  esac
  shift
done
cd "$root"
$dry_run || ensure_venv data dev search smollm2
if ! $dry_run && $with_vllm && [[ $(gpu_count) -eq 0 ]]; then
  bash launch/vllm.sh || die "launch/vllm.sh failed, see above (--without-vllm leaves it and its tests out)"
fi
$install_only && exit 0
[[ $(gpu_count) -ge 8 ]] || export CUDA_VISIBLE_DEVICES= # tests start up to eight ranks, one a GPU
(run "$venv/bin/python" -m ruff check .)
[[ $# -gt 0 ]] || set -- -n 2 --dist loadfile --no-loadscope-reorder --durations 20 # one waits for its ranks half of the time
# INT, so that pytest stops what its tests started and still prints its summary
run timeout --signal=INT --kill-after=90 "$limit_s" "$venv/bin/python" -m pytest "$@"
