"""Janus behind our contract: logits and greedy pictures equal transformers' own model, from both published layouts."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import JanusConfig, JanusForConditionalGeneration

from pipelines import cli
from pipelines.convert import convert
from pipelines.info import describe
from pipelines.text_to_image import TextToImagePipeline
from stage2_prior import Sampling, load_prior, sample
from stage2_prior.convert import janus as converter
from stage2_prior.imported.janus import JanusPrior
from tessera.errors import InputError
from tests.prior_laws import check_laws

BEGIN, PADDING, BEGIN_IMAGE = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"
SIZES = {
    "shared keys": {"dim": 32, "depth": 3, "heads": 4, "kv": 2, "mlp": 40, "levels": [1, 1, 2], "patches": 4},
    "deeper aligner": {"dim": 48, "depth": 2, "heads": 2, "kv": 2, "mlp": 64, "levels": [1, 2], "patches": 3},
}


def byte_tokenizer(folder: Path) -> Tokenizer:
    """Bytes, and Janus' own tokens after them; written as the project publishes it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    own = [BEGIN, PADDING, BEGIN_IMAGE, "<|User|>", "<|Assistant|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in own])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BEGIN}), encoding="utf-8")
    return tokenizer


def reference(folder: Path, size: dict, seed: int = 0) -> JanusForConditionalGeneration:
    """A small random Janus, written in transformers' layout."""
    torch.manual_seed(seed)
    folder.mkdir()
    tokenizer = byte_tokenizer(folder)
    dim, aligner = size["dim"], 3 if size["depth"] == 2 else 2
    ids = {name: tokenizer.token_to_id(token) for name, token in
           [("bos_token_id", BEGIN), ("pad_token_id", PADDING), ("boi", BEGIN_IMAGE)]}  # fmt: skip
    boi = ids.pop("boi")
    config = JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": tokenizer.get_vocab_size() + 3, "hidden_size": dim,
            "intermediate_size": size["mlp"], "num_hidden_layers": size["depth"], "num_attention_heads": size["heads"],
            "num_key_value_heads": size["kv"], "rms_norm_eps": 1e-5, "rope_theta": 500.0,
            "max_position_embeddings": 300, "eos_token_id": 1, **ids,
        },
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4, "mlp_ratio": 2.0,
            "image_size": 4 * size["patches"], "projection_dim": dim, "depth": 2,
            "num_image_tokens": size["patches"] ** 2,
        },
        vq_config={
            "embed_dim": 8, "num_embeddings": 29, "latent_channels": 16, "base_channels": 32,
            "channel_multiplier": size["levels"], "num_res_blocks": 1, "num_patches": size["patches"],
            "projection_dim": dim, "num_hidden_layers": aligner, "image_token_embed_dim": dim,
        },
        image_token_id=1,
    )  # fmt: skip
    model = JanusForConditionalGeneration(config).eval()
    for name, weight in model.named_parameters():
        if weight.ndim > 1 and "vqmodel" not in name:
            torch.nn.init.normal_(weight, std=0.25)
        elif "norm" in name:
            torch.nn.init.normal_(weight, mean=1, std=0.2)
    model.generation_config.update(**ids, eos_token_id=1)
    model.generation_config.generation_kwargs = {"boi_token_id": boi}
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=list(SIZES))
def pair(request, tmp_path_factory) -> tuple[JanusForConditionalGeneration, Path, Path]:
    """The reference, its folder, and the bundle converted from it."""
    folder = tmp_path_factory.mktemp("janus")
    model = reference(folder / "theirs", SIZES[request.param])
    bundle = convert("janus", [folder / "theirs"], folder / "bundle", settings=["text_length=64"])
    return model, folder / "theirs", bundle


@torch.no_grad()
def forced_logits(model: JanusForConditionalGeneration, ids: Tensor, codes: Tensor) -> Tensor:
    """transformers' logits of all codes after a prompt without padding."""
    embedded = [model.get_input_embeddings()(ids), model.prepare_embeddings_for_image_generation(codes[:, :-1])]
    hidden = model.model.language_model(inputs_embeds=torch.cat(embedded, 1)).last_hidden_state
    return model.model.generation_head(hidden[:, ids.shape[1] - 1 :])


def greedy(model: JanusForConditionalGeneration, ids: Tensor, scale: float, length: int) -> Tensor:
    """The likeliest codes after one prompt (1, length), one by one, by logits over the whole sequence."""
    without = ids.clone()
    without[:, 1:-1] = model.generation_config.pad_token_id
    codes = ids[:, :0]
    for _ in range(length):
        given = F.pad(codes, (0, 1))  # the last one is not read
        conditional, unconditional = (forced_logits(model, tokens, given)[:, -1] for tokens in (ids, without))
        chosen = (unconditional + scale * (conditional - unconditional)).argmax(1, keepdim=True)
        codes = torch.cat([codes, chosen], 1)
    return codes


def generated(model: JanusForConditionalGeneration, rows: list[list[int]], scale: float) -> Tensor:
    """The same by transformers' own `generate`, for prompts of several lengths at once."""
    width = max(map(len, rows))
    ids = torch.tensor([[model.generation_config.pad_token_id] * (width - len(row)) + row for row in rows])
    mask: Any = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    codes: Tensor = model.generate(
        ids, attention_mask=mask, generation_mode="image", guidance_scale=scale, do_sample=False, use_cache=True
    )
    return codes


def theirs(folder: Path, text: str) -> list[int]:
    """The prompt's tokens by the published tokenizer."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.encode(f"{BEGIN}<|User|>: {text}\n\n<|Assistant|>:{BEGIN_IMAGE}").ids


def test_prompts_become_the_tokens_that_the_published_tokenizer_gives(pair):
    _, folder, bundle = pair
    prior = load_prior(bundle / "prior")
    for text in ("a red heart", "ein Herz, 红心"):
        (row,) = prior.prefix([text]).tolist()
        assert [i for i in row if i >= 0] == theirs(folder, text)
        assert row == [-1] * (64 - len(theirs(folder, text))) + theirs(folder, text)
        assert torch.equal(prior.pad([prior.text_tokenizer.encode(text)]), prior.prefix([text]))
    # Janus' own tokens, written by a user, are text.
    (row,) = prior.prefix([BEGIN_IMAGE]).tolist()
    assert row.count(row[-1]) == 1


def test_logits_equal_the_reference(pair):
    model, folder, bundle = pair
    prior = load_prior(bundle / "prior")
    assert isinstance(prior, JanusPrior)
    for text in ("a red heart", "blue"):
        ids = torch.tensor([theirs(folder, text)])
        codes = torch.randint(0, prior.codebook_size, (1, prior.length))
        expected = forced_logits(model, ids, codes)
        assert expected.std() > 0.3
        torch.testing.assert_close(prior(prior.prefix([text]), codes), expected, rtol=1e-4, atol=1e-4)
        none = ids.clone()
        none[:, 1:-1] = model.generation_config.pad_token_id
        without = prior(prior.unconditional(prior.prefix([text])), codes)
        torch.testing.assert_close(without, forced_logits(model, none, codes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [2.0, 5.0])
def test_greedy_pictures_equal_the_reference(pair, scale):
    model, folder, bundle = pair
    pipeline = TextToImagePipeline.from_pretrained(bundle, device="cpu")
    prior, texts = pipeline.prior, ["a red heart", "blue"]
    drawn = sample(prior, prior.prefix(texts), [0, 0], Sampling(top_k=1, guidance_scale=scale))
    expected = torch.cat([greedy(model, torch.tensor([theirs(folder, text)]), scale, prior.length) for text in texts])
    assert torch.equal(drawn, expected)
    if Version(transformers.__version__) >= Version("5.24"):  # 5.0 to 5.17 fail, or give other codes than their logits
        assert torch.equal(drawn, generated(model, [theirs(folder, text) for text in texts], scale))
    images = pipeline.image_tokenizer.decode(drawn.view(-1, *prior.code_shape))
    decoded = model.decode_image_tokens(expected).clamp(-1, 1)  # (B, H, W, 3)
    torch.testing.assert_close(images.permute(0, 2, 3, 1), decoded, rtol=1e-4, atol=1e-4)


def test_laws(pair):
    prior = load_prior(pair[2] / "prior")
    check_laws(prior, prior.prefix(["a red heart", "blue"]))
    assert torch.equal(prior.null_prefix(2), prior.unconditional(prior.prefix(["", ""])))


def test_bundle_draws_and_says_where_it_is_from(pair, tmp_path):
    bundle = pair[2]
    assert cli.main(["generate", "a red heart", "--model", str(bundle), "-n", "1", "--candidates", "2", "-o",
                     str(tmp_path / "out"), "--device", "cpu"]) == 0  # fmt: skip
    assert len(list((tmp_path / "out").glob("a-red-heart-1-seed*.png"))) == 1
    report = describe(bundle)
    assert report["prior"]["origin"]["weights_licence"] == "DeepSeek Model License"
    assert report["sampling"]["guidance_scale"] == 5.0


def to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names of all that a picture is drawn with, as deepseek-ai publishes them."""
    renames = [
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^model\.generation_embeddings\.", "gen_embed."),
        (r"^model\.generation_aligner\.fc1\.", "gen_aligner.layers.0."),
        (r"^model\.generation_head\.proj_out\.", "gen_head.output_mlp_projector."),
        (r"^model\.generation_head\.", "gen_head."),
        (r"^model\.vision_model\.", "vision_model.vision_tower."),
        (r"^model\.aligner\.", "aligner.layers."),
        (r"^model\.vqmodel\.encoder\.down\.(\d+)\.block\.", r"gen_vision_model.encoder.conv_blocks.\1.res."),
        (r"^model\.vqmodel\.decoder\.up\.(\d+)\.block\.", r"gen_vision_model.decoder.conv_blocks.\1.res."),
        (r"^model\.vqmodel\.encoder\.down\.", "gen_vision_model.encoder.conv_blocks."),
        (r"^model\.vqmodel\.decoder\.up\.", "gen_vision_model.decoder.conv_blocks."),
        (r"^model\.vqmodel\.", "gen_vision_model."),
        (r"\.mid\.block_1\.", ".mid.0."),
        (r"\.mid\.attn_1\.", ".mid.1."),
        (r"\.mid\.block_2\.", ".mid.2."),
    ]
    made = {}
    for name, tensor in state.items():
        name = re.sub(r"^model\.generation_aligner\.hidden_layers\.(\d+)\.",
                      lambda found: f"gen_aligner.layers.{2 * int(found[1]) + 2}.", name)  # fmt: skip
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        made[name] = tensor
    return made


def test_the_original_layout_gives_the_same_prior(pair, tmp_path):
    model, folder, bundle = pair
    state = to_original(model.state_dict())
    assert not [name for name in state if name.startswith("model.")]
    original = tmp_path / "original"
    original.mkdir()
    torch.save(state, original / "pytorch_model.bin")
    byte_tokenizer(original)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    for token in ("bos_token_id", "pad_token_id"):  # in this layout the tokenizer knows them
        del text[token]
    patches = json.loads((folder / "config.json").read_text())["vq_config"]["num_patches"]
    (original / "config.json").write_text(
        json.dumps({"model_type": "multi_modality", "language_config": text, "num_patches": patches})
    )
    tags = {"image_start_tag": BEGIN_IMAGE, "pad_tag": PADDING}
    (original / "processor_config.json").write_text(json.dumps(tags), encoding="utf-8")
    convert("janus", [original], tmp_path / "bundle", settings=["text_length=64"])
    again, prior = load_prior(tmp_path / "bundle" / "prior"), load_prior(bundle / "prior")
    assert again.config.model_copy(update={"origin": None, "image_tokenizer_fingerprint": ""}) == (
        prior.config.model_copy(update={"origin": None, "image_tokenizer_fingerprint": ""})
    )
    for name, tensor in prior.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_the_published_size_has_a_place_for_every_key(tmp_path):
    config = JanusConfig(
        text_config={"model_type": "llama", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 5632,
                     "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16},
        vision_config={"projection_dim": 2048, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        vq_config={"projection_dim": 2048, "image_token_embed_dim": 2048, "base_channels": 32},
    )  # fmt: skip
    with torch.device("meta"):
        state = JanusForConditionalGeneration(config).state_dict()
    named = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    byte_tokenizer(tmp_path)
    text_tokenizer = converter.read_text_tokenizer(tmp_path / "tokenizer.json")
    settings = json.loads(config.to_json_string(use_diff=False))
    specials = converter.Specials([tmp_path], {}, text_tokenizer, "tokenizer.json")
    weights = converter.Weights(named, "meta", converter.IGNORED)
    prior = converter.read(
        weights, settings, converter.Settings(), text_tokenizer, specials, 24, ("model.safetensors",)
    )
    layer = 4 * 2048**2 + 3 * 2048 * 5632 + 2 * 2048
    codes = 16384 * 8 + 9 * 2048 + 2 * 2049 * 2048 + 2049 * 16384
    assert sum(p.numel() for p in prior.parameters()) == 24 * layer + 2048 + 102400 * 2048 + codes
    assert prior.length == 576


@pytest.mark.parametrize("ends", ["\n\n", "\\n\\n"], ids=["as they are", "as backslash and n"])
def test_a_template_passes_the_command_line_unharmed(pair, ends, tmp_path, capsys):
    """Braces, colons, quotes, hashes and line ends are text, whatever they would be in YAML."""
    _, folder, _ = pair
    template = f"User: {{prompt}} # [1, 'a': \"b\"]{ends}Assistant: {{x}} = ~"
    run = ["convert", "janus", str(folder), "--out", str(tmp_path / "out"), "--set", f"template={template}"]
    assert cli.main([*run, "--set", "text_length=96"]) == 0, capsys.readouterr().err
    prior = load_prior(tmp_path / "out" / "prior")
    assert prior.config.text_length == 96
    middle = [part for part in prior.config.template if isinstance(part, str)]
    assert "".join(middle) == template.replace("\\n", "\n")
    for text in ("yes", "1.0", "null", "[]", "{prompt"):  # would be no text in YAML
        assert cli.main([*run[:-1], f"template={text}"]) == 2
        assert f"must have {{prompt}} in it once, got '{text}'" in capsys.readouterr().err
    assert cli.main([*run, "--set", "text_length=many"]) == 2
    assert "--set: text_length: Input should be a valid integer" in capsys.readouterr().err


def test_numbers_in_the_config_are_numbers(pair, tmp_path):
    _, folder, _ = pair
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    for key, value in (("num_attention_heads", 0), ("num_attention_heads", "many"), ("rms_norm_eps", None)):
        text_config = config["text_config"] | {key: value}
        (broken / "config.json").write_text(json.dumps(config | {"text_config": text_config}))
        with pytest.raises(InputError, match=f"config.json must have a {key} above 0"):
            convert("janus", [broken], tmp_path / "out")
    (broken / "config.json").write_text(json.dumps(config | {"vq_config": {"num_patches": 10**9}}))
    with pytest.raises(InputError, match="codes a side, far more"):
        convert("janus", [broken], tmp_path / "out")


def test_bad_input(pair, tmp_path):
    model, folder, bundle = pair
    prior = load_prior(bundle / "prior")
    with pytest.raises(InputError, match=r"the prompt has \d+ tokens with what stands around it, the prior reads at m"):
        prior.prefix(["long " * 100])
    cut = prior.pad([prior.text_tokenizer.encode("long " * 100)])[0].tolist()
    room = 64 - len(theirs(folder, ""))
    assert cut == theirs(folder, ("long " * 100)[:room])  # a token is a byte here
    with pytest.raises(InputError, match="this prior draws from text and was given class labels"):
        prior.prefix(classes=[3])
    with pytest.raises(InputError, match="deepseek-community/Janus-Pro-7B"):
        convert("janus", [], tmp_path / "out")
    with pytest.raises(InputError, match="must have {prompt} in it once"):
        convert("janus", [folder], tmp_path / "out", settings=["template=draw"])
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        if not file.name.startswith("model"):
            (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"no model\*.safetensors .* Janus is published on the hub"):
        convert("janus", [broken], tmp_path / "out")
    state = load_file(folder / "model.safetensors")
    lost = state.pop("model.language_model.layers.0.mlp.up_proj.weight")
    torch.save(state, broken / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"lacks 1 weights: language_model.layers.0.mlp.up_proj.weight"):
        convert("janus", [broken], tmp_path / "out")
    state |= {"model.language_model.layers.0.mlp.up_proj.weight": lost, "model.extra.weight": lost}
    torch.save(state, broken / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"beyond what this family knows, 1 weights: extra.weight"):
        convert("janus", [broken], tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["hidden_size"] += 1
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="config.json says hidden_size"):
        convert("janus", [broken], tmp_path / "out")
    assert not (tmp_path / "out").exists()
