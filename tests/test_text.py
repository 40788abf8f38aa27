from hypothesis import given, settings
from hypothesis import strategies as st

from common.text import END, TextTokenizer

CAPTIONS = [
    "a red heart above a blue circle",
    "a small cat in the top left corner",
    "红色背景上的心",
    "蓝色圆圈在猫的左边",
]
TOKENIZER = TextTokenizer.train(CAPTIONS * 3, vocab_size=340)


@given(st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_whole(text):
    import unicodedata

    ids = TOKENIZER.encode(text)
    assert all(END < i < TOKENIZER.vocab_size for i in ids)
    assert TOKENIZER.decode(ids).removeprefix(" ") == unicodedata.normalize("NFC", text).removeprefix(" ")


def test_specials_in_a_text_are_text():
    assert all(i > END for i in TOKENIZER.encode("<pad> <end> <start>"))


def test_training_is_deterministic_and_saved_tokenizers_are_the_same(tmp_path):
    again = TextTokenizer.train(CAPTIONS * 3, vocab_size=340)
    assert again.to_json() == TOKENIZER.to_json()
    again.save_pretrained(tmp_path / "text")
    loaded = TextTokenizer.from_pretrained(tmp_path / "text")
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.encode("a red cat 红") == TOKENIZER.encode("a red cat 红")


def test_no_token_is_longer_than_a_word():
    longest = max((TOKENIZER.decode([i]) for i in range(3, TOKENIZER.vocab_size)), key=lambda s: len(s.encode()))
    assert len(longest.encode()) <= 16
