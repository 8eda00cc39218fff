#!/usr/bin/env bash
# Usage: launch/slurm_step.sh [--help] [--dry-run] [options of launch/torchrun.sh] COMMAND CONFIG.yaml [section.key=value ...]
#
# What launch/slurm.sbatch has srun start on each node: launch/torchrun.sh, with USR1 handed to the ranks and not to
# torchrun, which would give them 30 s, fail, and so end the other nodes. This way all ranks save, take the time they
# need, and end with the code for "start me again" (75).
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/common.sh"

case ${1:-} in
  -h | --help) usage; exit ;;
  --dry-run) exec bash "$here/torchrun.sh" "$@" ;;
esac
(trap '' USR1 && exec bash "$here/torchrun.sh" "$@") &
torchrun=$!
trap 'pkill -USR1 -P "$torchrun" || true' USR1
wait_for "$torchrun"
