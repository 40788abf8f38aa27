"""taming's transformers: logits and greedy codes equal transformers' GPT-2 of the same weights, by class and by map."""

import json
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from pipelines import cli
from pipelines.bundle import assemble_bundle, load_bundle
from pipelines.conditions import SegmentationMap
from pipelines.convert import convert
from pipelines.info import describe
from pipelines.prefix import map_codes
from pipelines.text_to_image import TextToImagePipeline
from stage2_prior import Sampling, load_prior, sample
from stage2_prior.imported.taming import TamingPrior
from tessera.errors import InputError
from tests.prior_laws import check_laws
from tests.test_convert_tokenizers import Reference, random_vqgan

CODES, CLASSES, LABELS = 40, 9, 5
SIZES = {
    "a": {"dim": 32, "depth": 3, "heads": 4, "vocabulary": 40, "positions": 40, "resolution": 8},
    "b": {"dim": 48, "depth": 2, "heads": 2, "vocabulary": 52, "positions": 17, "resolution": 6},
}


def gpt2(size: dict) -> GPT2LMHeadModel:
    """The reference: minGPT's network as transformers writes it, exact GELU."""
    torch.manual_seed(size["dim"])
    config = GPT2Config(
        vocab_size=size["vocabulary"], n_positions=size["positions"], n_embd=size["dim"], n_layer=size["depth"],
        n_head=size["heads"], activation_function="gelu", layer_norm_epsilon=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("ln_" in name and "weight" in name), std=0.3)
    return model


def transformer_weights(model: GPT2LMHeadModel, looks_ahead: int = 0) -> dict[str, Tensor]:
    """The same weights under minGPT's names, with the masks that a checkpoint holds."""
    theirs: Any = model.transformer
    depth = len(theirs.h)
    positions = theirs.wpe.weight.shape[0]
    mask = torch.ones(positions, positions).tril()
    mask[:looks_ahead, :looks_ahead] = 1
    weights = {
        "tok_emb.weight": theirs.wte.weight, "pos_emb": theirs.wpe.weight[None], "head.weight": model.lm_head.weight,
        "ln_f.weight": theirs.ln_f.weight, "ln_f.bias": theirs.ln_f.bias,
    }  # fmt: skip
    for layer in range(depth):
        block = theirs.h[layer]
        for name, part in (("ln1", block.ln_1), ("ln2", block.ln_2)):
            weights |= {f"blocks.{layer}.{name}.{kind}": getattr(part, kind) for kind in ("weight", "bias")}
        # transformers' linear layers are (in, out), and queries, keys and values one layer
        qkv = block.attn.c_attn
        linear = {
            f"attn.{name}": (qkv.weight.chunk(3, 1)[i], qkv.bias.chunk(3)[i])
            for i, name in enumerate(("query", "key", "value"))
        }
        for name, layer_of in (("attn.proj", block.attn), ("mlp.0", block.mlp), ("mlp.2", block.mlp)):
            part = layer_of.c_fc if name == "mlp.0" else layer_of.c_proj
            linear[name] = (part.weight, part.bias)
        for name, (weight, bias) in linear.items():
            weights |= {f"blocks.{layer}.{name}.weight": weight.T, f"blocks.{layer}.{name}.bias": bias}
        weights[f"blocks.{layer}.attn.mask"] = mask[None, None]
    return {name: tensor.detach().clone() for name, tensor in weights.items()}


def label_vqgan() -> dict[str, Tensor]:
    """A VQGAN of maps: as many channels as there are labels, in and out; its colours are of no use to us."""
    weights = random_vqgan(codes=CODES)
    torch.manual_seed(5)
    weights["encoder.conv_in.weight"] = torch.randn(32, LABELS, 3, 3) * 0.5
    weights["decoder.conv_out.weight"] = torch.randn(LABELS, 32, 3, 3)
    weights["decoder.conv_out.bias"] = torch.zeros(LABELS)
    return weights | {"colorize": torch.randn(3, LABELS, 1, 1)}


def checkpoint(folder: Path, size: dict, kind: str, model: GPT2LMHeadModel, looks_ahead: int = 0) -> Path:
    """A folder as the project publishes it."""
    parts = {"transformer.": transformer_weights(model, looks_ahead), "first_stage_model.": random_vqgan(codes=CODES)}
    parts["first_stage_model."] |= {"loss.discriminator.main.0.weight": torch.ones(2)}
    if kind == "segmentation":
        parts["cond_stage_model."] = label_vqgan()
    state = {prefix + name: tensor for prefix, weights in parts.items() for name, tensor in weights.items()}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "configs").mkdir()
    torch.save({"state_dict": state, "epoch": 3, "callbacks": {}}, folder / "checkpoints" / "last.ckpt")
    tokenizer = {"params": {"embed_dim": 6, "n_embed": CODES, "ddconfig": {"resolution": size["resolution"]}}}
    by_class = {"target": "taming.modules.util.Labelator", "params": {"n_classes": CLASSES}}
    params = {
        "cond_stage_key": "class_label" if kind == "class" else "segmentation",
        "transformer_config": {"params": {"n_head": size["heads"]}},
        "first_stage_config": tokenizer,
        "cond_stage_config": by_class if kind == "class" else tokenizer,
    }
    (folder / "configs" / "x-project.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    return folder


@pytest.fixture(
    scope="module",
    params=[("class", "a"), ("class", "b"), ("segmentation", "a"), ("segmentation", "b")],
    ids="-".join,
)
def pair(request, tmp_path_factory) -> tuple[GPT2LMHeadModel, Path]:
    """The reference, and the bundle converted from its weights."""
    kind, name = request.param
    model, folder = gpt2(SIZES[name]), tmp_path_factory.mktemp("taming")
    source = checkpoint(folder / "theirs", SIZES[name], kind, model)
    return model, convert("taming", [source], folder / "bundle")


def conditions(prior: TamingPrior) -> tuple[Tensor, Tensor]:
    """Two prefixes of ours, and the tokens that they stand for."""
    if prior.condition == "class":
        return prior.prefix(classes=[2, 8]), torch.tensor([[2], [8]])
    torch.manual_seed(2)
    assert prior.config.segmentation_shape is not None
    codes = torch.randint(0, CODES, (2, *prior.config.segmentation_shape))
    return prior.prefix(segmentation=codes), codes.flatten(1)


@torch.no_grad()
def forced(model: GPT2LMHeadModel, tokens: Tensor, codes: Tensor) -> Tensor:
    return model(torch.cat([tokens, codes[:, :-1]], 1)).logits[:, tokens.shape[1] - 1 :, :CODES]


def test_logits_equal_the_reference(pair):
    model, bundle = pair
    prior = load_prior(bundle / "prior")
    assert isinstance(prior, TamingPrior)
    prefix, tokens = conditions(prior)
    codes = torch.randint(0, CODES, (2, prior.length))
    expected = forced(model, tokens, codes)
    assert expected.std() > 0.3
    torch.testing.assert_close(prior(prefix, codes), expected, rtol=1e-4, atol=1e-4)


def test_greedy_codes_equal_the_reference(pair):
    model, bundle = pair
    prior = load_prior(bundle / "prior")
    prefix, tokens = conditions(prior)
    codes = torch.zeros(2, prior.length, dtype=torch.int64)
    for t in range(prior.length):
        codes[:, t] = forced(model, tokens, codes)[:, t].argmax(-1)
    assert torch.equal(sample(prior, prefix, [0, 0], Sampling(top_k=1)), codes)


def test_what_is_drawn_by_default_is_what_the_project_draws_by(pair):
    """Classes as its sample_fast.py does, with top_k 600 and top_p 0.92, maps as its notebook does, with top_k 100."""
    bundle = pair[1]
    sampling = Sampling.model_validate(json.loads((bundle / "model_index.json").read_text())["sampling"])
    by_class = load_prior(bundle / "prior").condition == "class"
    assert sampling == (Sampling(top_k=600, top_p=0.92) if by_class else Sampling(top_k=100))


def test_laws(pair):
    prior = load_prior(pair[1] / "prior")
    check_laws(prior, conditions(prior)[0], guided=False)


def test_a_condition_that_sees_both_ways(tmp_path):
    """`n_unmasked`: the first positions see each other; brute force by a mask for transformers' model."""
    size = SIZES["a"]
    model = gpt2(size)
    source = checkpoint(tmp_path / "theirs", size, "segmentation", model, looks_ahead=16)
    prior = load_prior(convert("taming", [source], tmp_path / "bundle") / "prior")
    prefix, tokens = conditions(prior)
    codes = torch.randint(0, CODES, (2, prior.length))
    sequence = torch.cat([tokens, codes[:, :-1]], 1)
    length = sequence.shape[1]
    mask = torch.full((2, 1, length, length), -torch.inf)
    for query in range(length):
        for key in range(length):
            if key <= query or (query < 16 and key < 16):
                mask[:, :, query, key] = 0
    model.set_attn_implementation("sdpa")  # "eager" adds its own causal mask before transformers 5.3
    with torch.no_grad():
        expected = model(sequence, attention_mask=mask).logits[:, 15:]
    assert (expected - forced(model, tokens, codes)).abs().max() > 0.1
    torch.testing.assert_close(prior(prefix, codes), expected, rtol=1e-4, atol=1e-4)
    check_laws(prior, prefix, guided=False)


def test_codes_of_a_map_equal_the_reference(tmp_path):
    size = SIZES["a"]
    source = checkpoint(tmp_path / "theirs", size, "segmentation", gpt2(size))
    bundle = load_bundle(convert("taming", [source], tmp_path / "bundle"))
    assert bundle.segmentation_tokenizer is not None
    labels = np.random.default_rng(0).integers(0, LABELS, (8, 8)).astype(np.uint8)
    Image.fromarray(labels).save(tmp_path / "map.png")
    onehot = torch.zeros(1, LABELS, 8, 8)
    for row in range(8):
        for column in range(8):
            onehot[0, labels[row, column], row, column] = 1
    weights = label_vqgan()
    latents = Reference(weights, levels=2).latents(onehot)  # (1, D, 4, 4)
    distances = (latents.permute(0, 2, 3, 1)[..., None, :] - weights["quantize.embedding.weight"]).square().sum(-1)
    expected = distances.argmin(-1)[:, None]
    assert torch.equal(map_codes(tmp_path / "map.png", bundle.segmentation_tokenizer), expected)


def test_bundle_draws_and_draws_again(pair, tmp_path, capsys):
    bundle, out = pair[1], tmp_path / "out"
    Image.fromarray((np.arange(16 * 20).reshape(16, 20) % LABELS).astype(np.uint8)).save(tmp_path / "town.png")
    by_class = load_prior(bundle / "prior").condition == "class"
    what = ["--class", "3"] if by_class else ["--segmentation", str(tmp_path / "town.png")]
    common = ["--model", str(bundle), "--device", "cpu"]
    command = ["generate", *what, "-n", "1", "--candidates", "2", "-o", str(out), "--json", *common]
    assert cli.main(command) == 0
    (drawn,) = json.loads(capsys.readouterr().out)["prompts"]
    assert drawn["prompt"] == ("class 3" if by_class else "segmentation town.png")
    again = ["generate", "--replay", drawn["images"][0]["path"], "-o", str(tmp_path / "again"), "--json", *common]
    if not by_class:
        assert cli.main(again) == 2
        assert "give the file of one with --segmentation" in capsys.readouterr().err
        again += what
    assert cli.main(again) == 0
    assert json.loads(capsys.readouterr().out)["identical"] is True
    report = describe(bundle)
    assert report["prior"]["origin"]["project"] == "CompVis/taming-transformers"
    assert ("segmentation_tokenizer" in report) is not by_class


def test_a_pipeline_saves_all_of_its_parts(pair, tmp_path):
    pipeline = TextToImagePipeline.from_pretrained(pair[1], device="cpu")
    pipeline.save_pretrained(tmp_path / "copy")
    again = TextToImagePipeline.from_pretrained(tmp_path / "copy", device="cpu")
    assert (again.segmentation_tokenizer is None) == (pipeline.segmentation_tokenizer is None)
    assert again.fingerprint == pipeline.fingerprint


def test_bundles_of_parts_that_do_not_fit(pair, tiny_parts, tmp_path):
    bundle = pair[1]
    parts = {"image_tokenizer": bundle / "image_tokenizer", "prior": bundle / "prior", "text_tokenizer": None}
    maps = bundle / "segmentation_tokenizer"
    if maps.is_dir():
        with pytest.raises(InputError, match="reads codes of segmentation tokenizer .*, got none"):
            assemble_bundle(tmp_path / "out", **parts)
        parts["segmentation_tokenizer"] = maps
    else:
        with pytest.raises(InputError, match="reads codes of segmentation tokenizer none, got"):
            assemble_bundle(tmp_path / "out", **parts, segmentation_tokenizer=bundle / "image_tokenizer")
    with pytest.raises(InputError, match="a reranker compares pictures with text, and the prior in .* draws from"):
        assemble_bundle(tmp_path / "out", **parts, reranker=tiny_parts / "reranker")
    assert not (tmp_path / "out").exists()
    assemble_bundle(tmp_path / "out", **parts)
    assert load_bundle(tmp_path / "out").segmentation_tokenizer is not None or not maps.is_dir()


# Bad input ------------------------------------------------------------------------------------------------------------


def test_bad_conditions(pair, tmp_path, capsys):
    prior = load_prior(pair[1] / "prior")
    prefix, _ = conditions(prior)
    with pytest.raises(InputError, match=f"never trained without its {prior.condition}, .* guidance_scale of 1"):
        sample(prior, prefix, [0, 0], Sampling(guidance_scale=2))
    if prior.condition == "class":
        with pytest.raises(InputError, match=r"class labels must be in \[0, 9\), got 9"):
            prior.prefix(classes=[9])
        assert cli.main(["generate", "a cat", "--model", str(pair[1]), "-o", str(tmp_path / "out")]) == 2
        assert "draws from class labels, say --class 0 or 'class 0', got 'a cat'" in capsys.readouterr().err
        return
    with pytest.raises(InputError, match="codes of segmentation maps must be"):
        prior.prefix(segmentation=torch.zeros(1, 1, 1, 1, dtype=torch.int64))
    with pytest.raises(InputError, match=r"codes of segmentation maps must be in \[0"):
        prior.prefix(segmentation=torch.full((1, *prior.config.segmentation_shape), 99))
    with pytest.raises(InputError, match="this prior draws from segmentation maps and was given text"):
        prior.prefix(["a cat"])
    command = ["generate", "--model", str(pair[1]), "-o", str(tmp_path / "out"), "--segmentation"]
    Image.new("RGB", (8, 8)).save(tmp_path / "colours.png")
    assert cli.main([*command, str(tmp_path / "colours.png")]) == 2
    assert "a segmentation map has one channel" in capsys.readouterr().err
    Image.new("L", (8, 8), 77).save(tmp_path / "beyond.png")
    assert cli.main([*command, str(tmp_path / "beyond.png")]) == 2
    assert "has the label 77, and this tokenizer knows labels 0 to 4" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("no picture")
    assert cli.main([*command, str(tmp_path / "text.png")]) == 2
    assert "is not a readable picture" in capsys.readouterr().err
    assert cli.main([*command, str(tmp_path / "none.png")]) == 2
    assert "none.png does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_conditions_are_refused_by_a_prior_of_text(tiny_pipeline, tmp_path):
    with pytest.raises(InputError, match="this prior draws from text and was given class labels"):
        tiny_pipeline.prior.prefix(classes=[1])
    Image.new("L", (8, 8)).save(tmp_path / "map.png")
    with pytest.raises(InputError, match="this prior draws from text and was given segmentation maps"):
        tiny_pipeline(SegmentationMap(tmp_path / "map.png"))


def test_bad_sources(tmp_path):
    size = SIZES["a"]
    model = gpt2(size)
    source = checkpoint(tmp_path / "theirs", size, "class", model)
    file, settings = source / "checkpoints" / "last.ckpt", source / "configs" / "x-project.yaml"

    def refused(sources: list[Path], *given: str) -> str:
        with pytest.raises(InputError) as caught:
            convert("taming", sources, tmp_path / "out", settings=given)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    assert "checkpoints/last.ckpt" in refused([]) and "k00.fr/s511rwcv" in refused([])
    assert "--set num_heads=N" in refused([file])
    assert "--set num_classes=N" in refused([file], "num_heads=4")
    assert "must hold the 40 codes and the 41 classes" in refused([file, settings], "num_classes=41")
    content = yaml.safe_load(settings.read_text())
    content["model"]["params"] |= {"cond_stage_key": "coord", "cond_stage_config": {"target": "x.CoordStage"}}
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(content))
    assert "draws from coord (x.CoordStage); only priors by class or" in refused([file, other])
    content["model"]["params"]["first_stage_config"]["params"]["ddconfig"]["resolution"] = 64
    content["model"]["params"]["cond_stage_config"] = {"target": "Labelator", "params": {"n_classes": 3}}
    other.write_text(yaml.safe_dump(content))
    assert "40 positions are too few for a condition of 1 and an image of 1024" in refused([file, other])

    state = torch.load(file)["state_dict"]

    def changed(**changes: object) -> Path:
        new = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
        torch.save({"state_dict": new}, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    name = "transformer.blocks.1.mlp.2.bias"
    assert "lacks 1 weights: blocks.1.mlp.2.bias" in refused([changed(**{name: None}), settings])
    extra = changed(**{"transformer.extra": torch.ones(1)})
    assert "1 weights: extra" in refused([extra, settings])
    assert "is of none of transformer.*" in refused([changed(**{"other.weight": torch.ones(1)}), settings])
    assert "lacks the weight 'pos_emb'" in refused([changed(**{"transformer.pos_emb": None}), settings])
    depth = {f"cond_stage_model.{key}": tensor for key, tensor in random_vqgan().items()}
    for channels in (1, 3):
        depth["cond_stage_model.encoder.conv_in.weight"] = torch.randn(32, channels, 3, 3)
        said = refused([changed(**depth), settings])
        assert f"draws from pictures of {channels} channels, not from segmentation maps" in said


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    """Lightning's classes in it are made placeholders, which a restricted reader does not import."""
    size = SIZES["a"]
    source = checkpoint(tmp_path / "theirs", size, "class", gpt2(size))
    file = source / "checkpoints" / "last.ckpt"
    module = types.ModuleType("pytorch_lightning_like")
    ran = []

    class Callback:
        def __reduce__(self):
            return module.run, ("harm",)

    module.run = type("run", (), {"__module__": module.__name__, "__new__": lambda cls, word: ran.append(word)})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    content = torch.load(file) | {"callbacks": Callback()}
    torch.save(content, file, pickle_module=pickle)
    convert("taming", [source], tmp_path / "bundle")
    assert ran == []
