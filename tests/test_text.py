import json
from collections import Counter
from random import Random
from typing import Any

import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from pipelines.bundle import find_bundle
from tessera.errors import InputError
from tessera.text import END, SPECIALS, TextTokenizer
from tessera.text.normalization import visible

CAPTIONS = [
    "a red heart above a blue circle",
    "a small cat in the top left corner",
    "红色背景上的心",
    "蓝色圆圈在猫的左边",
]
TOKENIZER = TextTokenizer.train(CAPTIONS * 3, vocab_size=340)
CLIP = TextTokenizer.from_pretrained("clip")
OPEN_CLIP = open_clip.tokenizer.SimpleTokenizer()


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_whole(text):
    ids = TOKENIZER.encode(text)
    assert all(END < i < TOKENIZER.vocab_size for i in ids)
    assert TOKENIZER.decode(ids) == visible(text)


@given(st.text(max_size=30), st.floats(0, 1), st.integers(0, 2**32))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_whole_from_cuts_with_dropout(text, dropout, seed):
    ids = TOKENIZER.encode(text, dropout, Random(seed))
    assert TOKENIZER.decode(ids) == visible(text)
    assert ids == TOKENIZER.encode(text, dropout, Random(seed))


def test_words_are_the_same_everywhere():
    assert TOKENIZER.decode(TOKENIZER.encode("  a  red ")) == "a red"
    assert TOKENIZER.encode("heart a") == TOKENIZER.encode("heart") + TOKENIZER.encode("a")


def test_specials_in_a_text_are_text():
    assert all(i > END for i in TOKENIZER.encode("<pad> <end> <start>"))


def test_training_is_deterministic_and_saved_tokenizers_are_the_same(tmp_path):
    again = TextTokenizer.train(CAPTIONS * 3, vocab_size=340)
    assert again.to_json() == TOKENIZER.to_json()
    again.save_pretrained(tmp_path / "text")
    loaded = TextTokenizer.from_pretrained(tmp_path / "text")
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.encode("a red cat 红") == TOKENIZER.encode("a red cat 红")


def test_a_chinese_token_is_a_character():
    """Said often enough, a whole clause would become one token: no spaces part its words."""
    clause = "白色背景上的红色苹果在绿色圆圈的左边"
    tokenizer = TextTokenizer.train([f"{clause}，{clause}。 a red 苹果, 𠮷"] * 500, vocab_size=1000)
    ids = tokenizer.encode(clause)
    assert [tokenizer.decode([i]) for i in ids[1:]] == list(clause)  # behind the space in front
    assert tokenizer.encode("红苹果")[1:] == [ids[clause.index(character) + 1] for character in "红苹果"]
    tokens = [tokenizer.decode([i]) for i in range(len(SPECIALS), tokenizer.vocab_size)]
    assert all(len(token) == 1 for token in tokens if any(character in token for character in f"{clause}𠮷，。"))
    assert any(len(token) > 2 for token in tokens) and "𠮷" in tokens  # letters merge as ever; beyond 16 bits too


@given(st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_any_cut_of_chinese_is_between_characters(text):
    """Also of characters that training never saw, whose tokens are bytes."""
    whole, ids = visible(text), TOKENIZER.encode(text)
    space = TOKENIZER.encode("猫")[:1]  # in front of every text
    assert ids == space + [i for character in whole for i in TOKENIZER.encode(character)[1:]]


def test_kana_does_not_merge_into_clauses():
    clause = "ひだりうえのすみにあるちいさなねこ"
    tokenizer = TextTokenizer.train([clause] * 500, vocab_size=1000)
    assert len(tokenizer.encode(clause)) >= len(clause) / 5


def test_tokenizers_trained_before_read_as_they_did():
    """The shipped one has tokens of several characters, which its prior was trained with."""
    shipped = TextTokenizer.from_pretrained(find_bundle("emoji") / "text_tokenizer")
    assert shipped.encode("绿色背景上的老虎头") == [1061, 516, 1346, 1722, 239, 614]
    config = json.loads((find_bundle("emoji") / "prior" / "config.json").read_text("utf-8"))
    assert shipped.fingerprint == config["text_tokenizer_fingerprint"]


# BPE dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_of_none_and_of_all_merges():
    for text in CAPTIONS:
        assert TOKENIZER.encode(text, 1e-12, Random(0)) == TOKENIZER.encode(text)
        assert len(TOKENIZER.encode(text, 1.0, Random(0))) == len(text.encode()) + 1  # bytes, and the space in front


def test_cuts_are_as_frequent_as_the_library_draws_them():
    """The library's own BPE dropout, which cannot be seeded, over 4,000 cuts of one word."""
    reference = Tokenizer.from_str(TOKENIZER.to_json())
    assert isinstance(reference.model, models.BPE)
    reference.model.dropout = 0.3
    count, random = 4000, Random(1)
    ours = Counter(tuple(TOKENIZER.encode("heart", 0.3, random)) for _ in range(count))
    theirs = Counter(tuple(reference.encode("heart", add_special_tokens=False).ids) for _ in range(count))
    assert len(ours) > 3
    for cut in ours | theirs:
        expected = max(ours[cut] + theirs[cut], 1) / 2
        assert abs(ours[cut] - theirs[cut]) < 5 * (2 * expected) ** 0.5 + 5


def test_dropout_needs_byte_level_bpe(tmp_path):
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    unigram.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="bpe_dropout needs .* byte-level BPE; set it to 0"):
        TextTokenizer.from_pretrained(tmp_path).encode("a", 0.1, Random(0))


# Tokenizers of other projects -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["A red Heart  above\ta circle!", "it's 1,234 cats' tails", "红色的心", "café ❤️ naïve", ""]
)
def test_clip_reads_as_open_clip_does(text):
    assert CLIP.encode(text) == [i + len(SPECIALS) for i in OPEN_CLIP.encode(text)]


@given(st.text("abz AZ'0123,.-éß中の\n", max_size=40))
@settings(max_examples=200, deadline=None)
def test_clip_reads_any_text_as_open_clip_does(text):
    assert CLIP.encode(text) == [i + len(SPECIALS) for i in OPEN_CLIP.encode(text)]


def test_clip_is_saved_like_any_other(tmp_path):
    CLIP.save_pretrained(tmp_path / "text")
    loaded = TextTokenizer.from_pretrained(tmp_path / "text")
    assert loaded.fingerprint == CLIP.fingerprint and loaded.vocab_size == 49408 + len(SPECIALS)
    assert loaded.decode(loaded.encode("A red heart")).strip() == "a red heart"
    assert loaded.encode("heart", 1e-12, Random(0)) == loaded.encode("heart")
    assert len(loaded.encode("heart", 1.0, Random(0))) == 5


def foreign(kind: str) -> Tokenizer:
    """As transformers would save it: other ids, start and end added, lengths cut at four tokens."""
    specials = ["[UNK]", "<end>", "[BOS]"]
    common: dict[str, Any] = {"vocab_size": 320, "special_tokens": specials, "show_progress": False}
    tokenizer, trainer = {
        "BPE": lambda: (
            Tokenizer(models.BPE()),
            trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **common),
        ),
        "WordPiece": lambda: (Tokenizer(models.WordPiece(unk_token="[UNK]")), trainers.WordPieceTrainer(**common)),
        "WordLevel": lambda: (Tokenizer(models.WordLevel(unk_token="[UNK]")), trainers.WordLevelTrainer(**common)),
        "Unigram": lambda: (Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token="[UNK]", **common)),
    }[kind]()
    tokenizer.pre_tokenizer = {
        "BPE": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "WordPiece": pre_tokenizers.BertPreTokenizer(),
        "WordLevel": pre_tokenizers.WhitespaceSplit(),
        "Unigram": pre_tokenizers.Metaspace(),
    }[kind]
    if kind == "WordPiece":
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.train_from_iterator(CAPTIONS * 20, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        "[BOS] $A <end>", special_tokens=[("[BOS]", 2), ("<end>", 1)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding()
    return tokenizer


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel", "Unigram"])
def test_tokenizers_of_transformers_layout_are_read(kind, tmp_path):
    reference = foreign(kind)
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = TextTokenizer.from_pretrained(tmp_path)
    reference.no_truncation()
    reference.no_padding()
    for text in [*CAPTIONS, "a cat, small; a dog"]:
        assert tokenizer.encode(text) == [i + 3 for i in reference.encode(text, add_special_tokens=False).ids]
    assert all(END < i < tokenizer.vocab_size for i in tokenizer.encode("<pad> <start> <end> a red heart"))
    assert tokenizer.vocab_size == reference.get_vocab_size() + 3
    tokenizer.save_pretrained(tmp_path / "ours")
    assert TextTokenizer.from_pretrained(tmp_path / "ours").fingerprint == tokenizer.fingerprint


def test_transformers_reads_what_it_saved_the_same(tmp_path):
    """The whole round: a tokenizer saved by transformers, read here."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=foreign("BPE"), pad_token="[BOS]", eos_token="<end>")
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<end>"
    ours = TextTokenizer.from_pretrained(tmp_path)
    text = "a red heart above a cat"
    assert ours.encode(text) == [i + 3 for i in theirs(text, add_special_tokens=False, truncation=False)["input_ids"]]
