#!/usr/bin/env bash
# A board's run in pieces of 8 minutes: the recipe small-data, then k-NN and linear on test, once (clean protocol).
#
#     until benchmarks/leaderboard.sh imagenette PATH; do [ $? -eq 75 ] || break; done     # train/ and test/ of classes
#     until benchmarks/leaderboard.sh grocery PATH; do [ $? -eq 75 ] || break; done
#
# With a GPU: ViT-S/16 at 224 px, 200 epochs, batches of 256, as in the published table of 28 methods. Without one grocery is
# what fits 30 CPU minutes at 64 px, on two processes of one thread, in bf16 where the CPU multiplies it. Exit code 75: the
# next piece is due.
set -euo pipefail
[ $# -ge 2 ] || { echo "error: name a board and its folder: benchmarks/leaderboard.sh imagenette|grocery PATH" >&2; exit 2; }
board=$1 data=$2 seed=${3:-0}
here=$(cd "$(dirname "$0")/.." && pwd)
common=(--data "$data" --seed "$seed" --minutes "${MINUTES:-8}")
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    out=runs/leaderboard/$board-224-$seed
    launch=(accelerate launch --mixed_precision bf16 "$here/train/pretrain.py")
    recipe=(--size small --image-size 224 --patch-size 16 --stem-width 64 --predictor-depth 3 --drop-path 0.1
            --epochs 200 --batch-size 256 --lr 5e-4)
    if [ "$board" = imagenette ]; then recipe+=(--colour 0.6); fi  # better on its val, far worse on groceries (EVIDENCE.md)
elif [ "$board" = grocery ]; then
    out=runs/leaderboard/$board-64-$seed
    export OMP_NUM_THREADS=1
    if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2> /dev/null; then export ACCELERATE_MIXED_PRECISION=bf16; fi
    launch=(torchrun --standalone --nproc_per_node 2 "$here/train/pretrain.py")
    recipe=(--epochs 62 --crops 10)
else
    echo "error: the board $board needs a GPU; grocery has a form for a CPU." >&2
    exit 2
fi
newest() { ls "$out/checkpoints" 2> /dev/null | tail -n 1 || true; }
if [ ! -f "$out/summary.json" ]; then
    code=0 before=$(newest)
    "${launch[@]}" small-data "${common[@]}" "${recipe[@]}" --out "$out" || code=$?
    # Launchers have exit codes of their own: a piece that ended with a new checkpoint is followed by another.
    [ "$(newest)" = "$before" ] || [ -f "$out/summary.json" ] || exit 75
    [ "$code" -eq 0 ] || exit "$code"
fi
for init in "" "--init random"; do
    for probe in knn linear; do
        # shellcheck disable=SC2086
        python "$here/eval/$probe.py" "$out" --data "$data" $init
    done
done
python "$here/eval/table.py" "$out"
