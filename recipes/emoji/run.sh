#!/usr/bin/env bash
# The shipped bundle from nothing: font -> images -> text tokenizer, reranker, image tokenizer, codes, prior -> bundle
# -> figures. Every step can be killed and run again; trainings resume from their newest checkpoint.
#
#   pip install -e '.[emoji,track]'; apt-get install fonts-noto-color-emoji
#   recipes/emoji/run.sh              two CPU cores, 64x64 pixels, some hours
#   recipes/emoji/run.sh gpu          an NVIDIA GPU, 128x128 pixels
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
size=64 reranker=() tokenizer=() prior=() names=() details=() patches=() patch_prior=() backgrounds=()
if [[ ${1:-cpu} == gpu ]]; then
  size=128
  reranker=(model.vision_cfg.image_size=128 run.batch_size=1024 run.steps=6000 run.num_workers=8)
  tokenizer=(model.image_size=128 model.trunk.patch_size=2 'model.trunk.multipliers=[1,2,2]' loss.decoder_only_from=40000
    loss.perceptual_from=40000 loss.adversarial_from=40000 run.steps=60000 run.batch_size=128 run.num_workers=12)
  prior=(run.batch_size=512 run.steps=30000)
  names=(run.batch_size=512 run.steps=3000)
  details=(run.batch_size=1024 run.steps=6000 run.num_workers=8)
  patches=(model.image_size=128 loss.decoder_only_from=40000 loss.perceptual_from=40000 loss.adversarial_from=40000
    run.steps=60000 run.batch_size=128 run.num_workers=12)
  patch_prior=(run.batch_size=512 run.steps=30000)
  backgrounds=(run.batch_size=512 run.steps=8000)
else
  # Two threads that a scheduler puts on one core are slower than one.
  export OMP_PROC_BIND=true OMP_PLACES=cores
fi

[[ -f data/emoji/metadata.jsonl ]] || python recipes/emoji/prepare.py --out data/emoji --size "$size"
[[ -f runs/emoji/text_tokenizer/tokenizer.json ]] || tessera train text-tokenizer recipes/emoji/text_tokenizer.yaml
tessera train reranker recipes/emoji/reranker.yaml "${reranker[@]}"
tessera train tokenizer recipes/emoji/tokenizer.yaml "${tokenizer[@]}"
tessera encode recipes/emoji/codes.yaml
tessera train prior recipes/emoji/prior.yaml "${prior[@]}"
# Then mostly names: the same data, with most of the sampling weight on plain images.
[[ -f data/emoji-names/metadata.jsonl ]] || python recipes/emoji/prepare.py --out data/emoji-names --size "$size" --shares 85 5.5 2.7 6.8 --times 0.21
tessera encode recipes/emoji/codes.yaml data.folder=data/emoji-names output=runs/emoji/codes-names
tessera train prior recipes/emoji/prior_names.yaml "${names[@]}"
# Training on names alone loses unseen skin tones and colours; an average of the two priors keeps most of both.
python recipes/emoji/average.py runs/emoji/prior/model runs/emoji/prior-names/model runs/emoji/prior-average --share 0.6 \
  --text-tokenizer runs/emoji/text_tokenizer
# Codes of single patches, and a prior over them that starts from the text embeddings and blocks of the first one, on half
# as many images more. What it learns of a glyph then holds at any place.
[[ -f data/emoji-longer/metadata.jsonl ]] || python recipes/emoji/prepare.py --out data/emoji-longer --size "$size" --shares 44 27 8 21 --times 1.5
tessera train reranker recipes/emoji/reranker_details.yaml "${details[@]}"
tessera train tokenizer recipes/emoji/tokenizer_patches.yaml "${patches[@]}"
tessera encode recipes/emoji/codes.yaml data.folder=data/emoji-longer image_tokenizer=runs/emoji-patches/tokenizer/model \
  output=runs/emoji-patches/codes
tessera train prior recipes/emoji/prior_patches.yaml "${patch_prior[@]}"
# Then mostly backgrounds, and again an average of before and after.
if [[ ! -f data/emoji-backgrounds/metadata.jsonl ]]; then
  python recipes/emoji/prepare.py --out data/emoji-backgrounds --size "$size" --shares 20 65 4 11 --times 1.5
fi
tessera encode recipes/emoji/codes.yaml data.folder=data/emoji-backgrounds \
  image_tokenizer=runs/emoji-patches/tokenizer/model output=runs/emoji-patches/codes-backgrounds
tessera train prior recipes/emoji/prior_backgrounds.yaml "${backgrounds[@]}"
python recipes/emoji/average.py runs/emoji-patches/prior/model runs/emoji-patches/prior-backgrounds/model \
  runs/emoji-patches/prior-average --share 0.7 --text-tokenizer runs/emoji/text_tokenizer
tessera bundle runs/emoji/bundle --guidance-scale 1.5 --plausibility 0.05 --temperature 0.6 --likelihood-weight 0.002 \
  --image-tokenizer runs/emoji-patches/tokenizer/model \
  --prior runs/emoji-patches/prior-average --text-tokenizer runs/emoji/text_tokenizer --reranker runs/emoji/reranker-details/model
for split in train tone gender pair; do
  tessera evaluate tokenizer runs/emoji-patches/tokenizer/model data/emoji --split "$split"
done
tessera evaluate pipeline recipes/emoji/evaluate.yaml model=runs/emoji/bundle
