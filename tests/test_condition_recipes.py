"""The recipes of classes and of maps: their files are recipes, and the judge of maps finds what is in a picture."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage1_tokenizer.train import TokenizerRecipe
from stage2_prior.encode import EncodeRecipe
from stage2_prior.train import PriorRecipe
from tessera.config import read_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
sys.path.insert(0, str(RECIPES / "segmentation"))  # its scripts import each other by their bare names
labels = importlib.import_module("labels")
BACKGROUND, COLOURS, LIGHT = labels.BACKGROUND, labels.COLOURS, labels.LIGHT
label_glyph, label_map = labels.label_glyph, labels.label_map
label_picture, map_picture = labels.label_picture, labels.map_picture
FILES = [path for name in ("digits", "segmentation") for path in sorted((RECIPES / name).glob("*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_recipes_are_valid(path):
    kind = PriorRecipe if path.stem.startswith("prior") else TokenizerRecipe
    recipe = read_recipe(EncodeRecipe if path.stem == "codes" else kind, path)
    assert isinstance(recipe, PriorRecipe | TokenizerRecipe | EncodeRecipe)


def test_maps_are_read_as_they_were_written():
    labels = np.arange(len(COLOURS)).reshape(3, 4)
    assert (label_map(map_picture(labels)) == labels).all()


def test_a_picture_of_plain_regions_has_the_labels_of_its_glyph():
    """A red disc with a light hole: the hole is light, what is light around the disc is background."""
    y, x = np.mgrid[:32, :32] - 15.5
    radius = np.hypot(x, y)
    picture = np.full((32, 32, 3), 255, dtype=np.float32)
    picture[(radius < 12) & (radius >= 5)] = (220, 40, 50)
    alpha = (radius < 12).astype(np.float32)
    asked = label_glyph(picture, alpha)
    found = label_picture(Image.fromarray(picture.astype(np.uint8)))
    assert (asked == found).all()
    red = [tuple(colour) for colour in COLOURS].index((224, 48, 48))
    assert (asked[15, 0], asked[15, 6], asked[15, 15]) == (BACKGROUND, red, LIGHT)
