#!/usr/bin/env bash
# Goes on from published weights on your own photos, and compares with those weights on val and test.
#
#     bash examples/go_on.sh PHOTOS                                  # a ViT-Ti/16 of timm, which is downloaded
#     bash examples/go_on.sh PHOTOS OWNER/NAME --size small          # a repository of the Hub, and its --size
#
# The learning rate is lower than for new weights. If the last report says "worse than start", use the start as it is.
set -euo pipefail
photos=$1 init=${2:-timm:vit_tiny_patch16_224}
shift $(($# < 2 ? $# : 2))
(($#)) || set -- --size tiny --patch-size 16 --tokenizer patch
out=${OUT:-runs/go-on}
accelerate launch train/pretrain.py small-data --data "$photos" --init "$init" --out "$out" --lr 1e-4 "$@"
accelerate launch eval/knn.py "$out" --data "$photos" --init random # the start
accelerate launch eval/knn.py "$out" --data "$photos"
python eval/table.py "$out"
