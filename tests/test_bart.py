"""The encoder-decoder of DALL·E mini: laws, training, and min-dalle's checkpoints, whose logits and greedy codes equal
a reference written from their description."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor

from pipelines import cli
from pipelines.convert import convert
from pipelines.info import describe
from stage2_prior import Sampling, load_prior, sample
from stage2_prior.bart import BartConfig, BartPrior, Encoder, spell_emoji
from stage2_prior.codes import Codes
from stage2_prior.convert import min_dalle as converter
from stage2_prior.decoder import CrossAttention
from stage2_prior.train import Objective
from tessera.errors import InputError
from tessera.text import TextTokenizer
from tessera.weights.foreign import Weights
from tests.prior_laws import check_laws
from tests.test_convert_tokenizers import random_vqgan

SIZES = {  # decoders have `spare` more rows than codes and the start token
    "mini": {"dim": 32, "encoder": 2, "decoder": 3, "heads": 4, "mlp": 20, "text": 10, "side": 4, "codes": 40,
             "words": 330, "spare": 0},
    "mega": {"dim": 48, "encoder": 3, "decoder": 2, "heads": 2, "mlp": 36, "text": 7, "side": 3, "codes": 21,
             "words": 340, "spare": 4},
}  # fmt: skip
PUBLISHED = {
    "mini": {"dim": 1024, "encoder": 12, "decoder": 12, "heads": 16, "mlp": 2730, "text": 64, "side": 16,
             "codes": 16384, "words": 50264, "spare": 0},
    "mega": {"dim": 2048, "encoder": 24, "decoder": 24, "heads": 32, "mlp": 4096, "text": 64, "side": 16,
             "codes": 16384, "words": 50272, "spare": 31},
}  # fmt: skip
SPACE = "\u0120"
WORDS = "a red heart above the blue circle smiling cat"


def shapes(size: dict) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """The names and shapes of encoder.pt and decoder.pt: norms that were trained without a scale have none."""
    dim, mlp = size["dim"], size["mlp"]
    rows = size["codes"] + 1 + size["spare"]

    def half(depth: int, table: int, positions: int, attentions: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {
            "embed_tokens.weight": (table, dim),
            "embed_positions.weight": (positions, dim),
            "layernorm_embedding.weight": (dim,),
            "layernorm_embedding.bias": (dim,),
            "final_ln.bias": (dim,),
        }
        for layer, attention in itertools.product(range(depth), attentions):
            there = f"layers.{layer}"
            found |= {f"{there}.{attention}.{part}_proj.weight": (dim, dim) for part in ("k", "v", "q", "out")}
            found |= {f"{there}.{attention}_layer_norm.{kind}": (dim,) for kind in ("weight", "bias")}
            found |= {f"{there}.pre_{attention}_layer_norm.bias": (dim,)}
            found |= {f"{there}.glu.ln0.bias": (dim,), f"{there}.glu.ln1.bias": (mlp,)}
            found |= {f"{there}.glu.fc0.weight": (mlp, dim), f"{there}.glu.fc1.weight": (mlp, dim)}
            found |= {f"{there}.glu.fc2.weight": (dim, mlp)}
        return found

    decoder = half(size["decoder"], rows, size["side"] ** 2, ("self_attn", "encoder_attn"))
    return half(size["encoder"], size["words"], size["text"], ("self_attn",)), decoder | {"lm_head.weight": (rows, dim)}


def random_weights(size: dict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    torch.manual_seed(size["dim"])
    encoder, decoder = (
        {name: torch.randn(shape) * 0.4 + 0.6 * name.endswith(("norm.weight", "embedding.weight"))
         for name, shape in half.items()}
        for half in shapes(size)
    )  # fmt: skip
    return encoder, decoder


class Reference:
    """min-dalle's model as its description has it, all positions at once."""

    def __init__(self, size: dict, start: int | None = None) -> None:
        self.size, self.start = size, size["codes"] + size["spare"] if start is None else start
        encoder, decoder = random_weights(size)
        self.w = {f"e.{name}": w for name, w in encoder.items()} | {f"d.{name}": w for name, w in decoder.items()}

    def logits(self, text: Tensor, codes: Tensor) -> Tensor:
        """Ids (B, P) with 1 for padding, and codes (B, T) -> (B, T, K)."""
        hidden = (text == 1)[:, None, None]
        x = self.embed("e", text)
        for layer in range(self.size["encoder"]):
            x = self.attend(f"e.layers.{layer}", "self_attn", x, None, hidden)
            x = x + self.mlp(f"e.layers.{layer}.glu", x)
        text_states = self.norm("e.final_ln", x)
        x = self.embed("d", F.pad(codes[:, :-1], (1, 0), value=self.start))
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        for layer in range(self.size["decoder"]):
            x = self.attend(f"d.layers.{layer}", "self_attn", x, None, future)
            x = self.attend(f"d.layers.{layer}", "encoder_attn", x, text_states, hidden)
            x = x + self.mlp(f"d.layers.{layer}.glu", x)
        return (self.norm("d.final_ln", x) @ self.w["d.lm_head.weight"].T)[..., : self.size["codes"]]

    def embed(self, half: str, ids: Tensor) -> Tensor:
        x = self.w[f"{half}.embed_tokens.weight"][ids] + self.w[f"{half}.embed_positions.weight"][: ids.shape[1]]
        return self.norm(f"{half}.layernorm_embedding", x)

    def attend(self, layer: str, kind: str, x: Tensor, other: Tensor | None, hidden: Tensor) -> Tensor:
        h = self.norm(f"{layer}.pre_{kind}_layer_norm", x)
        keys = h if other is None else other
        q, k, v = (
            (source @ self.w[f"{layer}.{kind}.{part}_proj.weight"].T).unflatten(-1, (self.size["heads"], -1))
            for part, source in (("q", h), ("k", keys), ("v", keys))
        )
        scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / q.shape[-1] ** 0.5
        mixed = torch.einsum("bhqk,bkhc->bqhc", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).flatten(2)
        return x + self.norm(f"{layer}.{kind}_layer_norm", mixed @ self.w[f"{layer}.{kind}.out_proj.weight"].T)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.ln0", x)
        gate, value, out = (self.w[f"{name}.fc{i}.weight"] for i in range(3))
        h = 0.5 * (h @ gate.T) * (1 + torch.erf(h @ gate.T / 2**0.5)) * (h @ value.T)
        return self.norm(f"{name}.ln1", h) @ out.T

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.w.get(f"{name}.weight"), self.w[f"{name}.bias"], 1e-5)


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A BPE over ASCII with a few merges, in BART's order of specials."""
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *(chr(i) for i in range(33, 127)), SPACE]
    merges = [("h", "e"), ("a", "r"), ("he", "ar"), ("hear", "t"), (SPACE, "heart"), (SPACE, "a"), ("e", "d"),
              ("c", "a"), ("ca", "t"), (SPACE, "r"), (SPACE + "r", "ed"), ("_", "heart")]  # fmt: skip
    tokens += [first + second for first, second in merges]
    return {token: i for i, token in enumerate(tokens)}, merges


def brute_force(text: str) -> list[int]:
    """Ids without <s> and </s>: of each word the first pair of the lowest rank is merged until there is none."""
    ids, merges = vocabulary()
    found = []
    for word in "".join(letter for letter in text.lower() if letter.isascii()).split(" "):
        parts = [SPACE, *word] if word else []
        while pairs := [pair for pair in itertools.pairwise(parts) if pair in merges]:
            best = min(pairs, key=merges.index)
            at = next(i for i, pair in enumerate(itertools.pairwise(parts)) if pair == best)
            parts[at : at + 2] = ["".join(best)]
        found += [ids.get(part, 3) for part in parts]
    return found


@pytest.fixture(scope="module", params=list(SIZES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def files(name: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The five files that are published, in small."""
    folder, suffix = tmp_path_factory.mktemp("min_dalle"), "_mini" if name == "mini" else ""
    for half, weights in zip(("encoder", "decoder"), random_weights(SIZES[name]), strict=True):
        torch.save(weights, folder / f"{half}{suffix}.pt")
    ids, merges = vocabulary()
    (folder / f"vocab{suffix}.json").write_text(json.dumps(ids))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / f"merges{suffix}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    weights = random_vqgan(codes=SIZES[name]["codes"])
    decoder = {key: w for key, w in weights.items() if key.startswith(("decoder.", "post_quant_conv."))}
    torch.save({"embedding.weight": weights["quantize.embedding.weight"], **decoder}, folder / "detoker.pt")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def bundle(name: str, files: list[Path]) -> Path:
    heads = SIZES[name]["heads"]
    return convert("min-dalle", [files[0].parent], files[0].parent / "bundle", settings=[f"num_heads={heads}"])


@pytest.fixture(scope="module")
def prior(bundle: Path) -> BartPrior:
    loaded = load_prior(bundle / "prior")
    assert isinstance(loaded, BartPrior)
    return loaded


@pytest.fixture(scope="module")
def text_tokenizer(files: list[Path]) -> TextTokenizer:
    return converter.read_text_tokenizer(*(next(f for f in files if f.name.startswith(n)) for n in ("vocab", "merges")))


def their_ids(size: dict, *texts: str) -> Tensor:
    rows = [[0, *brute_force(text), 2] for text in texts]
    return torch.tensor([row + [1] * (size["text"] - len(row)) for row in rows])


# Public checkpoints ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_and_guided_greedy_codes_equal_the_reference(name: str, prior: BartPrior) -> None:
    size, reference = SIZES[name], Reference(SIZES[name])
    text, prefix = their_ids(size, "a red heart", ""), prior.prefix(["a red heart", ""])
    codes = torch.randint(size["codes"], (2, prior.length))
    torch.testing.assert_close(prior(prefix, codes), reference.logits(text, codes), rtol=1e-4, atol=1e-4)

    greedy = torch.zeros(1, prior.length, dtype=torch.int64)
    for t in range(prior.length):
        conditional, unconditional = reference.logits(text, greedy.expand(2, -1))[:, t]
        greedy[0, t] = (unconditional + 4 * (conditional - unconditional)).argmax()
    assert torch.equal(sample(prior, prefix[:1], [0], Sampling(top_k=1, guidance_scale=4)), greedy)


@torch.no_grad()
def test_another_start_token(name: str, text_tokenizer: TextTokenizer) -> None:
    size, (encoder, decoder) = SIZES[name], random_weights(SIZES[name])
    given = converter.Settings(num_heads=size["heads"], start=size["codes"] - 1)
    prior = converter.read(Weights(encoder, "e"), Weights(decoder, "d"), size["codes"], given, text_tokenizer)
    codes = torch.randint(size["codes"], (1, prior.length))
    expected = Reference(size, start=size["codes"] - 1).logits(their_ids(size, "cat"), codes)
    torch.testing.assert_close(prior(prior.prefix(["cat"]), codes), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "text", ["A Red HEART", "  the   cat ", "café ж cat", "it's\ta cat", "hehearthe a~", "<s> <pad> a", "", "heart ❤️"]
)
def test_text_is_read_as_min_dalle_reads_it(text: str, text_tokenizer: TextTokenizer) -> None:
    assert [i - 3 for i in text_tokenizer.encode(text)] == brute_force(text)


def test_emoji_are_read_by_their_names(name: str, prior: BartPrior) -> None:
    assert spell_emoji("a ❤️") == "a red_heart" and spell_emoji("café") == "café"
    if name == "mini":  # mega's text length is too short here
        assert torch.equal(prior.prefix(["❤️"]), prior.pad([[i + 3 for i in brute_force("red_heart")]]))
    with pytest.raises(InputError, match="knows no letter of '苹果'; write it in English"):
        prior.prefix(["苹果"])


def test_it_draws_from_the_command_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["a cat", "--model", bundle, "--candidates", "2", "-n", "2", "-o", tmp_path / "out", "--device", "cpu"]
    assert cli.main(["generate", *map(str, arguments)]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) >= 2
    capsys.readouterr()
    assert cli.main(["info", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "kuprel/min-dalle" in shown and "MIT" in shown
    assert describe(bundle)["sampling"]["guidance_scale"] == 16


@pytest.mark.parametrize("published", list(PUBLISHED))
def test_the_published_sizes_are_known_by_every_name(published: str, text_tokenizer: TextTokenizer) -> None:
    size = PUBLISHED[published]
    encoder, decoder = (
        {name: torch.empty(shape, device="meta") for name, shape in half.items()} for half in shapes(size)
    )
    prior = converter.read(
        Weights(encoder, "encoder.pt"), Weights(decoder, "decoder.pt"), 16384, converter.Settings(), text_tokenizer
    )
    assert prior.config.num_heads == size["heads"] and prior.config.encoder_depth == size["encoder"]
    assert prior.code_shape == (1, 16, 16) and prior.prefix_length == 64 and prior.codebook_size == 16384


# Laws -----------------------------------------------------------------------------------------------------------------


def test_laws(prior: BartPrior) -> None:
    check_laws(prior, prior.prefix(["a cat", "red heart"]))


def test_the_text_is_encoded_once_for_all_candidates(prior: BartPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[int] = []
    lengths: list[int] = []
    encode, keys_values = Encoder.forward, CrossAttention.keys_values

    def noted_encode(self: Encoder, x: Tensor, present: Tensor, recomputed: bool) -> Tensor:
        texts.append(len(x))
        return encode(self, x, present, recomputed)

    def noted_keys(self: CrossAttention, memory: Tensor) -> tuple[Tensor, Tensor]:
        lengths.append(memory.shape[1])
        return keys_values(self, memory)

    monkeypatch.setattr(Encoder, "forward", noted_encode)
    monkeypatch.setattr(CrossAttention, "keys_values", noted_keys)
    sample(prior, prior.prefix(["a cat"]), range(5), Sampling(guidance_scale=2))
    assert texts == [2]  # the prompt's and the empty one's, not one for each of 5 candidates
    assert lengths == [prior.prefix_length] * prior.config.depth


@torch.no_grad()
def test_padding_is_not_seen(prior: BartPrior) -> None:
    prefix, codes = prior.prefix(["cat"]), torch.zeros(1, prior.length, dtype=torch.int64)
    before = prior(prefix, codes)
    prior.text_embedding.weight[0] += 1.0
    assert torch.equal(prior(prefix, codes), before)
    prior.text_embedding.weight[0] -= 1.0


# Bad input ------------------------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit_are_named(name: str, text_tokenizer: TextTokenizer) -> None:
    size = SIZES[name]

    def refusal(changes: Mapping[str, Tensor | None], codes: int = size["codes"], given: dict | None = None) -> str:
        halves = []
        for half, weights in zip(("e", "d"), random_weights(size), strict=True):
            own = {key[2:]: change for key, change in changes.items() if key.startswith(half)}
            kept = {key: tensor for key, tensor in (weights | own).items() if tensor is not None}
            halves.append(Weights(kept, f"{half}ncoder.pt"))
        with pytest.raises(ValueError) as caught:
            settings = converter.Settings(**(given or {"num_heads": size["heads"]}))
            converter.read(halves[0], halves[1], codes, settings, text_tokenizer)
        return str(caught.value)

    missing = "d.layers.1.encoder_attn_layer_norm.weight"
    assert f"lacks 1 weights: {missing}" in refusal({missing: None})
    norm = "e.layers.0.glu.ln0"
    assert f"lacks 2 weights: {norm}.weight, {norm}.bias" in refusal({f"{norm}.bias": None})
    assert "beyond what this family knows, 1 weights: e.mystery" in refusal({"e.mystery": torch.zeros(1)})
    assert "needs lm_head.weight of the shape" in refusal({"d.lm_head.weight": None})
    assert "too few for the detokenizer's 999" in refusal({}, codes=999)
    assert f"its width {size['dim']} is none of the published ones" in refusal({}, given={"num_heads": None})


def test_files_that_are_missing_are_asked_for(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for given in ([], [tmp_path / "nothing"], files[:3]):
        assert cli.main(["convert", "min-dalle", *map(str, given), "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert "kuprel/min-dalle" in said and "detoker.pt" in said and said.count("\n") == 1
    for half in ("encoder.pt", "encoder_mini.pt"):
        (tmp_path / half).write_bytes(b"")
    assert cli.main(["convert", "min-dalle", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "both DALL·E mini and mega are there" in capsys.readouterr().err


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    (tmp_path / "merges.txt").write_text("#version: 0.2\na r\n")
    for content, sentence in (
        ("[1]", "must hold tokens with their ids"),
        ("{", "not valid JSON"),
        ('{"a": 0}', "must have <s>, <pad> and </s> as ids 0, 1 and 2"),
        ('{"<s>": 0, "<pad>": 1, "</s>": 2, "a": 3}', "has no token <unk>"),
        ('{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4}', "merges in .* do not fit the vocabulary"),
    ):
        (tmp_path / "vocab.json").write_text(content)
        with pytest.raises(InputError, match=sentence):
            converter.read_text_tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
    for merges, sentence in (("a b c\n", "must hold two tokens a line"), ("\udcff", "not UTF-8 text")):
        (tmp_path / "merges.txt").write_bytes(merges.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError, match=sentence):
            converter.read_text_tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")


# Training -------------------------------------------------------------------------------------------------------------


def test_it_trains_and_draws_through_the_same_commands(
    tmp_path: Path, tiny_parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four pictures of noise: after training each caption gives the codes of its own."""
    (tmp_path / "data").mkdir()
    captions, noise = ("a red heart", "a dog", "small cat", "blue circle"), np.random.default_rng(0)
    with (tmp_path / "data" / "metadata.jsonl").open("w") as lines:
        for i, caption in enumerate(captions):
            pixels = noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / f"{i}.png")
            lines.write(json.dumps({"file_name": f"{i}.png", "text": caption}) + "\n")
    parts = {"codes": str(tmp_path / "codes"), "text_tokenizer": str(tiny_parts / "text_tokenizer"),
             "image_tokenizer": str(tiny_parts / "image_tokenizer")}  # fmt: skip
    recipes = {
        "encode": {"data": {"folder": str(tmp_path / "data")}, "image_tokenizer": parts["image_tokenizer"],
                   "output": parts["codes"]},
        "prior": parts | {
            "model": {"type": "bart", "text_length": 16, "dim": 32, "encoder_depth": 1, "depth": 2, "num_heads": 2,
                      "mlp_dim": 40},
            "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
            "run": {"output": str(tmp_path / "run"), "steps": 150, "batch_size": 8, "num_workers": 0, "ema_decay": 0.9,
                    "log_every": 10, "sample_every": 150, "checkpoint_every": 150},
        },
    }  # fmt: skip
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    assert cli.main(["encode", str(tmp_path / "encode.yaml")]) == 0
    assert cli.main(["train", "prior", str(tmp_path / "prior.yaml")]) == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not any("text" in line for line in logged)  # it is only read
    losses = [line["image"] for line in logged if "image" in line]
    assert losses[0] > 1 and losses[-1] < 0.05  # nats a code

    prior = load_prior(tmp_path / "run" / "model", TextTokenizer.from_pretrained(tiny_parts / "text_tokenizer"))
    assert isinstance(prior, BartPrior)
    drawn = sample(prior, prior.prefix(captions), range(4), Sampling(top_k=1))
    wanted = Codes(tmp_path / "codes").read(range(4))
    assert len(wanted.unique(dim=0)) == 4 and torch.equal(drawn, wanted)

    capsys.readouterr()
    assert cli.main(["evaluate", "prior", str(tmp_path / "run" / "model"), str(tmp_path / "codes"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["image"] < 0.02 < report["image_without_caption"] and report["text"] is None

    arguments = ["--image-tokenizer", parts["image_tokenizer"], "--text-tokenizer", parts["text_tokenizer"],
                 "--prior", str(tmp_path / "run" / "model")]  # fmt: skip
    assert cli.main(["bundle", str(tmp_path / "bundle"), *arguments]) == 0
    drawing = ["generate", "a red heart", "--model", str(tmp_path / "bundle"), "-o", str(tmp_path / "out")]
    assert cli.main([*drawing, "--candidates", "2", "-n", "1", "--device", "cpu"]) == 0


def small(**options: object) -> BartPrior:
    torch.manual_seed(0)
    sizes = {"codebook_size": 11, "code_shape": (1, 2, 3), "text_vocab_size": 20, "text_length": 6, "dim": 16,
             "encoder_depth": 2, "depth": 2, "num_heads": 2, "mlp_dim": 12}  # fmt: skip
    return BartPrior(BartConfig.model_validate(sizes | options))


def test_its_loss_is_the_cross_entropy_of_the_codes_alone() -> None:
    prior = small()
    prefix, codes = prior.pad([[5, 6], []]), torch.randint(11, (2, 6))
    text, image = Objective(prior)(prefix, codes)
    assert float(text) == 0
    torch.testing.assert_close(image[0], F.cross_entropy(prior(prefix, codes).flatten(0, 1), codes.flatten()))


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    gradients = []
    for again in (False, True):
        prior = small(dropout=0.2)
        prior.activation_checkpointing = again
        torch.manual_seed(1)
        prior(prior.pad([[5, 6]]), torch.zeros(1, 6, dtype=torch.int64)).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in prior.parameters()])
    for first, second in zip(*gradients, strict=True):
        assert (first is None and second is None) or torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_heads": 3}, "dim must be divisible by num_heads, got 16 and 3"),
        ({"code_shape": (2, 2, 3)}, "draws one codebook"),
        ({"text_length": 2}, "greater than or equal to 3"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        small(**options)


def test_recipes_of_the_wrong_kind_are_refused(tmp_path: Path) -> None:
    from stage2_prior.train import PriorRecipe
    from tessera.config import validate

    recipe = {"codes": "c", "text_tokenizer": "t", "run": {"output": "o", "steps": 1, "batch_size": 1}}
    for changes, sentence in (
        ({"model": {"type": "barft"}}, "expected tags: 'gpt', 'bart'"),
        ({"model": {"type": "bart", "mlp_ratio": 3}}, "unknown key"),
        ({"model": {"type": "bart"}, "text_weight": 0.1}, "bart only reads it"),
    ):
        with pytest.raises(InputError, match=sentence):
            validate(PriorRecipe, recipe | changes, where="recipe.yaml")
