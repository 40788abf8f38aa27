"""What holds for every reranker: a line in RERANKERS joins a new one."""

from collections.abc import Callable

import pytest
import torch

from rerank import Reranker

RERANKERS: dict[str, Callable[[pytest.FixtureRequest], Reranker]] = {
    "clip": lambda request: request.getfixturevalue("tiny_clip"),
}


@pytest.fixture(params=RERANKERS)
def reranker(request: pytest.FixtureRequest) -> Reranker:
    return RERANKERS[request.param](request)


def test_a_score_is_that_of_an_image_alone_in_any_order(reranker: Reranker) -> None:
    torch.manual_seed(0)
    images, codes = torch.rand(5, 3, 16, 16) * 2 - 1, torch.randint(0, 32, (5, 1, 4, 4))
    scores = reranker.score("a dog", images, codes)
    assert scores.shape == (5,) and scores.dtype == torch.float32 and not scores.requires_grad
    assert len(scores.unique()) == 5
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(reranker.score("a dog", images[order], codes[order]), scores[order], rtol=0, atol=1e-6)
    for i in range(5):
        alone = reranker.score("a dog", images[i : i + 1], codes[i : i + 1])
        torch.testing.assert_close(alone, scores[i : i + 1], rtol=0, atol=1e-6)
    assert not torch.equal(reranker.score("a red heart", images, codes), scores)
