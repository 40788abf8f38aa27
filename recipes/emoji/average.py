"""A prior between two of the same shape: each weight (1 - SHARE) of the first's and SHARE of the second's.

    python recipes/emoji/average.py runs/emoji/prior/model runs/emoji/prior-names/model runs/emoji/prior-average

Between a prior and one that was trained on from it lie priors that keep what the first was better at and most of what
the second has learned (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models", section 3).
"""

import argparse
from pathlib import Path

import torch

from stage2_prior import load_prior
from tessera.text import TextTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, default=0.5, help="of the second, between 0 and 1 (default: 0.5)")
    parser.add_argument("--text-tokenizer", type=Path, help="where neither folder has one, nor the folder beside it")
    arguments = parser.parse_args()
    tokenizer = arguments.text_tokenizer and TextTokenizer.from_pretrained(arguments.text_tokenizer)
    first, second = (load_prior(folder, tokenizer) for folder in (arguments.first, arguments.second))
    if first.config != second.config:
        parser.error(f"{arguments.first} and {arguments.second} are priors of different configs")
    others, share = first.state_dict(), arguments.share
    weights = {name: (1 - share) * others[name].float() + share * one for name, one in second.state_dict().items()}
    second.load_state_dict(weights)
    second.save_pretrained(arguments.out, dtype=torch.float16, max_shard_size="15MB")


if __name__ == "__main__":
    main()
