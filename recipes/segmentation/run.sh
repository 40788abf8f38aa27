#!/usr/bin/env bash
# Images from segmentation maps, from nothing: data -> tokenizers of images and of maps -> codes of both ->
# PixelCNN -> bundle -> figures. Twenty minutes on two CPU cores; run it again and it resumes.
#
#   pip install -e '.[emoji,track]'; apt-get install fonts-noto-color-emoji
#   recipes/segmentation/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ -f data/segmentation/metadata.jsonl ]] || python recipes/segmentation/prepare_maps.py --out data/segmentation
tessera train tokenizer recipes/segmentation/map_tokenizer.yaml
tessera train tokenizer recipes/segmentation/tokenizer.yaml
tessera encode recipes/segmentation/codes.yaml
tessera train prior recipes/segmentation/prior.yaml
tessera bundle runs/segmentation/bundle --image-tokenizer runs/segmentation/tokenizer/model \
  --segmentation-tokenizer runs/segmentation/map_tokenizer/model --prior runs/segmentation/prior/model \
  --guidance-scale 1.5
python recipes/segmentation/evaluate.py runs/segmentation/bundle --sheet recipes/segmentation/pictures.png
tessera generate --model runs/segmentation/bundle --segmentation data/segmentation/maps/0100.png -o out/segmentation
