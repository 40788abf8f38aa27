#!/usr/bin/env bash
# Digits by class from nothing: data -> image tokenizer -> codes -> GPT and PixelCNN -> bundles -> figures. Some minutes
# on a CPU core; run it again and it resumes.
#
#   pip install -e '.[digits,track]'; recipes/digits/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

[[ -f data/digits/metadata.jsonl ]] || python recipes/digits/prepare.py --out data/digits
tessera train tokenizer recipes/digits/tokenizer.yaml
tessera encode recipes/digits/codes.yaml
for prior in gpt pixelcnn; do
  tessera train prior "recipes/digits/prior_$prior.yaml"
  tessera bundle "runs/digits/bundle_$prior" --image-tokenizer runs/digits/tokenizer/model \
    --prior "runs/digits/$prior/model" --guidance-scale 1.5
  python recipes/digits/evaluate.py "runs/digits/bundle_$prior" --sheet "recipes/digits/$prior.png"
done
tessera generate --model runs/digits/bundle_gpt --class 7 --class 3 -o out/digits
