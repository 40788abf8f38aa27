r"""What cannot be seen in a text is not read: one normalisation, kept inside `tokenizer.json` as its normalizer.

Characters without a shape of their own are taken out, text becomes NFC (Unicode Standard Annex 15), and white space of
every kind, line ends and blank letters among it, becomes one space between words and none at the ends. Which characters
those are is Default_Ignorable_Code_Point of the Unicode Character Database, and the control characters. Some of them
change how their neighbours look. They stay where they do:

- A zero-width joiner (U+200D) in an emoji sequence (Unicode Technical Standard 51: a woman, a joiner and a rocket are
  an astronaut), and on either side of a letter of a script whose letters join or stack (Persian, Hindi).
- A zero-width non-joiner (U+200C) between two letters of such scripts; at the end of a word it parts nothing.
- U+FE0F and U+FE0E behind a character that is drawn as text and as emoji, unless it asks for what is drawn anyway;
  other variation selectors behind the letters and signs that have variants.
- Tag letters behind a black flag, which are the flags of regions.
- Hangul fillers beside Hangul letters, Mongolian selectors beside Mongolian ones, and likewise for shorthand.

Marks of writing direction go, because text is read in its logical order. So does the grapheme joiner (U+034F).
Each pattern is in Oniguruma's syntax; the order makes a second application change nothing.
"""

import json

from tokenizers import Regex, normalizers

# Without a shape anywhere: control characters but white space; soft hyphen, zero-width space, word joiner, marks of
# direction, byte order mark, invisible operators, musical and interlinear marks, unassigned code points set aside.
HIDDEN = (
    r"[\u0000-\u0008\u000E-\u001B\u007F-\u0084\u0086-\u009F\u00AD\u034F\u061C\u17B4\u17B5\u200B\u200E\u200F"
    r"\u202A-\u202E\u2060-\u206F\uFEFF\uFFF0-\uFFFB\x{1D173}-\x{1D17A}"
    r"\x{E0000}-\x{E001F}\x{E0080}-\x{E00FF}\x{E01F0}-\x{E0FFF}]"
)
# Variation selectors that select nothing, or what is drawn without them.
_VARIANTS = r"\p{Han}\p{Sm}\p{Myanmar}\p{Phags_Pa}\p{Manichaean}\p{Egyptian_Hieroglyphs}0‘’“”\u3000-\u303F\uFF00-\uFF65"
SELECTORS = (
    r"(?<!\p{Emoji})[\uFE0E\uFE0F]|(?<=[0-9#*])[\uFE0E\uFE0F](?!\u20E3)|(?<=\p{Emoji_Presentation})\uFE0F"
    rf"|(?<![{_VARIANTS}])[\uFE00-\uFE0D]|(?<!\p{{Han}})[\x{{E0100}}-\x{{E01EF}}]"
)
TAGS = r"(?<![\x{1F3F4}\x{E0020}-\x{E007F}])[\x{E0020}-\x{E007F}]+"
_FINAL = r"\u11A8-\u11FF\uD7CB-\uD7FB"  # consonants of a Hangul syllable; fillers stand for what is before them
FILLERS = (
    rf"\u115F(?![\u1161-\u11A7\uD7B0-\uD7C6]|\u1160[{_FINAL}])"
    rf"|(?<![\u1100-\u115F\uA960-\uA97C])\u1160|(?<=\u115F)\u1160(?![{_FINAL}])"
    r"|(?<![\u1800-\u1809\u1810-\u18AA])[\u180B-\u180F]+(?![\u1800-\u1809\u1810-\u18AA])"
    r"|(?<=[\u200C\u200D])[\u200C\u200D]"  # the first of several joiners decides
    r"|(?<!\p{Duployan})[\x{1BCA0}-\x{1BCA3}]+(?!\p{Duployan})"
)
# Letters and marks of the scripts that join or stack, block by block: Arabic to Sinhala without Thaana; Tibetan and
# Myanmar; Khmer and Mongolian; further ones of India and around, presentation forms of Arabic; ancient ones; Adlam.
_JOINING = (
    r"[\u0600-\u077F\u07C0-\u0DFF\u0F00-\u109F\u1780-\u18AF\u1900-\u194F\u1A20-\u1AAF\u1B00-\u1C4F\u1CD0-\u1CFA"
    r"\uA800-\uA8FF\uA980-\uAA7F\uAAE0-\uAAFF\uABC0-\uABFF\uFB50-\uFDFF\uFE70-\uFEFC\x{10AC0}-\x{10AFF}"
    r"\x{10B80}-\x{10BAF}\x{10D00}-\x{10D3F}\x{10F30}-\x{10FDF}\x{11000}-\x{11FFF}\x{1E900}-\x{1E95F}&&[\p{L}\p{M}]]"
)
_PICTURE = r"\p{Extended_Pictographic}"
JOINERS = (
    rf"(?<!{_JOINING})\u200C|\u200C(?!{_JOINING})"
    rf"|(?<!{_JOINING})(?!(?<={_PICTURE}|{_PICTURE}[\uFE0F\x{{1F3FB}}-\x{{1F3FF}}])\u200D{_PICTURE})\u200D(?!{_JOINING})"
)
# White space as Python's `str.split` sees it, and letters that are blank. A single space is left alone, for speed.
_BLANKS = r"\t-\r\u001C-\u001F\u0085\u00A0\u1680\u2000-\u200A\u2028\u2029\u202F\u205F\u3000\u2800\u3164\uFFA0"
BLANK = rf"[ {_BLANKS}]{{2,}}|[{_BLANKS}]"


def normalizer(lower_case: bool = False, *, space_in_front: bool = True) -> normalizers.Normalizer:
    """What a text goes through before it is cut into tokens; `space_in_front` puts one before a text that has words."""
    lower = [normalizers.Lowercase()] if lower_case else []  # first: a small letter can have a mark more
    steps = [
        *lower,
        _without(HIDDEN),
        normalizers.NFC(),  # a letter and its mark may have been apart
        *(_without(pattern) for pattern in (SELECTORS, TAGS, FILLERS)),
        normalizers.NFC(),
        _without(JOINERS),
        normalizers.NFC(),
        normalizers.Replace(Regex(BLANK), " "),
        normalizers.Strip(),
    ]
    if space_in_front:
        steps.append(normalizers.Prepend(" "))
    return normalizers.Sequence(steps)


def visible(text: str) -> str:
    """The text as `normalizer()` reads it, empty when there is nothing to be seen."""
    result: str = _VISIBLE.normalize_str(text)
    return result


def sees_only_the_visible(tokenizer: str) -> bool:
    """Whether the normalizer in the content of a `tokenizer.json` is `normalizer()`, in lower case or not."""
    recorded = json.loads(tokenizer).get("normalizer") or {}
    pattern = {"type": "Replace", "pattern": {"Regex": HIDDEN}, "content": ""}
    return recorded.get("type") == "Sequence" and pattern in recorded["normalizers"]


def _without(pattern: str) -> normalizers.Normalizer:
    return normalizers.Replace(Regex(pattern), "")


_VISIBLE = normalizer(space_in_front=False)
