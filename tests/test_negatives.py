"""Wrong captions: made of the words of the batch, of the same frame, and never the right one; and the loss that uses
them, against its closed form."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from rerank.negatives import WORD, recombined
from rerank.train import same, told_apart

PAIRS = ["a cat above a dog", "a cup above a pear"]
WRONG = {
    "a cat above a dog": {"a cup above a dog", "a cat above a pear", "a dog above a cat"},
    "a cup above a pear": {"a cat above a pear", "a cup above a dog", "a pear above a cup"},
}
CHINESE = ["绿色背景上的猫", "红色背景上的狗"]


@pytest.mark.parametrize("seed", range(8))
def test_one_difference_is_taken_over_or_two_change_places(seed):
    wrong = recombined(PAIRS, np.random.default_rng(seed))
    assert all(text in WRONG[caption] for caption, text in zip(PAIRS, wrong, strict=True))


def test_every_way_is_taken():
    found = [recombined(PAIRS, np.random.default_rng(seed)) for seed in range(64)]
    assert {one[0] for one in found} == WRONG[PAIRS[0]]


def test_chinese_characters_are_words():
    found = {recombined(CHINESE, np.random.default_rng(seed))[0] for seed in range(32)}
    assert found == {"红色背景上的猫", "绿色背景上的狗", "猫色背景上的绿"}


def test_words_come_from_the_batch_and_the_same_seed_gives_the_same():
    captions = [*PAIRS, *CHINESE, "flag of Japan", "flag of Peru", "a small cat in the top left corner", "七"]
    wrong = recombined(captions, np.random.default_rng(1))
    words = {word.strip() for caption in captions for word in WORD.findall(caption)}
    for caption, text in zip(captions, wrong, strict=True):
        assert text != caption and {word.strip() for word in WORD.findall(text)} <= words
    assert wrong == recombined(captions, np.random.default_rng(1))


def test_captions_that_are_all_the_same_have_no_wrong_one():
    assert recombined(["a cat", "a cat"], np.random.default_rng(0)) == ["a cat", "a cat"]
    assert same(["a cat", "a dog"], ["a cat", "a cup", "a pear", "a dog"]).tolist() == [[True, False], [False, True]]


def test_the_loss_is_the_cross_entropy_among_a_pictures_own_captions():
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(3, 5), dim=-1), F.normalize(torch.randn(9, 5), dim=-1)
    ignored = torch.tensor([[False, True, True], [False, False, True]])
    expected = 0.0
    for i in range(3):
        right = 4.0 * float(images[i] @ texts[i])
        wrong = [4.0 * float(images[i] @ texts[3 * (k + 1) + i]) for k in range(2) if not ignored[k, i]]
        expected += math.log(sum(math.exp(x - right) for x in [right, *wrong])) / 3
    assert told_apart(images, texts, ignored, torch.tensor(4.0)).item() == pytest.approx(expected, abs=1e-6)
