"""What cannot be seen in a text changes no token; what can be seen does."""

import json
import shutil
import time
import unicodedata
import warnings
from functools import partial
from pathlib import Path
from random import Random
from typing import Literal

import emoji
import open_clip
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines import TextToImagePipeline
from pipelines.bundle import INDEX, bundle_fingerprint, draws_pictures_of, file_hash, find_bundle, read_index
from pipelines.output import generate
from pipelines.prefix import prompt_prefixes
from pipelines.rank import rank
from pipelines.replay import replay
from pipelines.request import TextPrompt
from pipelines.request import check_text as check_prompt
from rerank import ClipReranker
from rerank.clip import new_clip
from tessera.clip.text import FileTokenizer, write_tokenizer
from tessera.errors import InputError, InputWarning
from tessera.images import read_origin
from tessera.text import FILE, TextTokenizer
from tessera.text.normalization import normalizer, visible
from tessera.weights.writing import write_json
from tests.conftest import TINY_CLIP

CAPTIONS = ["a red heart above a blue circle", "A small cat in the top left corner", "红色背景上的心", "it’s a “café”"]
TOKENIZER = TextTokenizer.train(CAPTIONS * 3, vocab_size=340)
LOWER = TextTokenizer.train(CAPTIONS * 3, vocab_size=340, lower_case=True)
GOLDEN = Path(__file__).parent / "golden" / "text_tokenizer_nfc.json"

# Default_Ignorable_Code_Point of the Unicode Character Database, and controls.
IGNORABLE = [0xAD, 0x34F, 0x61C, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), *range(0x200B, 0x2010)]
IGNORABLE += [*range(0x202A, 0x202F), *range(0x2060, 0x2070), *range(0xFE00, 0xFE10), 0xFEFF, *range(0xFFF0, 0xFFF9)]
IGNORABLE += [*range(0x1BCA0, 0x1BCA4), *range(0x1D173, 0x1D17B), *range(0xE0000, 0xE1000), *range(0x0, 0x9), 0x7F]
WHITE = [chr(code) for code in range(0x110000) if chr(code).isspace()] + ["\u2800", "\u3164", "\uffa0"]
PLAIN = st.text("abz AZ01.,!’ éßñ中心のカ한жΩ", max_size=30)
# What changes its neighbours or is changed by them, all in one alphabet.
TANGLE = st.text(
    "ab1# A=é0\u0301\u0323\u0338\u00ad\u034f\u115f\u1160\u1100\u1161\u11a8\u180b\u1820\u200b\u200c\u200d\u200e\ufe00"
    "\ufe0e\ufe0f\ufeff\u3164\U000e0041\U000e007f\U000e0100\U0001f3f4👩🚀❤\U0001f3fd\u20e3می\u0653ا\u064bक\u094dष\u093c"
    "中\u00a0\u2028\u0085\n\t\u212b\U0001bca0İ",
    max_size=8,
)
SEEN = {
    "Persian": "نمی\u200cخواهم یک قلب قرمز",
    "Persian joiner at the end": "سال ۱۳۵۷ ه\u200d",
    "Hindi": "क\u094d\u200dष और क\u094d\u200cष",
    "Bengali": "র\u200d\u09cdয",
    "Sinhala": "ශ\u0dca\u200dර\u0dd3 ලංකා",
    "astronaut": "👩🏽\u200d🚀",
    "rainbow flag": "🏳\ufe0f\u200d🌈",
    "Scotland": "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "keycap": "1\ufe0f\u20e3",
    "red heart as a picture": "❤\ufe0f",
    "slashed zero": "0\ufe00",
    "Han variant": "葛\U000e0100",
    "Mongolian": "ᠠ\u180b",
    "Hangul by letters": "\u1100\u1160",
}


@given(PLAIN, st.lists(st.tuples(st.integers(0, 30), st.sampled_from(IGNORABLE)), max_size=6))
@settings(max_examples=300, deadline=None)
def test_invisible_characters_change_no_id(text: str, added: list[tuple[int, int]]) -> None:
    changed = text
    for place, code in added:
        if not unicodedata.combining(changed[place : place + 1] or "a"):
            changed = changed[:place] + chr(code) + changed[place:]
    # A selector behind a digit or an ideograph chooses another shape of it, which can be seen.
    chosen = any(0xFE00 <= code <= 0xFE0F or 0xE0100 <= code <= 0xE01EF for _, code in added)
    if not (chosen and any(character in "01中心’!.," for character in text)):
        assert TOKENIZER.encode(changed) == TOKENIZER.encode(text)


@given(st.lists(st.sampled_from(["a", "red", "Heart", "心", "é", "👩🏽\u200d🚀"]), min_size=1, max_size=8), st.data())
@settings(max_examples=200, deadline=None)
def test_white_space_of_any_kind_is_one_space(words: list[str], data: st.DataObject) -> None:
    white = st.lists(st.sampled_from(WHITE), min_size=1, max_size=3).map("".join)
    text = data.draw(white) + "".join(word + data.draw(white) for word in words)
    assert visible(text) == " ".join(words)
    assert TOKENIZER.encode(text) == TOKENIZER.encode(" ".join(words))


@given(TANGLE | st.text(max_size=30))
@example("\u0130\u093c\u200c\u0627")  # whose small letter has a mark more, behind which no joiner stays
@settings(max_examples=1000, deadline=None)
def test_a_second_time_changes_nothing(text: str) -> None:
    for normalize in (visible, normalizer(lower_case=True, space_in_front=False).normalize_str):
        assert normalize(normalize(text)) == normalize(text)


@given(TANGLE)
@settings(max_examples=500, deadline=None)
def test_how_letters_and_marks_are_composed_changes_nothing(text: str) -> None:
    for form in ("NFC", "NFD"):
        assert visible(unicodedata.normalize(form, text)) == visible(text)


@given(PLAIN, PLAIN)
@settings(max_examples=200, deadline=None)
def test_what_can_be_seen_stays_apart(first: str, second: str) -> None:
    same = " ".join(first.split()) == " ".join(second.split())
    assert (TOKENIZER.encode(first) == TOKENIZER.encode(second)) == same
    assert TOKENIZER.decode(TOKENIZER.encode(first)) == " ".join(first.split())


@given(TANGLE, st.sampled_from([0.0, 1e-12, 0.5, 1.0]), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_tokens_are_of_the_visible_text(text: str, dropout: float, seed: int) -> None:
    seen = TOKENIZER.visible(text)
    ids = TOKENIZER.encode(text, dropout, Random(seed))
    assert seen == visible(text) and ids == TOKENIZER.encode(seen, dropout, Random(seed))
    assert TOKENIZER.decode(ids) == seen
    assert TOKENIZER.lengths([text]) == [len(TOKENIZER.encode(text))]


@pytest.mark.parametrize("name", SEEN)
def test_what_shapes_its_neighbours_stays(name: str) -> None:
    assert visible(SEEN[name]) == SEEN[name]
    assert visible(f"a {SEEN[name]}\u00a0cat\u200b") == f"a {SEEN[name]} cat"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\u200db", "ab"),  # joiners of Latin letters join nothing
        ("红\u200d心\u200c", "红心"),
        ("می\u200c \u200cخ", "می خ"),  # nor do they part words that a space parts
        ("نمی\u200c\u200cخ", "نمی\u200cخ"),
        ("😀\ufe0f", "😀"),  # drawn as a picture anyway
        ("👩\u200d a", "👩 a"),
        ("a1\ufe0f", "a1"),
        ("a\U000e0041\U000e0042", "a"),  # letters smuggled in as tags
        ("e\u200b\u0301", "é"),
        ("\u202ecat\u202c", "cat"),
    ],
)
def test_what_shapes_nothing_goes(text: str, seen: str) -> None:
    assert visible(text) == seen


def test_every_emoji_sequence_stays() -> None:
    """All that Unicode recommends for interchange, as far as the emoji package knows them."""
    recommended = [
        text for text, entry in emoji.EMOJI_DATA.items() if entry["status"] == emoji.STATUS["fully_qualified"]
    ]
    assert len(recommended) > 3000
    assert [text for text in recommended if visible(text) != text] == []


def test_case_is_as_the_tokenizer_was_trained() -> None:
    assert TOKENIZER.encode("A Red Heart") != TOKENIZER.encode("a red heart")
    assert LOWER.encode("A Red\u00a0HEART") == LOWER.encode("a red heart")
    assert LOWER.decode(LOWER.encode("CAFE\u0301")) == "café"


def test_long_texts_take_no_time() -> None:
    """Libraries were known to take the square of the length for each match."""
    start = time.perf_counter()
    visible("a\u00a0re\u00add " * 4000)
    assert time.perf_counter() - start < 2


def test_a_tokenizer_trained_before_reads_as_it_did(tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))
    (tmp_path / FILE).write_text(json.dumps(golden["tokenizer"]), "utf-8")
    tokenizer = TextTokenizer.from_pretrained(tmp_path)
    assert {text: tokenizer.encode(text) for text in golden["ids"]} == golden["ids"]
    assert tokenizer.fingerprint == golden["fingerprint"]
    assert tokenizer.visible("a\u00a0re\u00add") == "a\u00a0re\u00add"
    write_tokenizer(tokenizer, tmp_path)  # a reranker of such a bundle is as before, too
    texts = FileTokenizer.from_folder(tmp_path, 16)
    assert texts is not None and texts.cleaning == "before"


# Prior and reranker ---------------------------------------------------------------------------------------------------

TEXTS = [
    "a red heart",
    "a\u00a0re\u00add\nheart\u200b",
    "it’s “a café” &amp; 红心，猫",
    "ﬁne \ufeffcat",
    SEEN["Persian"],
    "",
]


def trained(tokenizer: TextTokenizer) -> ClipReranker:
    torch.manual_seed(0)
    clip = new_clip(TINY_CLIP, tokenizer)
    return clip.with_model(clip.model)


def ids(clip: ClipReranker, text: str) -> list[int]:
    """Without padding and the end token."""
    return [i for i in clip.tokenize([text])[0].tolist() if i > 2]


@pytest.mark.parametrize("tokenizer", [TOKENIZER, LOWER], ids=["case", "lower case"])
def test_a_reranker_reads_what_the_prior_reads(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    clip = trained(tokenizer)
    clip.save_pretrained(tmp_path / "reranker")
    loaded = ClipReranker.from_pretrained(tmp_path / "reranker")
    room = TINY_CLIP["text_cfg"]["context_length"] - 1  # type: ignore[index]
    for text in TEXTS:
        assert ids(clip, text) == ids(loaded, text) == tokenizer.encode(text)[:room]
    assert loaded.fingerprint == clip.fingerprint
    # Transformers puts up with what it does not know.
    theirs = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'reranker'}")
    assert torch.equal(theirs(TEXTS[:2]), loaded.tokenize(TEXTS[:2]))


def test_texts_are_mended_or_not_as_the_fingerprint_says(tmp_path: Path) -> None:
    trained(TOKENIZER).save_pretrained(tmp_path / "reranker")
    prints, tokens = set(), {}
    path = tmp_path / "reranker" / "tokenizer_config.json"
    for cleaning in ("before", "between", "none"):
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"text_cleaning": cleaning}), "utf-8")
        clip = ClipReranker.from_pretrained(tmp_path / "reranker")
        prints.add(clip.fingerprint)
        tokens[cleaning] = [ids(clip, text) for text in ("“a” cat", '"a" cat', "“a”\u00ad cat")]
    assert len(prints) == 3
    assert tokens["between"][0] == tokens["between"][1] == tokens["between"][2] == tokens["before"][0]
    assert tokens["none"][0] != tokens["none"][1] and tokens["none"][0] == tokens["none"][2]


@pytest.fixture(scope="module")
def shipped() -> TextToImagePipeline:
    return TextToImagePipeline.from_pretrained("emoji", device="cpu")


SHIPPED_IDS = {
    "a red heart": [260, 455, 463],
    "A Red Heart": [595, 1112, 275, 1437, 71, 434],
    "a red heart above a blue circle": [260, 455, 463, 390, 260, 422, 989],
    "man’s shoe": [321, 161, 225, 250, 85, 1609],
    "a café at night": [260, 297, 903, 1704, 1265, 2659],
    "蓝色圆圈在猫的左边": [1081, 2095, 2109, 698, 1376, 420, 429, 413],
    "女宇航员：中等肤色": [806, 1132, 2669, 174, 123, 251, 790],
}
INVISIBLY = [
    "a red\u00a0heart",
    "a red\nheart",
    "a\tred  heart",
    "a re\u00add heart",
    "a red heart\u200b",
    "\ufeffa red heart",
]


def test_the_shipped_bundle_draws_what_is_seen(shipped: TextToImagePipeline) -> None:
    draw = partial(shipped, num_candidates=2, num_images_per_prompt=2, seed=3)
    plain = draw("a red heart")
    for prompt in INVISIBLY:
        other = draw(prompt)
        assert torch.equal(other.codes, plain.codes) and other.scores == plain.scores
    assert not torch.equal(draw("A Red Heart").codes, plain.codes)  # it was trained with case


@given(PLAIN, st.lists(st.tuples(st.integers(0, 30), st.sampled_from("\u00ad\u200b\u2060\ufeff\u200e")), max_size=5))
@settings(max_examples=100, deadline=None)
def test_the_shipped_bundle_reads_what_is_seen(
    shipped: TextToImagePipeline, text: str, added: list[tuple[int, str]]
) -> None:
    changed = text
    for place, character in added:
        changed = changed[:place] + character + changed[place:]
    assert shipped.prior.text_tokenizer is not None and isinstance(shipped.reranker, ClipReranker)
    assert shipped.prior.text_tokenizer.encode(changed) == shipped.prior.text_tokenizer.encode(text)
    assert torch.equal(shipped.reranker.tokenize([changed]), shipped.reranker.tokenize([text]))


def test_the_shipped_bundle_reads_other_prompts_as_before() -> None:
    """Ids recorded before its normalizer was added; its weights are the same."""
    tokenizer = TextTokenizer.from_pretrained(find_bundle("emoji") / "text_tokenizer")
    assert tokenizer.encode("绿色背景上的老虎头") == [1061, 516, 1346, 1722, 239, 614]
    for text, expected in SHIPPED_IDS.items():
        assert tokenizer.encode(text) == expected


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_long_prompt_is_cut_where_it_is_seen_to_end(
    tiny_pipeline: TextToImagePipeline, form: Literal["NFC", "NFD"]
) -> None:
    prompt = "a café and " * 30
    changed = unicodedata.normalize(form, prompt).replace(" ", "\u200b\u00a0").replace("f", "f\u00ad")
    with pytest.warns(UserWarning, match="longer than the prior reads") as plain:
        expected = tiny_pipeline.prefixes([prompt])
    with pytest.warns(UserWarning, match="longer than the prior reads") as other:
        assert torch.equal(tiny_pipeline.prefixes([changed]), expected)
    assert str(other[0].message) == str(plain[0].message)


# Prompts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt", ["\u200b", "\u00ad \u2060", "\ufeff", "\u3164", "\u115f\u1160", "\u200d\ufe0f", "\u2028\u0085"]
)
def test_a_prompt_of_which_nothing_can_be_seen_is_empty(prompt: str) -> None:
    with pytest.raises(InputError, match="the prompt (is empty|holds nothing that can be seen)"):
        check_prompt(prompt)


@pytest.mark.parametrize("prompt", ["a\u0085cat", "a\u2028cat", "a\x0bcat", "\ufeffcat", "نمی\u200cخواهم"])
def test_a_prompt_with_odd_characters_is_text(prompt: str) -> None:
    check_prompt(prompt)


# Prompts that a model does not read to their end ----------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False], ids=["FileTokenizer", "open_clip's own"])
def test_a_reranker_tells_what_it_leaves_out(known: bool) -> None:
    clip = trained(TOKENIZER)
    if not known:
        clip = ClipReranker(clip.model, open_clip.get_tokenizer("ViT-B-32"), clip.config)
    prompt = " ".join(f"cat {i}" for i in range(60))
    left_out = clip.left_out(prompt)
    assert prompt.endswith(left_out) and 0 < len(left_out) < len(prompt)
    read = prompt.removesuffix(left_out).rstrip()
    assert torch.equal(clip.tokenize([read]), clip.tokenize([prompt]))
    assert not torch.equal(clip.tokenize([read[:-1]]), clip.tokenize([prompt]))
    assert clip.left_out(read) == clip.left_out("a cat \x1b[0m") == clip.left_out("") == ""
    if known:
        assert clip.left_out(read + "\u200b\u00a0") == ""


def test_rerank_says_what_of_a_prompt_is_not_scored(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    Image.new("RGB", (16, 16)).save(path)
    with pytest.warns(InputWarning, match="the prompt is longer than the reranker reads; left out is '.*red heart a"):
        rank("a red heart " * 200, [path], str(tiny_bundle))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rank("a dog", [path], str(tiny_bundle))


def test_a_pipeline_says_once_what_its_reranker_does_not_read(tiny_pipeline: TextToImagePipeline) -> None:
    prompts = ["a dog", "a red heart " * 20]
    with pytest.warns(InputWarning) as caught:
        tiny_pipeline(prompts, num_candidates=4, num_images_per_prompt=1, batch_size=2)
    (told,) = [str(one.message) for one in caught]
    assert (
        told.startswith("prompt 2 is longer than the prior reads; left out is '") and ", and by the reranker '" in told
    )
    with pytest.warns(InputWarning) as caught:
        tiny_pipeline(prompts, num_candidates=1, rerank=False)
    assert len(caught) == 1 and "reranker" not in str(caught[0].message)


def test_a_prompt_may_be_too_long_for_the_reranker_alone(shipped: TextToImagePipeline) -> None:
    assert isinstance(shipped.reranker, ClipReranker)
    short = FileTokenizer.from_folder(find_bundle("emoji") / "reranker", context_length=4)
    clip = ClipReranker(shipped.reranker.model, short, shipped.reranker.config)
    with pytest.warns(InputWarning, match="^the prompt is longer than the reranker reads; left out is 'above a blue"):
        prompt_prefixes([TextPrompt("a red heart above a blue circle")], shipped.bundle, clip)


# Pictures of earlier editions -----------------------------------------------------------------------------------------


def test_a_picture_of_an_earlier_edition_replays_with_a_bundle_that_names_it(tiny_bundle: Path, tmp_path: Path) -> None:
    prompt = "a red\u00a0heart"
    picture = generate(prompt, tmp_path / "out", model=tiny_bundle, num_candidates=1, device="cpu").prompts[0].images[0]
    assert read_origin(picture.path)["prompt"] == prompt  # as it was typed
    edition = tmp_path / "edition"
    shutil.copytree(tiny_bundle, edition)
    config = edition / "prior" / "config.json"
    config.write_text(config.read_text("utf-8") + "\n", "utf-8")  # anything that gives it another fingerprint
    index = read_index(edition)
    index = index.model_copy(update={"files": index.files | {"prior/config.json": file_hash(config)}})
    write_json(edition / INDEX, index.model_dump(by_alias=True))
    with pytest.raises(InputError, match="name the right bundle"):
        replay(picture.path, tmp_path / "again", model=edition, device="cpu")
    index = index.model_copy(update={"earlier_fingerprints": (bundle_fingerprint(tiny_bundle),)})
    write_json(edition / INDEX, index.model_dump(by_alias=True))
    replayed = replay(picture.path, tmp_path / "again", model=edition, device="cpu")
    assert replayed.identical and read_origin(replayed.path)["prompt"] == prompt


def test_the_shipped_bundle_names_its_earlier_edition() -> None:
    assert draws_pictures_of("emoji", "c87a7aa8ec746fe7") and draws_pictures_of("emoji", bundle_fingerprint("emoji"))
    assert not draws_pictures_of("emoji", "0" * 16)
