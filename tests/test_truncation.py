"""What the text length cuts, language by language, against counts by hand."""

import pytest

from stage2_prior.truncation import Truncation, describe, language, truncation
from tessera.text import TextTokenizer

TOKENIZER = TextTokenizer.train(["a red heart"] * 5, vocab_size=280)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a red heart", "Latin"),
        ("ein grüner Käse", "Latin"),
        ("红色的心", "Chinese"),
        ("红心 emoji 在蓝色圆圈上方", "Chinese"),
        ("赤いハートの絵", "Japanese"),
        ("빨간 하트", "Korean"),
        ("красное сердце", "Cyrillic"),
        ("قلب أحمر", "Arabic"),
        ("❤️ 123", "no letters"),
    ],
)
def test_languages_go_by_script(text, name):
    assert language(text) == name


def test_every_caption_is_counted_with_its_language():
    captions = ["a red heart", "a red heart a red heart", "红", "红色的心"]
    lengths = [len(TOKENIZER.encode(caption)) for caption in captions]
    room = max(lengths[0], lengths[2])
    found = truncation(TOKENIZER, captions, room + 1)
    assert found == {
        "Latin": Truncation(2, 1, lengths[1]),
        "Chinese": Truncation(2, 1, lengths[3]),
    }
    assert truncation(TOKENIZER, captions, 100)["Chinese"].cut == 0
    assert describe(found, room + 1).endswith(
        f"Latin 50.00% of 2 (longest {lengths[1]}), Chinese 50.00% of 2 (longest {lengths[3]})"
    )


def test_of_many_captions_some_are_drawn(monkeypatch):
    """At random: every second one of a list that alternates would be of one language."""
    monkeypatch.setattr("stage2_prior.truncation.MOST_CAPTIONS", 100)
    found = truncation(TOKENIZER, ["red", "红"] * 100, 10)
    assert sum(one.captions for one in found.values()) == 100 and min(one.captions for one in found.values()) > 25


def test_no_captions():
    assert truncation(TOKENIZER, [], 10) == {}
    assert describe({}, 10).endswith("there are none")


@pytest.mark.parametrize("spare, cut", [(0, 1), (1, 0)])
def test_start_takes_one_of_the_positions(spare, cut):
    length = len(TOKENIZER.encode("a red heart"))
    assert truncation(TOKENIZER, ["a red heart"], length + spare) == {"Latin": Truncation(1, cut, length)}
