#!/usr/bin/env bash
# Teaches the shipped model a new subject from twenty images, and measures what it learned and what it forgot.
#
#   pip install -e '.[emoji,lora,track]'; apt-get install fonts-noto-color-emoji
#   recipes/lora_subject/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
here=recipes/lora_subject runs=runs/lora_subject

[[ -f data/emoji/metadata.jsonl ]] || python recipes/emoji/prepare.py --out data/emoji
[[ -f data/lora_subject/prompts.jsonl ]] || python $here/prepare.py
tessera encode $here/codes.yaml
tessera encode $here/codes.yaml data.folder=data/lora_subject/known output=$runs/known
tessera encode $here/codes.yaml data.folder=data/lora_subject/known data.split=check output=$runs/check
tessera encode $here/codes.yaml data.folder=data/emoji data.split=tone output=$runs/tone
tessera finetune prior $here/lora.yaml
tessera merge emoji --lora $runs/lora/model --out $runs/bundle
for codes in codes check tone; do
  tessera evaluate prior pipelines/bundles/emoji/prior $runs/$codes
  tessera evaluate prior $runs/bundle/prior $runs/$codes
done
tessera evaluate pipeline $here/evaluate.yaml
tessera evaluate pipeline $here/evaluate.yaml model=$runs/bundle output=$runs/after
python $here/pictures.py $here/pictures.png
