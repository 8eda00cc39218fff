#!/usr/bin/env bash
# Usage: launch/verifiers.sh [--help] [--dry-run]
#
# Installs the library verifiers into .venv-verifiers, an environment of its own, so that its versions never meet those of
# the trainer: for rollout.agent, whose key python names it. launch/verifiers.txt lists what it needs, no torch. An
# environment that is a package goes beside it: .venv-verifiers/bin/python -m pip install NAME. Instant when it is there.
#
# Environment: as launch/quickstart.sh.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

while [[ $# -gt 0 ]]; do
  common_option "$1"
  shift
done
venv=$root/.venv-verifiers
needed=$root/launch/verifiers.txt
install() { pip_step -r "$needed"; }

own_venv verifiers rollout.agent.python "$needed" verifiers
