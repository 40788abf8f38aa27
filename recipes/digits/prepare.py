"""scikit-learn's real digits as a data folder: 1,797 handwritten digits of 8x8 pixels (UCI, Alpaydin & Kaynak 1998).

    python recipes/digits/prepare.py --out data/digits

Two of three, 1,198, are for the models (split `train`); the others (`test`) are for the judge of evaluate.py.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from tessera.errors import InputError
from tessera.weights.writing import own_folder


def main() -> int:
    parser = argparse.ArgumentParser(description="Write scikit-learn's digits as a data folder.")
    parser.add_argument("--out", type=Path, default=Path("data/digits"), help="folder to write (default: data/digits)")
    out: Path = parser.parse_args().out
    try:
        own_folder(out, "digits")
    except InputError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    digits = load_digits()
    rows = []
    for number, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        file, split = f"{number:04d}.png", "test" if number % 3 == 2 else "train"
        Image.fromarray(np.rint(values * (255 / 16)).astype(np.uint8)).save(out / file)  # values are 0 to 16
        rows.append({"file_name": file, "label": int(label), "split": split})
    (out / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{out}: {len(rows)} digits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
