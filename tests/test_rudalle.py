"""ruDALL-E becomes a bundle of ours: its GPT equals a reference written from its description, with masks made cell by
cell; its text tokenizer gives the ids of YouTokenToMe 1.0.6 (`golden/youtokentome.json`: a small model and texts)."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines import cli
from pipelines.convert import convert
from pipelines.info import describe
from stage2_prior import Sampling, load_prior, sample
from stage2_prior.convert import rudalle as converter
from stage2_prior.imported.rudalle import RuDALLEPrior
from stage2_prior.masks import Pattern, visible
from tessera.errors import InputError
from tessera.text import TextTokenizer
from tessera.weights.foreign import Weights
from tests.prior_laws import check_laws
from tests.test_convert_tokenizers import random_vqgan

TEXT = json.loads((Path(__file__).parent / "golden" / "youtokentome.json").read_text(encoding="utf-8"))
SIZES = {
    "v3": {"dim": 32, "depth": 6, "heads": 4, "text": 12, "side": 4, "codes": 40, "words": 180},
    "v2": {"dim": 48, "depth": 3, "heads": 2, "text": 9, "side": 3, "codes": 21, "words": 190},
}
PUBLISHED = {"dim": 2048, "depth": 24, "heads": 16, "text": 128, "side": 32, "codes": 8192, "words": 16384}


def shapes(size: dict) -> dict[str, tuple[int, ...]]:
    """The names and shapes of pytorch_model.bin; `words` are those without padding."""
    dim, words = size["dim"], size["words"] + size["text"]
    length = size["text"] + size["side"] ** 2
    found: dict[str, tuple[int, ...]] = {
        "text_embeddings.weight": (words, dim),
        "image_embeddings.weight": (size["codes"], dim),
        "text_pos_embeddings.weight": (size["text"] + 1, dim),
        "image_row_embeddings.weight": (size["side"], dim),
        "image_col_embeddings.weight": (size["side"], dim),
        "to_logits.1.weight": (words + size["codes"], dim),
        "to_logits.1.bias": (words + size["codes"],),
    }
    found |= {f"transformer.{kind}_mask": (length, length) for kind in ("row", "col", "conv")}
    norms = ["to_logits.0", "transformer.final_layernorm"]
    for layer in range(size["depth"]):
        there = f"transformer.layers.{layer}"
        norms += [f"{there}.{name}layernorm" for name in
                  ("input_", "post_attention_", "before_first_addition_", "before_second_addition_")]  # fmt: skip
        linear = {"attention.query_key_value": (3 * dim, dim), "attention.dense": (dim, dim),
                  "mlp.dense_h_to_4h": (4 * dim, dim), "mlp.dense_4h_to_h": (dim, 4 * dim)}  # fmt: skip
        for name, shape in linear.items():
            found |= {f"{there}.{name}.weight": shape, f"{there}.{name}.bias": shape[:1]}
    return found | {f"{norm}.{kind}": (dim,) for norm in norms for kind in ("weight", "bias")}


def random_weights(size: dict) -> dict[str, Tensor]:
    torch.manual_seed(size["dim"])
    return {name: torch.randn(shape) * 0.3 + 0.6 * ("norm" in name) for name, shape in shapes(size).items()}


class Reference:
    """ruDALL-E as its description has it, all positions at once."""

    def __init__(self, size: dict, version: str) -> None:
        self.size, self.version, self.w = size, version, random_weights(size)

    def logits(self, text: Tensor, codes: Tensor) -> Tensor:
        """Ids of its tokenizer, with zeros for padding, and all codes -> (B, L, V + K) of what comes next."""
        size, w = self.size, self.w
        paddings = size["words"] + torch.arange(size["text"])
        text = torch.where(text == 0, paddings, text)
        if self.version == "v2":
            text = F.pad(text, (1, 0), value=2)
        place = torch.arange(size["side"] ** 2)
        words = w["text_embeddings.weight"][text] + w["text_pos_embeddings.weight"][: text.shape[1]]
        rows = w["image_row_embeddings.weight"][place // size["side"]]
        columns = w["image_col_embeddings.weight"][place % size["side"]]
        x = torch.cat([words, w["image_embeddings.weight"][codes] + rows + columns], dim=1)
        x = x[:, : size["text"] + size["side"] ** 2]
        for layer in range(size["depth"]):
            there = f"transformer.layers.{layer}"
            h = self.attention(f"{there}.attention", self.norm(f"{there}.input_layernorm", x), self.mask(layer))
            x = x + self.norm(f"{there}.before_first_addition_layernorm", h)
            h = self.linear(f"{there}.mlp.dense_h_to_4h", self.norm(f"{there}.post_attention_layernorm", x))
            h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            x = x + self.norm(f"{there}.before_second_addition_layernorm", self.linear(f"{there}.mlp.dense_4h_to_h", h))
        x = self.norm("to_logits.0", self.norm("transformer.final_layernorm", x))
        return self.linear("to_logits.1", x)

    def attention(self, name: str, x: Tensor, mask: Tensor) -> Tensor:
        heads = self.size["heads"]
        q, k, v = self.linear(f"{name}.query_key_value", x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores * mask - 10000 * (1 - mask)
        return self.linear(f"{name}.dense", (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    def mask(self, layer: int) -> Tensor:
        kind = "row" if layer % 4 != 1 else "column"
        kind = "square" if kind == "row" and layer == self.size["depth"] - 1 else kind
        return brute_force(kind, self.size["text"], self.size["side"], 5, self.version == "v2").float()

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"], 1e-5)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]


def brute_force(kind: str, text: int, side: int, reach: int, wraps: bool) -> Tensor:
    """(L, L) bool, cell by cell."""
    length = text + side * side
    mask = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(q + 1):
            if k < text:
                mask[q, k] = True
            elif kind == "row":
                mask[q, k] = q - k <= side
            elif kind == "column":
                mask[q, k] = (q - text) % side == (k - text) % side
            else:
                (row, column), (other_row, other_column) = divmod(q - text, side), divmod(k - text, side)
                shifts = (-side, 0, side) if wraps else (0,)
                near_row = any(abs(row - other_row + shift) <= reach for shift in shifts)
                near_column = any(abs(column - other_column + shift) <= reach for shift in shifts)
                mask[q, k] = near_row and near_column
    return mask


@pytest.fixture(scope="module", params=list(SIZES))
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def files(version: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The three files that are published, in small."""
    folder, size = tmp_path_factory.mktemp("rudalle"), SIZES[version]
    torch.save(random_weights(size), folder / f"pytorch_model_{version}.bin")
    vae = random_vqgan(z=6, dim=6)
    vae |= {"quantize.embed.weight": torch.randn(size["codes"], 6), "quantize.proj.bias": torch.randn(size["codes"])}
    vae["quantize.proj.weight"] = torch.randn(size["codes"], 6, 1, 1)
    vae.pop("quantize.embedding.weight")
    torch.save({"state_dict": vae}, folder / "vqgan.gumbelf8-sber.model.ckpt")
    (folder / "bpe.model").write_text(TEXT["model"])
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def bundle(version: str, files: list[Path]) -> Path:
    heads = SIZES[version]["heads"]
    return convert("rudalle", files, files[0].parent / "bundle", settings=[f"num_heads={heads}"])


@pytest.fixture(scope="module")
def prior(bundle: Path) -> RuDALLEPrior:
    loaded = load_prior(bundle / "prior")
    assert isinstance(loaded, RuDALLEPrior)
    return loaded


@torch.no_grad()
def test_logits_and_greedy_codes_equal_the_reference(version: str, prior: RuDALLEPrior) -> None:
    size, reference = SIZES[version], Reference(SIZES[version], version)
    words = size["words"] + size["text"]
    assert prior.text_tokenizer is not None
    ids = [[2, *(i - 3 for i in prior.text_tokenizer.encode(text)), 3] for text in ("кот", "")]
    text = torch.tensor([row + [0] * (size["text"] - len(row)) for row in ids])
    codes, prefix = torch.randint(size["codes"], (2, prior.length)), prior.prefix(["кот", ""])
    first = prior.prefix_length - 1  # the position that foretells the first code
    assert first == size["text"] - (version == "v3")

    expected, found = reference.logits(text, codes), prior.predict(prefix, codes)
    image = expected[:, first : first + prior.length, words:]
    torch.testing.assert_close(found.codes, image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.text, expected[:, :first, :words], rtol=1e-4, atol=1e-4)

    greedy = torch.zeros_like(codes)
    for t in range(prior.length):
        greedy[:, t] = reference.logits(text, greedy)[:, first + t, words:].argmax(-1)
    assert torch.equal(sample(prior, prefix, [0, 1], Sampling(top_k=1)), greedy)


def test_laws(prior: RuDALLEPrior) -> None:
    check_laws(prior, prior.prefix(["кот", "дом"]), guided=False)
    with pytest.raises(InputError, match="never trained without its text"):
        sample(prior, prior.prefix(["кот"]), [0], Sampling(guidance_scale=2))


@pytest.mark.parametrize("wraps", [False, True])
@pytest.mark.parametrize("kind", ["row", "column", "square"])
@pytest.mark.parametrize(("text", "side", "reach"), [(5, 7, 2), (3, 4, 5), (1, 1, 0)])
def test_patterns_equal_brute_force(kind: Pattern, text: int, side: int, reach: int, wraps: bool) -> None:
    places, pattern = torch.arange(text + side**2), "wrapped-square" if kind == "square" and wraps else kind
    mask = visible(pattern, places, places, text, (side, side), 2 * reach + 1)
    assert torch.equal(mask, brute_force(kind, text, side, reach, wraps))


def test_text_is_read_as_youtokentome_reads_it(tmp_path: Path) -> None:
    (tmp_path / "bpe.model").write_text(TEXT["model"])
    tokenizer = converter.read_text_tokenizer(tmp_path / "bpe.model")
    for text, ids in TEXT["cases"]:
        assert [i - 3 for i in tokenizer.encode(text)] == ids, text
    assert tokenizer.encode("КРАСНЫЙ Кот") == tokenizer.encode("красный кот")


def test_prompts_are_padded_by_position_and_too_long_ones_refused(version: str, prior: RuDALLEPrior) -> None:
    size = SIZES[version]
    ids = prior.prefix(["", "кот"])
    start = [2, 2] if version == "v2" else [2]
    assert ids[0].tolist() == [*start, 3, *range(size["words"] + 2, size["words"] + size["text"])]
    assert torch.equal(prior.null_prefix(1), ids[:1])
    assert prior.pad([[10] * 99])[0].tolist() == [*start, *[7] * (size["text"] - 1)]
    with pytest.raises(InputError, match=f"the prior reads at most {size['text'] - 2}"):
        prior.prefix(["ж з и й к л м н о п р с т"])


def test_it_draws_from_the_command_line(
    version: str, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["кот", "--model", bundle, "--candidates", "2", "-n", "1", "-o", tmp_path / "out", "--device", "cpu"]
    assert cli.main(["generate", *map(str, arguments)]) == 0
    assert list((tmp_path / "out").glob("*.png"))
    capsys.readouterr()
    assert cli.main(["info", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "ai-forever/ru-dalle" in shown and "Apache-2.0" in shown
    assert describe(bundle)["prior"]["version"] == version


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    path = tmp_path_factory.mktemp("text") / "bpe.model"
    path.write_text(TEXT["model"])
    return converter.read_text_tokenizer(path)


@pytest.mark.parametrize(("depth", "dim", "heads"), [(24, 2048, 16), (64, 3840, 60)])
def test_the_published_sizes_are_known_by_every_name(
    depth: int, dim: int, heads: int, text_tokenizer: TextTokenizer
) -> None:
    size = PUBLISHED | {"depth": depth, "dim": dim}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes(size).items()}
    weights = Weights(tensors, "pytorch_model.bin", converter.IGNORED)
    built = converter.read(weights, converter.Settings(version="v3"), text_tokenizer)
    assert built.config.num_heads == heads
    assert built.config.text_length == 128 and built.code_shape == (1, 32, 32)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "sentence"),
    [
        ("pytorch_model.bin", {"num_heads": 4}, "does not say which version it is"),
        ("pytorch_model_v3.bin", {}, "give their number with --set num_heads=N"),
        ("pytorch_model_v3.bin", {"num_heads": 5}, "dim must be divisible by num_heads, got 32 and 5"),
    ],
)
def test_what_the_weights_do_not_say_has_to_be_given(
    name: str, given: dict, sentence: str, text_tokenizer: TextTokenizer
) -> None:
    weights = Weights(random_weights(SIZES["v3"]), name, converter.IGNORED)
    with pytest.raises(ValueError, match=sentence):
        converter.read(weights, converter.Settings(**given), text_tokenizer)


def test_weights_that_do_not_fit_are_named(text_tokenizer: TextTokenizer) -> None:
    given = converter.Settings(version="v3", num_heads=4)

    def refusal(**changes: Tensor | None) -> str:
        tensors = random_weights(SIZES["v3"]) | changes
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        with pytest.raises(InputError) as caught:
            converter.read(Weights(kept, "pytorch_model.bin", converter.IGNORED), given, text_tokenizer)
        return str(caught.value)

    missing = "transformer.layers.2.attention.dense.bias"
    assert f"lacks 1 weights: {missing}" in refusal(**{missing: None})
    assert "beyond what this family knows, 1 weights: mystery" in refusal(mystery=torch.zeros(2))
    assert "lacks the weight 'text_embeddings.weight'" in refusal(**{"text_embeddings.weight": None})
    assert "'to_logits.1.bias' has 9 rows, but 232 were expected" in refusal(**{"to_logits.1.bias": torch.zeros(9)})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: "\0 not a model", "is not a text model of YouTokenToMe"),
        (lambda text: text[: len(text) // 2], "is not a text model of YouTokenToMe"),
        (lambda text: text.replace("1 0 2 3", "0 1 2 3"), r"has unknown, padding, start and end as \[0, 1, 2, 3\]"),
        (lambda text: text.rsplit("\n", 2)[0].rsplit("\n", 1)[0] + "\n999 4 300\n1 0 2 3\n", "the merge of 999 and 4"),
    ],
)
def test_other_text_models_are_refused(change, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "bpe.model").write_text(change(TEXT["model"]))
    with pytest.raises(InputError, match=sentence):
        converter.read_text_tokenizer(tmp_path / "bpe.model")


def test_without_files_the_command_says_what_to_get(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in ([], [tmp_path / "nothing"], [files[0]]):
        assert cli.main(["convert", "rudalle", *map(str, given), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert "sberbank-ai/rudalle-Malevich" in said and "bpe.model" in said and said.count("\n") == 1
