#!/usr/bin/env bash
# What can only fail on a GPU, in four minutes on one: the tests marked `cuda`, and beside them the five recipes with quick settings.
# PYTHON=python3 bench/gpu.sh uses another interpreter than .venv's; KDNB_DEVICE=cpu tries the script itself where there is no GPU.
set -u
cd "$(dirname "$0")/.."
export KDNB_DEVICE=${KDNB_DEVICE:-cuda} OMP_NUM_THREADS=1 MPLBACKEND=Agg PYTHONPATH=$PWD
[ "$KDNB_DEVICE" = cpu ] && export CUDA_VISIBLE_DEVICES=
py=${PYTHON:-.venv/bin/python} out=$(mktemp -d) failed=0
trap 'rm -rf "$out"' EXIT

"$py" -c 'import os, torch; raise SystemExit(os.environ["KDNB_DEVICE"]=="cuda" and not torch.cuda.is_available() and "PyTorch sees no GPU here.")' || exit 1

declare -A running
start() { name=$1; shift; timeout 230 "$@" >"$out/$name.log" 2>&1 & running[$name]=$!; }
for recipe in vbgs-kd prune-then-distill prue sequential vid; do
    start "$recipe" "$py" -c 'from kdnb.cli import main; raise SystemExit(main())' compress --recipe "$recipe" --data digits --quick --quiet --out "$out/$recipe"
done
start tests "$py" -m pytest -q -m cuda -p no:cacheprovider tests

for name in tests vbgs-kd prune-then-distill prue sequential vid; do
    if wait "${running[$name]}"; then echo "passed  $name   $(grep -E 'passed|skipped' "$out/$name.log" | tail -n 1)"
    else failed=1; echo "FAILED  $name"; tail -n 30 "$out/$name.log"; fi
done
exit $failed
