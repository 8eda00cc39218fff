#!/usr/bin/env bash
# Usage: launch/deepspeed.sh [--help] [--dry-run] [options] COMMAND CONFIG.yaml [section.key=value ...]
#
# Runs a command of llmtrain through DeepSpeed's own launcher: on this machine, or over the machines of a hostfile, which
# it reaches by ssh (pdsh). Under Slurm, launch/slurm.sbatch is the better choice.
#
#   --ranks N            ranks on each node (default: the number of GPUs, or 1 without any)
#   --hostfile FILE      lines of the form: HOST slots=N
#   --master-addr HOST   node 0 (default: the first host of the hostfile)
#   --master-port PORT   a free port of node 0 (default: $MASTER_PORT, or 29500)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ranks=$(ranks_of_node) port=${MASTER_PORT:-29500} options=()
while [[ ${1:-} == -* ]]; do
  case $1 in
    --ranks) ranks=$(number_option "$1" "${2:-}"); shift 2 ;;
    --hostfile) value=$(text_option "$1" "${2:-}"); options+=(--hostfile "$value"); shift 2 ;;
    --master-addr) value=$(text_option "$1" "${2:-}"); options+=(--master_addr "$value"); shift 2 ;;
    --master-port) port=$(number_option "$1" "${2:-}"); shift 2 ;;
    *) common_option "$1"; shift ;;
  esac
done
check_job "$@"
[[ ${options[0]:-} != --hostfile || -f ${options[1]} ]] || die "${options[1]}: no such hostfile"

run "$(python_of_project)" -m deepspeed.launcher.runner "${options[@]}" \
  --num_accelerators "$ranks" --master_port "$port" --no_local_rank --module llmtrain "$@"
