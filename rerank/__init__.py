"""(prompt, images, codes) -> scores: which candidates fit the prompt best."""

from rerank.clip import ClipReranker
from rerank.reranker import Reranker

__all__ = ["ClipReranker", "Reranker"]
