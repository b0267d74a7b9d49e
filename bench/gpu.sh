#!/usr/bin/env bash
# What can only fail on a GPU, in four minutes on one: the tests marked `cuda`, and beside them the five recipes with quick settings.
# bench/gpu.sh 3 4 goes on with the notebooks' GPU cells for 3 minutes and with the grids of results/ for 4, ten processes at a time;
# notebooks and rows that have changed are copied into the folder $OUT, if it is set. 0 leaves a part out.
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

if [ "${1:-0}" != 0 ]; then "$py" -W ignore .ci/gpu.py --minutes "$1" --jobs "${JOBS:-10}" || failed=1; fi
if [ "${2:-0}" != 0 ]; then
    "$py" -W ignore -c 'import sys; from kdnb.evidence import gather; print(gather(float(sys.argv[1]), int(sys.argv[2])).to_string(index=False))' \
        "$2" "${JOBS:-10}" || failed=1
fi
if [ -n "${OUT:-}" ]; then
    cp -r --parents nbs/*.ipynb results/*/rows.jsonl "$OUT" 2>/dev/null
    (cd runs/evidence 2>/dev/null && tar cf "$OUT/evidence.tar" --exclude='*.safetensors' .)
fi
exit $failed
