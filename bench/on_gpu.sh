#!/usr/bin/env bash
# Everything that wants a GPU, in one command that takes less than 9 minutes.
#
#   bench/on_gpu.sh OUT [--dry] [--only STAGE,...]
#
# OUT gets device.txt, tests.txt, main_job.json, kernels.json, end_to_end.json and overlap.json, and each table comes on
# standard output. Stages are tests, main, kernels, end_to_end and overlap, in this order: what 9 minutes have no room for
# is left out, and another run with --only makes up for it. Needs a python ($PYTHON, by default python3) with the packages
# of pyproject.toml, pytest and, for a GPU, torch's CUDA build, and 15 GB in $TMPDIR and as much free memory.
# --dry goes the same way on a CPU: tiny shapes, kernels in Triton's interpreter.
set -euo pipefail

usage="usage: bench/on_gpu.sh OUT [--dry] [--only STAGE,...]"
out=${1:?$usage}
shift
dry="" only=tests,main,kernels,end_to_end,overlap
while (($#)); do
  case $1 in
    --dry) dry=--dry ;;
    --only) only=${2:?$usage}; shift ;;
    *) echo "unknown option $1; $usage" >&2; exit 2 ;;
  esac
  shift
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# The package as it lies here, installed or not: its kernels are in a folder of another name.
mkdir "$scratch/site"
cp -r streamprune "$scratch/site/streamprune"
cp -r kernels/src "$scratch/site/streamprune/kernels"
mkdir "$scratch/site/streamprune-0.dist-info"  # a run writes its version into streamprune.json
printf 'Metadata-Version: 2.1\nName: streamprune\nVersion: 0\n' > "$scratch/site/streamprune-0.dist-info/METADATA"
export PYTHONPATH="$scratch/site" PYTHONSAFEPATH=1  # safe: not from the current directory, which has no kernels

if [[ -n $dry ]]; then
  limit=3600 device=cpu layers=8 repeat=1 model=135M tokens=(--tokens 128)
  tests=(tests/kernel/test_grad_norm.py -k "strided or nothing")
else
  limit=530 device=cuda layers=24 repeat=1 model=13B tokens=(--tokens 128 --tokens 1280 --tokens 12800)
  tests=(tests/kernel tests/streaming/test_cuda.py
    --deselect tests/kernel/test_machine_code.py -o faulthandler_timeout=60)  # what hangs says where
  # Most of the tests' time goes into compiling kernels, and into what they are compared with on the CPU.
  "$python" -c 'import xdist' 2>/dev/null && tests+=(-n 8)
  "$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU; --dry runs without one"'
fi
"$python" - <<'PY' | tee "$out/device.txt"
import platform, torch
from streamprune.kernels.launch import triton
name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
print(f"{name}; torch {torch.__version__}; triton {getattr(triton, '__version__', 'absent')}")
PY

status=0
left() { echo $((limit - SECONDS)); }
stage() {  # one that fails does not keep the others from running
  [[ ,$only, == *,$1,* ]] || return 0
  echo "== $1"
  local seconds
  seconds=$(left)
  if ((seconds < 30)); then
    echo "left out: $seconds s are left; --only $1 measures it"
    return
  fi
  # Tests that hang leave time for the others.
  if [[ $1 == tests ]] && ((seconds > 240)); then seconds=240; fi
  # Interrupted, tests still say which of them failed.
  timeout -k 10 -s INT "$seconds" env ${threads:+OMP_NUM_THREADS=$threads} "$python" "${@:2}" || status=1
}
threads=1 stage tests -m pytest -q -p no:cacheprovider -p no:benchmark "${tests[@]}" > >(tee "$out/tests.txt")
stage main bench/main_job.py --scratch "$scratch" --seconds "$(($(left) - 15))" $dry --json "$out/main_job.json"
stage kernels bench/kernels.py --gpu --model "$model" $dry --json "$out/kernels.json"
stage end_to_end bench/end_to_end.py --scratch "$scratch" --layers "$layers" --repeat "$repeat" --device "$device" \
  --keep "$scratch/model" $dry --json "$out/end_to_end.json"
if [[ -d $scratch/model ]]; then
  stage overlap bench/overlap.py --model "$scratch/model" --device "$device" "${tokens[@]}" --repeat 3 \
    --json "$out/overlap.json"
else
  echo "overlap: left out, for want of the checkpoint that end_to_end makes"
fi
exit $status
