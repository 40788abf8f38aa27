#!/usr/bin/env bash
# The equal-compute table of docs/family.md and its images, from nothing. Can be killed and run again.
#
#   pip install -e '.[emoji,metrics,track]'; apt-get install fonts-noto-color-emoji
#   recipes/family/run.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ -f data/emoji/metadata.jsonl ]] || python recipes/emoji/prepare.py --out data/emoji --size 64
python recipes/family/family.py "$@"
