#!/usr/bin/env bash
# Pictures from segmentation maps, from nothing: data -> tokenizers of pictures and of maps -> codes of both ->
# PixelCNN -> bundle -> figures. A quarter of an hour on a CPU core; started again, it goes on where it stopped.
#
#   pip install -e '.[emoji,track]'; apt-get install fonts-noto-color-emoji
#   recipes/segmentation/run.sh            the figures of README.md
#   recipes/segmentation/run.sh long       20,000 steps of the tokenizers, 12,000 of a larger prior
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
tokenizer=() prior=()
if [[ ${1:-short} == long ]]; then
  tokenizer=(run.steps=20000) prior=(run.steps=12000 model.dim=192 model.depth=10)
fi

[[ -f data/segmentation/metadata.jsonl ]] || python recipes/segmentation/prepare_maps.py --out data/segmentation
tessera train tokenizer recipes/segmentation/map_tokenizer.yaml "${tokenizer[@]}"
tessera train tokenizer recipes/segmentation/tokenizer.yaml "${tokenizer[@]}"
tessera encode recipes/segmentation/codes.yaml
tessera train prior recipes/segmentation/prior.yaml "${prior[@]}"
tessera bundle runs/segmentation/bundle --image-tokenizer runs/segmentation/tokenizer/model \
  --segmentation-tokenizer runs/segmentation/map_tokenizer/model --prior runs/segmentation/prior/model \
  --guidance-scale 1.5
python recipes/segmentation/evaluate.py runs/segmentation/bundle --sheet recipes/segmentation/pictures.png
tessera generate --model runs/segmentation/bundle --segmentation data/segmentation/maps/0100.png -o out/segmentation
