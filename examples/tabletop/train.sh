#!/usr/bin/env bash
# From nothing to a policy like the one that ships: demonstrations, training, evaluation.
#   examples/tabletop/train.sh [FOLDER]
# Two cores: about half an hour, an hour and half an hour. Run again, it goes on where it stopped.
set -euo pipefail
here=$(dirname "$0")
out=${1:-out/tabletop}

pi0 demos --episodes 5000 --seed 300000 --out "$out/demos"
if [ ! -e "$out/run/checkpoints/010000" ]; then
  resume=()
  [ -e "$out/run/training_state.pt" ] && resume=(--resume)
  pi0 train "$here/model.toml" --data "$out/demos" --out "$out/run" --robot tabletop --execute 2 \
    --steps 10000 --batch-size 32 --draws 4 --learning-rate 1e-3 --final 0.03 --warmup 200 \
    --ema 0.998 --weight-decay 1e-4 --crop 1 --rotate 0 --colour 0.3 \
    --point aux.target_point@1 --point aux.object_points@0 \
    --aux aux.target_position@1 --aux aux.goal_position@1 --aux-weight 0.3 "${resume[@]}"
fi
if [ ! -e "$out/policy" ]; then
  pi0 convert "$out/run/last" "$out/policy" --to openpi --dtype bfloat16
fi
python "$here/../../benchmarks/success.py" "$out/policy" --tables tasks --out "$out/success"
