"""Text as ids: byte-level BPE trained on captions, and the tokenizers of others."""

from tessera.text.tokenizer import CLIP, END, FILE, PAD, SPECIALS, START, TextTokenizer

__all__ = ["CLIP", "END", "FILE", "PAD", "SPECIALS", "START", "TextTokenizer"]
