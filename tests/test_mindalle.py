"""minDALL-E becomes a bundle of ours: its GPT equals transformers' GPT-2 with the same weights, its text tokenizer the
project's own (`golden/mindalle_text.json`: a small one with the ids that the project's code gave)."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import CharBPETokenizer
from torch import Tensor
from transformers import GPT2Config, GPT2Model

from pipelines import cli
from pipelines.convert import convert
from pipelines.info import describe
from pipelines.text_to_image import TextToImagePipeline
from stage2_prior import Sampling, load_prior, sample
from stage2_prior.convert import mindalle as converter
from stage2_prior.imported.mindalle import MinDALLEPrior
from tessera.errors import InputError
from tessera.text import TextTokenizer
from tessera.weights.foreign import Weights
from tests.prior_laws import check_laws
from tests.test_convert_tokenizers import random_vqgan

TEXT = json.loads((Path(__file__).parent / "golden" / "mindalle_text.json").read_text(encoding="utf-8"))
SIZES = {
    "a": {"dim": 32, "depth": 3, "heads": 4, "text": 12, "side": 4, "codes": 40, "words": 160, "approximate": False},
    "b": {"dim": 48, "depth": 2, "heads": 2, "text": 9, "side": 3, "codes": 21, "words": 170, "approximate": True},
}
PUBLISHED = {"dim": 1536, "depth": 42, "heads": 24, "text": 64, "side": 16, "codes": 16384, "words": 16384}


def shapes(size: dict) -> dict[str, tuple[int, ...]]:
    """The names and shapes of stage2_last.ckpt."""
    dim = size["dim"]
    found: dict[str, tuple[int, ...]] = {
        "tok_emb_img.weight": (size["codes"], dim),
        "tok_emb_txt.weight": (size["words"], dim),
        "pos_emb_img.weight": (size["side"] ** 2, dim),
        "pos_emb_txt.weight": (size["text"], dim),
    }
    for layer in range(size["depth"]):
        block = f"blocks.{layer}"
        for norm in ("ln1", "ln2"):
            found |= {f"{block}.{norm}.weight": (dim,), f"{block}.{norm}.bias": (dim,)}
        for part in ("key", "query", "value", "proj"):
            found |= {f"{block}.attn.{part}.weight": (dim, dim), f"{block}.attn.{part}.bias": (dim,)}
        found |= {f"{block}.mlp.0.weight": (4 * dim, dim), f"{block}.mlp.0.bias": (4 * dim,)}
        found |= {f"{block}.mlp.2.weight": (dim, 4 * dim), f"{block}.mlp.2.bias": (dim,)}
    found |= {"ln_f.weight": (dim,), "ln_f.bias": (dim,)}
    return found | {"head_img.weight": (size["codes"], dim), "head_txt.weight": (size["words"], dim)}


def random_weights(size: dict) -> dict[str, Tensor]:
    torch.manual_seed(size["dim"])
    return {name: torch.randn(shape) * 0.3 + 0.5 * ("ln" in name) for name, shape in shapes(size).items()}


def settings(size: dict) -> dict:
    """The content of config.yaml."""
    hparams = {"embed_dim": size["dim"], "n_layers": size["depth"], "n_heads": size["heads"],
               "ctx_len_img": size["side"] ** 2, "ctx_len_txt": size["text"],
               "gelu_use_approx": size["approximate"]}  # fmt: skip
    stage2 = {"vocab_size_txt": size["words"], "vocab_size_img": size["codes"], "hparams": hparams}
    return {"dataset": {"context_length": size["text"]}, "stage2": stage2}


@pytest.fixture(scope="module", params=list(SIZES.values()), ids=list(SIZES))
def size(request: pytest.FixtureRequest) -> dict:
    return request.param


@pytest.fixture(scope="module")
def archive(size: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.3B.tar.gz in small, as it is published."""
    folder = tmp_path_factory.mktemp("mindalle")
    inside = folder / "1.3B"
    (inside / "tokenizer").mkdir(parents=True)
    (inside / "config.yaml").write_text(yaml.safe_dump(settings(size)))
    torch.save({"state_dict": random_weights(size)}, inside / "stage2_last.ckpt")
    torch.save({"state_dict": random_vqgan(codes=size["codes"])}, inside / "stage1_last.ckpt")
    (inside / "tokenizer" / "bpe-16k-vocab.json").write_text(json.dumps(TEXT["vocabulary"]))
    (inside / "tokenizer" / "bpe-16k-merges.txt").write_text(TEXT["merges"])
    with tarfile.open(folder / "1.3B.tar.gz", "w:gz") as tar:
        tar.add(inside, "1.3B")
    return folder / "1.3B.tar.gz"


@pytest.fixture(scope="module")
def bundle(archive: Path) -> Path:
    return convert("mindalle", [archive], archive.parent / "bundle")


@pytest.fixture(scope="module")
def prior(bundle: Path) -> MinDALLEPrior:
    loaded = load_prior(bundle / "prior")
    assert isinstance(loaded, MinDALLEPrior)
    return loaded


def reference(size: dict, texts: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of text and codes from GPT-2 with the same weights; positions are in the embeddings, its own are zero."""
    w = random_weights(size)
    config = GPT2Config(
        n_embd=size["dim"], n_layer=size["depth"], n_head=size["heads"], n_positions=400, vocab_size=2,
        activation_function="quick_gelu" if size["approximate"] else "gelu", layer_norm_epsilon=1e-5,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    model = GPT2Model(config).eval()
    torch.nn.init.zeros_(model.wpe.weight)
    state = {"ln_f.weight": w["ln_f.weight"], "ln_f.bias": w["ln_f.bias"]}
    for layer in range(size["depth"]):
        for kind in ("weight", "bias"):
            there, own = f"blocks.{layer}", f"h.{layer}"
            state |= {f"{own}.ln_{i}.{kind}": w[f"{there}.ln{i}.{kind}"] for i in (1, 2)}
            fused = torch.cat([w[f"{there}.attn.{part}.{kind}"] for part in ("query", "key", "value")])
            parts = {"attn.c_attn": fused, "attn.c_proj": w[f"{there}.attn.proj.{kind}"],
                     "mlp.c_fc": w[f"{there}.mlp.0.{kind}"], "mlp.c_proj": w[f"{there}.mlp.2.{kind}"]}  # fmt: skip
            state |= {f"{own}.{part}.{kind}": tensor.t().contiguous() for part, tensor in parts.items()}
    missing, extra = model.load_state_dict(state, strict=False)
    assert set(missing) == {"wte.weight", "wpe.weight"} and not extra
    x = torch.cat(
        [w["tok_emb_txt.weight"][texts] + w["pos_emb_txt.weight"],
         w["tok_emb_img.weight"][images] + w["pos_emb_img.weight"]], dim=1,
    )  # fmt: skip
    x = model(inputs_embeds=x).last_hidden_state
    text = size["text"]
    return x[:, : text - 1] @ w["head_txt.weight"].T, x[:, text - 1 : -1] @ w["head_img.weight"].T


@torch.no_grad()
def test_logits_and_greedy_codes_equal_gpt2s(size: dict, prior: MinDALLEPrior) -> None:
    prefix = prior.prefix(["a photo of a cat", ""])
    codes = torch.randint(size["codes"], (2, prior.length))
    text, image = reference(size, prefix, codes)
    predictions = prior.predict(prefix, codes)
    torch.testing.assert_close(predictions.text, text, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(predictions.codes, image, rtol=1e-4, atol=1e-4)

    greedy = torch.zeros_like(codes)
    for t in range(prior.length):
        greedy[:, t] = reference(size, prefix, greedy)[1][:, t].argmax(-1)
    assert torch.equal(sample(prior, prefix, [0, 1], Sampling(top_k=1)), greedy)


def test_laws(prior: MinDALLEPrior) -> None:
    check_laws(prior, prior.prefix(["a cat on the beach", ""]), guided=False)
    with pytest.raises(InputError, match="never trained without its text"):
        sample(prior, prior.prefix(["a cat"]), [0], Sampling(guidance_scale=2))


def test_text_is_read_as_the_project_reads_it(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(TEXT["vocabulary"]))
    (tmp_path / "merges.txt").write_text(TEXT["merges"])
    tokenizer, padding = converter.read_text_tokenizer(tmp_path / "vocab.json", tmp_path / "merges.txt")
    own = CharBPETokenizer.from_file(
        str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), unk_token="[UNK]", lowercase=True
    )
    room = TEXT["context_length"]
    for case in TEXT["cases"]:
        ids = [i - 3 for i in tokenizer.encode(case["text"])]
        assert (ids + [padding] * room)[:room] == case["ids"]
    for text in ("Golden GATE, bridge!", "ÉLAN 山 a山b", "tab\tnew\nline  two", "[unk] cat", "it's"):
        assert [i - 3 for i in tokenizer.encode(text)] == own.encode(text).ids


def test_prompts_are_padded_and_too_long_ones_refused(size: dict, prior: MinDALLEPrior) -> None:
    ids = prior.prefix(["A cat on the beach", ""])
    assert ids.shape == (2, size["text"]) and not ids[1].any()
    assert ids[0, :5].tolist() == [11, 66, 48, 46, 65]  # as in the vocabulary
    assert torch.equal(prior.null_prefix(1), ids[1:])
    with pytest.raises(InputError, match=f"the prompt has 30 tokens, the prior reads at most {size['text']}"):
        prior.prefix(["cat " * 30])


def test_it_draws_from_the_command_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["a cat", "--model", bundle, "--candidates", "2", "-n", "2", "-o", tmp_path / "out", "--device", "cpu"]
    assert cli.main(["generate", *map(str, arguments)]) == 0
    assert len(list((tmp_path / "out").glob("*.png"))) >= 2
    capsys.readouterr()
    assert cli.main(["info", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "kakaobrain/minDALL-E" in shown and "CC-BY-NC-SA-4.0" in shown and "Apache-2.0" in shown
    report = describe(bundle)
    assert report["sampling"]["top_k"] == 256 and report["prior"]["type"] == "mindalle"
    pipeline = TextToImagePipeline.from_pretrained(bundle, device="cpu")
    side = pipeline.prior.code_shape[1]
    assert pipeline("a dog", num_candidates=1).images[0].size == (2 * side, 2 * side)


def test_the_unpacked_folder_is_the_same_and_nothing_is_left_behind(archive: Path, bundle: Path) -> None:
    again = convert("mindalle", [archive.parent / "1.3B"], archive.parent / "again")
    assert describe(again)["fingerprint"] == describe(bundle)["fingerprint"]
    assert not list(archive.parent.glob(".unpacked.*"))


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, int]:
    folder = tmp_path_factory.mktemp("text")
    (folder / "vocab.json").write_text(json.dumps(TEXT["vocabulary"]))
    (folder / "merges.txt").write_text(TEXT["merges"])
    return converter.read_text_tokenizer(folder / "vocab.json", folder / "merges.txt")


def test_the_published_size_is_known_by_every_name(text_tokenizer: tuple[TextTokenizer, int]) -> None:
    weights = Weights({name: torch.empty(shape, device="meta") for name, shape in shapes(PUBLISHED).items()}, "x")
    built = converter.read(weights, {}, *text_tokenizer)
    assert built.config.num_heads == 24 and built.config.activation == "gelu"
    assert sum(parameter.numel() for parameter in built.parameters()) == sum(
        torch.Size(shape).numel() for shape in shapes(PUBLISHED).values()
    )


# Bad input ------------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence of a command that ends with 2."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tessera: error: ") and said.count("\n") == 1
    return said


def test_without_files_the_command_says_what_to_get(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given in ([], [tmp_path / "nothing"], [tmp_path]):
        said = refused(capsys, "convert", "mindalle", *given, "--out", tmp_path / "out")
        assert "1.3B.tar.gz" in said and "arena.kakaocdn.net" in said and "tokenizer/bpe-16k-vocab.json" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w, s: w.pop("blocks.1.ln2.bias"), "lacks 1 weights: blocks.1.ln2.bias"),
        (lambda w, s: w.update(mystery=torch.zeros(1)), "beyond what this family knows, 1 weights: mystery"),
        (lambda w, s: w.update({"head_img.weight": torch.zeros(3, 3)}), "'head_img.weight' has shape"),
        (lambda w, s: s["stage2"]["hparams"].update(n_layers=9), "config.yaml says n_layers 9, but .* has 3"),
        (lambda w, s: s["stage2"]["hparams"].update(n_heads=5), "dim must be divisible by num_heads, got 32 and 5"),
    ],
)
def test_weights_that_do_not_fit_are_named(
    change: Callable[[dict, dict], object], sentence: str, text_tokenizer: tuple[TextTokenizer, int]
) -> None:
    weights, given = random_weights(SIZES["a"]), settings(SIZES["a"])
    change(weights, given)
    with pytest.raises(ValueError, match=sentence):
        converter.read(Weights(weights, "stage2_last.ckpt"), given, *text_tokenizer)


def test_settings_and_damage_are_refused(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", tmp_path / "out")
    assert "unknown key 'version'" in refused(capsys, "convert", "mindalle", archive, *out, "--set", "version=v2")
    assert "must look like key=value" in refused(capsys, "convert", "mindalle", archive, *out, "--set", "version")
    assert "--image-size is for image tokenizers" in refused(
        capsys, "convert", "mindalle", archive, *out, "--image-size", 64
    )
    assert "--set is for priors" in refused(capsys, "convert", "taming-vqgan", archive, *out, "--set", "a=1")
    broken = tmp_path / "1.3B.tar.gz"
    broken.write_bytes(archive.read_bytes()[:20_000])
    assert "is not a whole archive" in refused(capsys, "convert", "mindalle", broken, *out)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".unpacked.*"))
