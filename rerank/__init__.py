"""(prompt, images, codes) -> scores: which candidates show what was asked for."""

from rerank.clip import ClipReranker

__all__ = ["ClipReranker"]
