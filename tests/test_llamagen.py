"""LlamaGen's priors: logits and greedy codes equal transformers' Llama, which is given their positions and masks.

The Llama of the reference has the same weights, with each head's channels put in the order that transformers turns them
in; what LlamaGen does differently (two-dimensional positions, zeros for the prefix, padding, captions) is written here
from its description.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from pipelines import cli
from pipelines.convert import convert
from pipelines.info import describe
from pipelines.text_to_image import TextToImagePipeline
from stage2_prior import Sampling, load_prior, sample
from stage2_prior.captions import clean
from stage2_prior.convert import convert as convert_prior
from stage2_prior.convert import llamagen as converter
from stage2_prior.imported.llamagen import LlamaGenPrior
from tessera.errors import InputError
from tessera.weights.foreign import Weights
from tests.prior_laws import check_laws
from tests.test_convert_tokenizers import random_vqgan, to_llamagen

GOLDEN = Path(__file__).parent / "golden"
CODES, FEATURES, PREFIX = 41, 24, 10  # codes of the prior and its tokenizer; channels and number of text features
SIZES = {
    "a": {"dim": 32, "depth": 3, "heads": 4, "kv": 4, "mlp": 48, "side": 4},
    "b": {"dim": 48, "depth": 2, "heads": 4, "kv": 2, "mlp": 40, "side": 3},
}
WORDS = "a red heart above blue circle cat dog </s> <pad> <unk>".split()


def random_weights(size: dict, by_text: bool, classes: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(size["dim"] + by_text)
    dim, width = size["dim"], size["dim"] // size["heads"]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape) * 1.5 / math.sqrt(shape[-1])

    weights = {
        "tok_embeddings.weight": torch.randn(CODES, dim),
        "output.weight": draw(CODES, dim),
        "norm.weight": 1 + 0.2 * torch.randn(dim),
    }
    if by_text:
        weights |= {
            "cls_embedding.uncond_embedding": torch.randn(PREFIX, FEATURES),
            "cls_embedding.cap_proj.fc1.weight": draw(dim, FEATURES),
            "cls_embedding.cap_proj.fc2.weight": draw(dim, dim),
        }
    else:
        weights["cls_embedding.embedding_table.weight"] = torch.randn(classes + 1, dim)
    for layer in range(size["depth"]):
        weights |= {
            f"layers.{layer}.{name}.weight": tensor
            for name, tensor in {
                "attention.wqkv": draw(dim + 2 * size["kv"] * width, dim),
                "attention.wo": draw(dim, dim),
                "feed_forward.w1": draw(size["mlp"], dim),
                "feed_forward.w3": draw(size["mlp"], dim),
                "feed_forward.w2": draw(dim, size["mlp"]),
                "attention_norm": 1 + 0.2 * torch.randn(dim),
                "ffn_norm": 1 + 0.2 * torch.randn(dim),
            }.items()
        }
    return weights


class TwoDimensional(nn.Module):
    """Cosines and sines for transformers' Llama: zeros for the prefix, then the grid row by row."""

    def __init__(self, prefix: int, side: int, width: int) -> None:
        super().__init__()
        rows = [[0.0] * width] * prefix
        columns = [[0.0] * width] * prefix
        quarter = width // 4
        for row in range(side):
            for column in range(side):
                angles = [row / 10000 ** (2 * i / (width / 2)) for i in range(quarter)]
                angles += [column / 10000 ** (2 * i / (width / 2)) for i in range(quarter)]
                rows.append([math.cos(angle) for angle in angles] * 2)
                columns.append([math.sin(angle) for angle in angles] * 2)
        self.cos, self.sin = torch.tensor(rows), torch.tensor(columns)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.cos[None, : x.shape[1]], self.sin[None, : x.shape[1]]


class Reference:
    def __init__(self, weights: dict[str, Tensor], size: dict, prefix: int) -> None:
        self.w, self.prefix = weights, prefix
        width, dim = size["dim"] // size["heads"], size["dim"]
        config = LlamaConfig(
            vocab_size=CODES, hidden_size=dim, intermediate_size=size["mlp"], num_hidden_layers=size["depth"],
            num_attention_heads=size["heads"], num_key_value_heads=size["kv"], rms_norm_eps=1e-5,
        )  # fmt: skip
        config._attn_implementation = "eager"
        self.llama = LlamaModel(config).eval()
        self.llama.rotary_emb = TwoDimensional(prefix, size["side"], width)
        order = torch.cat(
            [torch.arange(0, width, 2), torch.arange(1, width, 2)]
        )  # pairs (i, i + d / 2) of transformers

        def reordered(weight: Tensor) -> Tensor:
            return weight.view(-1, width, dim)[:, order].reshape(-1, dim)

        state = {"embed_tokens.weight": weights["tok_embeddings.weight"], "norm.weight": weights["norm.weight"]}
        for layer in range(size["depth"]):
            theirs = {
                name.removeprefix(f"layers.{layer}.").removesuffix(".weight"): weight
                for name, weight in weights.items()
                if name.startswith(f"layers.{layer}.")
            }
            q, k, v = theirs["attention.wqkv"].split([dim, size["kv"] * width, size["kv"] * width])
            state |= {
                f"layers.{layer}.{name}.weight": weight
                for name, weight in {
                    "self_attn.q_proj": reordered(q), "self_attn.k_proj": reordered(k), "self_attn.v_proj": v,
                    "self_attn.o_proj": theirs["attention.wo"], "mlp.gate_proj": theirs["feed_forward.w1"],
                    "mlp.up_proj": theirs["feed_forward.w3"], "mlp.down_proj": theirs["feed_forward.w2"],
                    "input_layernorm": theirs["attention_norm"], "post_attention_layernorm": theirs["ffn_norm"],
                }.items()
            }  # fmt: skip
        self.llama.load_state_dict(state)

    @torch.no_grad()
    def logits(self, embedded: Tensor, padding: list[int], codes: Tensor) -> Tensor:
        """Prefixes (B, P, E), of which the first `padding` positions are none, and codes (B, T) -> (B, T, K)."""
        x = torch.cat([embedded, self.w["tok_embeddings.weight"][codes[:, :-1]]], dim=1)
        length = x.shape[1]
        mask = torch.full((len(x), 1, length, length), -torch.inf)
        for row, hidden in enumerate(padding):
            for query in range(length):
                for key in range(query + 1):
                    if key >= hidden or key == query:
                        mask[row, 0, query, key] = 0
        hidden_states = self.llama(inputs_embeds=x, attention_mask=mask).last_hidden_state
        return hidden_states[:, self.prefix - 1 :] @ self.w["output.weight"].T

    def caption(self, features: Tensor) -> Tensor:
        inner = features @ self.w["cls_embedding.cap_proj.fc1.weight"].T
        gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        return gelu @ self.w["cls_embedding.cap_proj.fc2.weight"].T

    def greedy(self, conditional: Tensor, unconditional: Tensor, padding: list[int], scale: float, length: int):
        codes = torch.zeros(len(conditional), length, dtype=torch.int64)
        for t in range(length):
            given = self.logits(conditional, padding, codes)[:, t]
            without = self.logits(unconditional, padding, codes)[:, t]
            codes[:, t] = (without + scale * (given - without)).argmax(-1)
        return codes


def write_tokenizer(folder: Path, factor_levels: int = 2) -> None:
    """A VQ of LlamaGen's layout with as many codes as the priors here, and a factor of 2."""
    kept = to_llamagen(random_vqgan(codes=CODES), factor_levels)
    torch.save({"model": kept}, folder / "vq_ds2_c2i.pt")


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    """A tiny random T5 with a tokenizer of words, as a local folder."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS), d_model=FEATURES, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        pad_token_id=WORDS.index("<pad>"), eos_token_id=WORDS.index("</s>"),
    )  # fmt: skip
    encoder = T5EncoderModel(config)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.5)
    encoder.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", WORDS.index("</s>"))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[("class", "a"), ("class", "b"), ("text", "a"), ("text", "b")], ids="-".join)
def pair(request, t5, tmp_path_factory) -> tuple[Reference, Path]:
    """The reference, and the bundle converted from its weights."""
    kind, name = request.param
    size, folder = SIZES[name], tmp_path_factory.mktemp("llamagen")
    weights = random_weights(size, kind == "text")
    file = folder / f"{kind[0]}2i_tiny_{2 * size['side']}.pt"
    torch.save({"model": weights, "steps": 3}, file)
    write_tokenizer(folder)
    settings = [f"num_heads={size['heads']}", *([f"text_encoder={t5}"] if kind == "text" else [])]
    bundle = convert("llamagen", [folder], folder / "bundle", settings=settings)
    return Reference(weights, size, PREFIX if kind == "text" else 1), bundle


def features(t5: Path, texts: list[str]) -> tuple[Tensor, list[int]]:
    """T5's features of each text (B, P, C), pushed to the right, with the number of zeros to their left."""
    encoder = T5EncoderModel.from_pretrained(t5).eval()
    made, padding = torch.zeros(len(texts), PREFIX, FEATURES), []
    for row, text in enumerate(texts):
        ids = torch.tensor([[*(WORDS.index(word) for word in text.split()), WORDS.index("</s>")]])
        with torch.no_grad():
            own = encoder(input_ids=ids).last_hidden_state[0]
        made[row, PREFIX - len(own) :] = own
        padding.append(PREFIX - len(own))
    return made, padding


def conditions(prior: LlamaGenPrior, reference: Reference, t5: Path) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Two prefixes of ours; of the reference, what they are embedded as, the same without a condition, the padding."""
    if prior.condition == "class":
        table = reference.w["cls_embedding.embedding_table.weight"]
        return prior.prefix(classes=[2, 6]), table[[2, 6]][:, None], table[[7, 7]][:, None], [0, 0]
    texts = ["a red heart", "blue circle above a cat dog"]
    found, padding = features(t5, texts)
    none = reference.w["cls_embedding.uncond_embedding"].expand(2, -1, -1)
    return prior.prefix(texts), reference.caption(found), reference.caption(none), padding


def test_logits_equal_the_reference(pair, t5):
    reference, bundle = pair
    prior = load_prior(bundle / "prior")
    assert isinstance(prior, LlamaGenPrior)
    prefix, embedded, without, padding = conditions(prior, reference, t5)
    codes = torch.randint(0, CODES, (2, prior.length))
    expected = reference.logits(embedded, padding, codes)
    assert expected.std() > 0.3
    torch.testing.assert_close(prior(prefix, codes), expected, rtol=1e-4, atol=1e-4)
    nulls = prior.unconditional(prefix).expand(2, *prefix.shape[1:])
    torch.testing.assert_close(prior(nulls, codes), reference.logits(without, padding, codes), rtol=1e-4, atol=1e-4)
    nobody = prior(prior.null_prefix(2), codes)
    torch.testing.assert_close(nobody, reference.logits(without, [0, 0], codes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_greedy_codes_equal_the_reference(pair, t5, scale):
    reference, bundle = pair
    prior = load_prior(bundle / "prior")
    prefix, embedded, without, padding = conditions(prior, reference, t5)
    drawn = sample(prior, prefix, [0, 0], Sampling(top_k=1, guidance_scale=scale))
    assert torch.equal(drawn, reference.greedy(embedded, without, padding, scale, prior.length))


def test_laws(pair, t5):
    reference, bundle = pair
    prior = load_prior(bundle / "prior")
    check_laws(prior, conditions(prior, reference, t5)[0])


def test_bundle_draws_and_says_where_it_is_from(pair, tmp_path):
    bundle = pair[1]
    prior = load_prior(bundle / "prior")
    what = ["a red heart"] if prior.condition == "text" else ["--class", "3"]
    command = ["generate", *what, "--model", str(bundle), "-n", "1", "--candidates", "2", "-o", str(tmp_path / "out")]
    assert cli.main([*command, "--device", "cpu"]) == 0
    name = "a-red-heart" if prior.condition == "text" else "class-3"
    (picture,) = (path for path in (tmp_path / "out").glob(f"{name}*.png") if "candidates" not in path.name)
    assert cli.main(["generate", "--replay", str(picture), "--model", str(bundle), "-o", str(tmp_path / "again"),
                     "--device", "cpu"]) == 0  # fmt: skip
    report = describe(bundle)
    assert report["prior"]["origin"]["weights_licence"] == "MIT"
    assert report["sampling"]["guidance_scale"] == (7.5 if prior.condition == "text" else 4.0)


@pytest.mark.parametrize(
    ("keys", "side", "millions"),  # 111 as LlamaGen states it
    [("llamagen_c2i_B", 16, 111), ("llamagen_t2i_XL", 32, 778)],
)
def test_every_key_of_the_published_checkpoints_has_its_place(keys, side, millions):
    tensors = {}
    for line in (GOLDEN / f"{keys}.txt").read_text().splitlines():
        name, shape = line.split("\t")
        tensors[name] = torch.empty([int(length) for length in shape.split("x")], device="meta")
    total = sum(tensor.numel() for tensor in tensors.values())
    prior = converter.read(Weights(dict(tensors), keys, converter.IGNORED), converter.Settings(), side)
    assert sum(parameter.numel() for parameter in prior.parameters()) == total
    assert prior.length == side**2
    assert prior.prefix_length == (120 if "t2i" in keys else 1)
    assert round(total / 1e6) == millions


# Captions -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Red  Heart", "a red heart"),
        ("cat &amp; dog <b>bold</b>", "cat dog bold"),
        ("see https://example.com/cat.png a cat", None),
        ("photo by @nick: a dog", "photo by: a dog"),
        ("猫 a cat 猫", "a cat"),
        ("“a cat”", "a cat"),
        ("a—b", "a-b"),
        ("cat.jpg on a mat", "on a mat"),
        ("order 1234567 now, free shipping", "order now"),
        ("this-is-my-cute-cat", "this is my cute cat"),
        ("a picture 300x200", "a picture"),
        ("<script>alert(1)</script> cat", "cat"),
        ("big%20cat+dog", "big cat dog"),
        ("it is \\n new", "it is new"),
        ("a cat #12 dsc01234", "a cat"),
        ("wow...", "wow"),
    ],
)
def test_captions_are_cleaned(text, cleaned):
    twice = clean(clean(text))
    if cleaned is None:
        assert "http" not in twice and "png" not in twice and twice.endswith("a cat")
    else:
        assert twice == cleaned


# Bad input ------------------------------------------------------------------------------------------------------------


def test_bad_conditions(pair):
    prior = load_prior(pair[1] / "prior")
    if prior.condition == "class":
        with pytest.raises(InputError, match=r"class labels must be in \[0, 7\), got 7"):
            prior.prefix(classes=[7])
        with pytest.raises(InputError, match="this prior draws from class labels and was given text"):
            prior.prefix(["a cat"])
        pipeline = TextToImagePipeline.from_pretrained(pair[1], device="cpu")
        with pytest.raises(InputError, match="draws from class labels, say --class 0 or 'class 0', got 'a cat'"):
            pipeline("a cat")
        assert torch.equal(pipeline("class 2", num_candidates=1).codes, pipeline("2", num_candidates=1).codes)
    else:
        with pytest.raises(InputError, match=f"the prompt has 12 tokens, the prior reads at most {PREFIX}"):
            prior.prefix(["a " * 11])
        with pytest.raises(InputError, match="this prior draws from text and was given class labels"):
            prior.prefix(classes=[0])
        with pytest.raises(InputError, match="was given text and class labels"):
            prior.prefix(["a"], classes=[0])
        with pytest.raises(InputError, match="was given no condition"):
            prior.prefix()


def test_bad_sources(t5, tmp_path, capsys):
    def refused(sources: list[Path], *settings: str) -> str:
        with pytest.raises(InputError) as caught:
            convert("llamagen", sources, tmp_path / "out", settings=settings)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    weights = random_weights(SIZES["a"], by_text=True)
    file = tmp_path / "t2i_tiny_8.pt"
    torch.save({"model": weights}, file)
    assert "t2i_XL_stage1_256.pt" in refused([]) and "google/flan-t5-xl" in refused([])
    assert cli.main(["convert", "llamagen", "--out", str(tmp_path / "out")]) == 2
    assert "peizesun/llamagen_t2i" in capsys.readouterr().err
    size = "image_size=64"
    assert "--set num_heads=N" in refused([file], size)
    assert "a multiple of 4 channels a head" in refused([file], size, "num_heads=16")
    assert "text_encoder must be a folder or a hub" in refused([file], size, "num_heads=4", "text_encoder=/no/where")
    assert f"no T5 with features of {FEATURES}" in refused([file], size, "num_heads=4", f"text_encoder={tmp_path}")
    given = ("num_heads=4", f"text_encoder={t5}")
    assert "published without an image tokenizer" in refused([file], *given, size)
    assert "must be a multiple of the 16 pixels" in refused([file], *given)
    write_tokenizer(tmp_path)
    vq = tmp_path / "vq_ds2_c2i.pt"
    (tmp_path / "plain").mkdir()
    plain = tmp_path / "plain" / "prior.pt"
    torch.save(weights, plain)
    assert "does not say how large its pictures are" in refused([plain, vq], *given)
    assert "unknown key 'heads'" in refused([plain, vq], "heads=4")
    lacking = {name: tensor for name, tensor in weights.items() if name != "layers.1.ffn_norm.weight"}
    torch.save({"model": lacking}, file)
    assert "lacks 1 weights: layers.1.ffn_norm.weight" in refused([file, vq], *given)
    torch.save({"model": weights | {"layers.0.extra.weight": torch.ones(2)}}, file)
    assert "1 weights: layers.0.extra.weight" in refused([file, vq], *given)
    torch.save({"model": weights | {"layers.0.attention.kv_cache.k_cache": torch.ones(2)}}, file)
    assert convert("llamagen", [file, vq], tmp_path / "fine", settings=given).is_dir()
    torch.save({"model": weights}, tmp_path / "t2i_other_8.pt")
    assert "are 2 checkpoints; give the one" in refused([tmp_path], *given)


def test_a_prior_with_prefixes_in_shards_and_with_an_average(tmp_path):
    size = SIZES["a"]
    weights = random_weights(size, False)
    doubled = {name: 2 * tensor for name, tensor in weights.items()}
    names = list(weights)
    for number in (1, 2):
        half = names[number - 1 :: 2]
        content = {
            "model": {f"_orig_mod.module.{name}": weights[name] for name in half},
            "ema": {f"module.{name}": doubled[name] for name in half},
        }
        torch.save(content, tmp_path / f"c2i_tiny-{number:05}-of-00002.pt")
    given = {"num_heads": size["heads"], "image_size": str(16 * size["side"])}
    for wanted, expected in (("model", weights), ("ema", doubled)):
        prior = convert_prior("llamagen", [tmp_path], given, wanted).prior
        assert prior.config.origin.weights == wanted
        assert torch.equal(prior.get_parameter("decoder.norm.weight"), expected["norm.weight"])
    with pytest.raises(InputError, match="at most 16384, got 1600000"):
        convert_prior("llamagen", [tmp_path], given | {"image_size": "1600000"}, "model")


def test_a_text_encoder_that_is_not_here(t5, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    weights = random_weights(SIZES["a"], by_text=True)
    torch.save({"model": weights}, tmp_path / "t2i_tiny_8.pt")
    write_tokenizer(tmp_path)
    bundle = convert("llamagen", [tmp_path], tmp_path / "bundle", settings=["num_heads=4"])
    prior = load_prior(bundle / "prior")
    with pytest.raises(InputError, match="T5 encoder google/flan-t5-xl, which is not here, nor did the hub give it"):
        prior.prefix(["a cat"])
    codes = torch.zeros(1, prior.length, dtype=torch.int64)
    assert prior(prior.null_prefix(1), codes).isfinite().all()  # what needs no text does without it


def test_zeros_in_the_prefix_are_not_the_identity():
    """With the identity in their place the logits are others, so the tests above would notice."""
    size = SIZES["a"]
    weights = random_weights(size, by_text=False)
    reference = Reference(weights, size, prefix=1)
    embedded = weights["cls_embedding.embedding_table.weight"][[1]][:, None]
    codes = torch.randint(0, CODES, (1, 16))
    zeros = reference.logits(embedded, [0], codes)
    reference.llama.rotary_emb.cos[0] = 1
    identity = reference.logits(embedded, [0], codes)
    assert (zeros - identity).abs().max() > 1e-2
    assert F.cosine_similarity(zeros.flatten(), identity.flatten(), dim=0) < 0.9999


def test_heads_are_those_of_the_published_sizes():
    """LlamaGen's B, L, XL, XXL and 3B: 64 numbers a head, 100 in the largest."""
    widths = {(12, 768): 64, (24, 1024): 64, (36, 1280): 64, (48, 1536): 64, (24, 3200): 100}
    assert {size: size[1] // heads for size, heads in converter.HEADS.items()} == widths


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing.pt is neither a file nor a folder"):
        convert_prior("llamagen", [tmp_path / "nothing.pt"])
    with pytest.raises(InputError, match="llamagen needs its files"):
        convert_prior("llamagen", [])
