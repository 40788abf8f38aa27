"""Attention patterns against the paper's pictures, spelled out position by position; rotary positions against complex
numbers; and what each layer does with them."""

import math

import pytest
import torch

from stage2_prior import GPTConfig, GPTPrior
from stage2_prior.decoder import View, attend
from stage2_prior.masks import arrangement, visible
from stage2_prior.positions import RotarySpec, rotate, rotation


def seen_by_hand(pattern, place, height, width, kernel):
    """The image positions that one sees, by going through the picture."""
    row, column = divmod(place, width)
    read = list(range(place + 1))  # in raster order, itself the last
    match pattern:
        case "full":
            return set(read)
        case "row":  # Ramesh et al. 2021, figure 11 a: five positions for a grid four wide
            return set(read[-(width + 1) :])
        case "column":
            return {above * width + column for above in range(row + 1)}
        case "convolution":  # figure 11 d: a window over the picture's rows written one after the other, so it wraps
            reach, seen = kernel // 2, set()
            for above in range(reach + 1):
                centre = place - above * width
                seen |= {other for other in range(centre - reach, centre + reach + 1) if 0 <= other <= place}
            return seen


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("grid", [(4, 4), (2, 5), (5, 2)])
@pytest.mark.parametrize("pattern", ["full", "row", "column", "convolution"])
def test_a_pattern_is_its_mask_drawn_by_hand(pattern, grid, kernel):
    text, length = 3, 3 + grid[0] * grid[1]
    mask = visible(pattern, torch.arange(length), torch.arange(length), text, grid, kernel)
    for query in range(length):
        seen = set(range(min(text, query + 1)))
        if query >= text:
            seen |= {text + place for place in seen_by_hand(pattern, query - text, *grid, kernel)}
        assert set(mask[query].nonzero().flatten().tolist()) == seen
        row = visible(pattern, torch.tensor([query]), torch.arange(length), text, grid, kernel)
        assert torch.equal(row[0], mask[query])  # as a cache asks for it


def test_the_paper_s_figure_of_a_3_x_3_convolution():
    seen = visible("convolution", torch.tensor([6 + 9]), torch.arange(6 + 16), 6, (4, 4), 3)[0, 6:]
    assert seen.nonzero().flatten().tolist() == [4, 5, 6, 8, 9]  # row 2, column 1: three above, one to the left, itself


def test_dalle_s_arrangement_is_the_appendix_s():
    layers = arrangement("dalle", 64)
    assert layers[:4] == ("row", "column", "row", "row") and layers[-1] == "convolution"
    for i in range(1, 64):  # "column attention if i - 2 mod 4 = 0, and row attention otherwise"
        assert layers[i - 1] == ("column" if (i - 2) % 4 == 0 else "row")
    assert arrangement(("full", "row", "row"), 5) == ("full", "row", "row", "full", "row")


@pytest.mark.parametrize("pattern", ["full", "row", "column", "convolution"])
def test_attention_is_a_softmax_over_what_is_seen(pattern):
    text, grid = 3, (3, 4)
    length = text + 12
    q, k, v = torch.randn(3, 2, 2, length, 8, generator=torch.Generator().manual_seed(0)).unbind()
    mask = visible(pattern, torch.arange(length), torch.arange(length), text, grid, 3)
    together = attend(q, k, v, None if pattern == "full" else mask)
    alone = [attend(q[:, :, [i]], k, v, mask[i : i + 1]) for i in range(length)]  # as with a cache
    for query in range(length):
        seen = list(range(min(text, query + 1)))
        if query >= text:
            seen += sorted(text + place for place in seen_by_hand(pattern, query - text, *grid, 3))
        weights = ((k[:, :, seen] @ q[:, :, query, :, None])[..., 0] / math.sqrt(8)).softmax(-1)
        expected = (weights.unsqueeze(-1) * v[:, :, seen]).sum(2)
        torch.testing.assert_close(together[:, :, query], expected)
        torch.testing.assert_close(alone[query][:, :, 0], expected)


def test_layers_follow_the_arrangement():
    """A code changes, by way of a single layer, only what its pattern sees."""
    torch.manual_seed(0)
    for pattern in ("row", "column", "convolution"):
        config = GPTConfig(codebook_size=9, code_shape=(1, 4, 4), text_vocab_size=9, text_length=3, dim=16, depth=1,
                           num_heads=2, attention=(pattern,), convolution_kernel=3)  # fmt: skip
        prior = GPTPrior(config).eval()
        torch.nn.init.normal_(prior.decoder.blocks[0].attention.out.weight)
        codes, prefix = torch.randint(0, 9, (1, 16)), prior.pad([[3]])
        before = prior(prefix, codes)
        for j in range(15):
            changed = codes.clone()
            changed[0, j] = (changed[0, j] + 1) % 9
            moved = (prior(prefix, changed) - before).abs().amax(-1)[0] > 1e-6
            # Logits t come from the position that has read code t - 1.
            expected = {t for t in range(1, 16) if j in seen_by_hand(pattern, t - 1, 4, 4, 3)}
            assert set(moved.nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("axes", [1, 2])
def test_rotary_positions_turn_pairs_as_complex_numbers_do(axes):
    text, (height, width), channels = 3, (2, 3), 8
    length = text + height * width
    table = rotation(RotarySpec(axes=axes), text, (height, width), channels, 0, length, torch.device("cpu"))
    x = torch.randn(1, 2, text + height * width, channels, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, table)
    pairs = channels // 2 // axes
    for place in range(text + height * width):
        row, column = divmod(place - text, width)
        coordinates = [place] * axes if axes == 1 or place < text else [text + row, text + column]
        angles = [c * 10_000 ** (-i / pairs) for c in coordinates for i in range(pairs)]
        for i, angle in enumerate(angles):
            number = torch.complex(x[0, :, place, i], x[0, :, place, i + channels // 2])
            expected = number * complex(math.cos(angle), math.sin(angle))
            found = torch.complex(turned[0, :, place, i], turned[0, :, place, i + channels // 2])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rotary_scores_depend_on_the_distance_alone():
    table = rotation(RotarySpec(), 4, (2, 4), 16, 0, 12, torch.device("cpu"))
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(-1, -1, -1, 12, -1).unbind()
    scores = (rotate(q, table) @ rotate(k, table).transpose(-1, -2))[0, 0]
    for distance in range(12):
        along = scores.diagonal(-distance)
        torch.testing.assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-4)


def test_swiglu_and_plain_queries_are_what_their_papers_say():
    torch.manual_seed(0)
    config = GPTConfig(dim=16, depth=1, num_heads=2, mlp="swiglu", mlp_ratio=2, qk_norm=False, text_length=2)
    block = GPTPrior(config).decoder.blocks[0]
    for weight in block.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    x = torch.randn(1, 5, 16)
    w, v = block.mlp_in.weight.chunk(2)  # Shazeer 2020, equation 6: (Swish(xW) * xV) W2
    q, k, values = (x @ block.attention.qkv.weight.T).chunk(3, dim=-1)
    heads = []
    for half in (slice(0, 8), slice(8, 16)):
        scores = q[0, :, half] @ k[0, :, half].T / math.sqrt(8)
        heads.append(scores.masked_fill(torch.ones(5, 5).triu(1) > 0, -math.inf).softmax(-1) @ values[0, :, half])
    torch.testing.assert_close(block.attention(x, View())[0],
                               torch.cat(heads, -1) @ block.attention.out.weight.T)  # fmt: skip
    expected = (x @ w.T).sigmoid() * (x @ w.T) * (x @ v.T) @ block.mlp_out.weight.T
    torch.testing.assert_close(block.mlp(x), expected)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"dim": 24, "num_heads": 4, "positions": "rotary-2d"}, "need a multiple of 4 channels a head, got 6"),
        ({"convolution_kernel": 4}, "convolution_kernel must be odd, got 4"),
        ({"order": "random", "attention": "dalle"}, "a random order needs full attention in all layers"),
        ({"order": "random", "attention": ("full", "row")}, "a random order needs full attention in all layers"),
        ({"attention": ()}, "at least 1 item"),
        ({"attention": ("diagonal",)}, "'full', 'row', 'column' or 'convolution'"),
    ],
)
def test_what_does_not_go_together_is_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        GPTConfig.model_validate({"dim": 32, "num_heads": 4} | wrong)
