"""What the training of a prior does beyond its loss, its published sizes, and two levels of codes from end to end."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image

import stage2_prior.encode
import stage2_prior.train
import stage2_prior.train_text
from pipelines.info import describe
from stage1_tokenizer import Autoencoder, AutoencoderConfig
from stage2_prior import GPTConfig, GPTPrior, load_prior, sample, unflatten_codes
from stage2_prior.presets import parameters, preset
from stage2_prior.train import Objective, PriorRecipe, corrupt, hide
from tessera.config import read_recipe
from tessera.errors import InputError


def tiny(**options):
    torch.manual_seed(0)
    sizes = {"codebook_size": 16, "code_shape": (1, 3, 4), "text_vocab_size": 9, "text_length": 6, "dim": 16,
             "depth": 2, "num_heads": 2}  # fmt: skip
    prior = GPTPrior(GPTConfig.model_validate(sizes | options))
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return prior


def test_pkeep_replaces_the_share_asked_for_evenly():
    torch.manual_seed(0)
    codes = torch.zeros(200, 100, dtype=torch.int64)
    read = corrupt(codes, 0.7, 16)
    assert abs(float((read != codes).float().mean()) - 0.3 * 15 / 16) < 0.01  # one in 16 is drawn as it was
    shares = read[read != codes].bincount(minlength=16)[1:].float()
    assert (shares / shares.mean() - 1).abs().max() < 0.15
    assert torch.equal(corrupt(codes, 1.0, 16), codes)


def test_with_pkeep_what_is_read_is_corrupted_and_what_is_foretold_is_not():
    prior = tiny()
    prefix, codes = prior.pad([[3, 4]]), torch.randint(0, 16, (1, 12))
    torch.manual_seed(5)
    read = corrupt(codes, 0.5, 16)
    assert not torch.equal(read, codes)
    objective = Objective(prior, pkeep=0.5)
    torch.manual_seed(5)
    _, image = objective(prefix, codes)
    expected = F.cross_entropy(prior.predict(prefix, read).codes[0], codes[0])
    torch.testing.assert_close(image[0], expected)
    objective.eval()
    _, image = objective(prefix, codes)
    torch.testing.assert_close(image[0], F.cross_entropy(prior(prefix, codes)[0], codes[0]))


def test_code_dropout_hides_every_share_alike_in_the_share_of_pictures_asked_for():
    torch.manual_seed(0)
    shares = hide(4000, 50, 0.25, torch.device("cpu")).float().mean(1)
    assert abs(float((shares > 0).float().mean()) - 0.25 * 50 / 51) < 0.02  # of k in 50 hidden each k is as likely
    assert abs(float(shares[shares > 0].mean()) - 0.5 * 51 / 50) < 0.03
    assert abs(float(shares[shares > 0].std()) - (1 / 12) ** 0.5) < 0.02
    assert not hide(100, 50, 0.0, torch.device("cpu")).any() and bool(
        hide(100, 500, 1.0, torch.device("cpu")).sum() > 0
    )


@pytest.mark.parametrize("options", [{}, {"positions": "rotary-2d"}, {"order": "random"}, {"code_shape": (2, 3, 4)}])
def test_of_hidden_positions_later_ones_learn_nothing(options):
    prior = tiny(**options)
    torch.manual_seed(3)
    prefix, codes = prior.pad([[3, 4], [5]]), torch.randint(0, 16, (2, prior.length))
    order = torch.stack([torch.randperm(12), torch.randperm(12)]) if options.get("order") else None
    hidden = torch.rand(2, 12) < 0.5
    other = torch.where(hidden.repeat_interleave(prior.num_codebooks, 1), (codes + 3) % 16, codes)
    first = slice(0, None, prior.num_codebooks)  # a residual code reads the one before it
    logits, changed = (prior.predict(prefix, read, order, hidden).codes[:, first] for read in (codes, other))
    torch.testing.assert_close(logits, changed)
    assert not torch.allclose(logits, prior.predict(prefix, codes, order).codes[:, first], atol=1e-3)
    nothing = prior.predict(prefix, codes, order, torch.zeros_like(hidden)).codes
    torch.testing.assert_close(nothing, prior(prefix, codes, order))


def test_code_dropout_is_for_training_alone():
    prior = tiny()
    prefix, codes = prior.pad([[3, 4]]), torch.randint(0, 16, (1, 12))
    objective = Objective(prior, code_dropout=1.0)
    torch.manual_seed(5)
    hidden = hide(1, 12, 1.0, codes.device)
    torch.manual_seed(5)
    _, image = objective(prefix, codes)
    torch.testing.assert_close(
        image[0], F.cross_entropy(prior.predict(prefix, codes, hidden=hidden).codes[0], codes[0])
    )
    objective.eval()
    torch.testing.assert_close(objective(prefix, codes)[1][0], F.cross_entropy(prior(prefix, codes)[0], codes[0]))


def gradients(prior, prefix, codes):
    """The gradients of a loss, and the bytes kept between the two passes."""
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel() * tensor.element_size() * (not isinstance(tensor, torch.nn.Parameter))
        return tensor

    prior.zero_grad()
    torch.manual_seed(1)  # for dropout
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sum(losses.sum() for losses in Objective(prior)(prefix, codes))
        loss.backward()
    return [parameter.grad.clone() for parameter in prior.parameters()], kept


def test_activation_checkpointing_gives_the_same_gradients_from_less_memory():
    prior = tiny(dropout=0.2, attention=("row", "full"), depth=6, padding="masked", positions="rotary")
    prefix, codes = prior.pad([[3, 4], []]), torch.randint(0, 16, (2, 12))
    plain, kept = gradients(prior, prefix, codes)
    prior.activation_checkpointing = True
    checkpointed, kept_less = gradients(prior, prefix, codes)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert kept_less < kept / 3


@torch.no_grad()
def test_hidden_padding_is_never_seen():
    for positions in ("learned", "rotary"):
        masked, shown = tiny(padding="masked", positions=positions), tiny(positions=positions)
        prefix, codes = masked.pad([[3, 4]]), torch.randint(0, 16, (1, 12))
        before = masked.predict(prefix, codes), shown.predict(prefix, codes)
        for prior in (masked, shown):
            handles = prior.text_embedding.register_forward_hook(lambda *args: disturb(args[2]))
            after = prior.predict(prefix, codes)
            handles.remove()
            same = torch.equal(after.codes, before[prior is shown].codes)
            assert same == (prior is masked)
            assert torch.equal(after.text[:, :3], before[prior is shown].text[:, :3])  # it comes after them


def disturb(embedded):
    """The text's embeddings with something else at its paddings, save the last, from which the image is foretold."""
    embedded = embedded.clone()
    embedded[:, 3:-1] += 1
    return embedded


def test_dalle_s_size_is_the_paper_s(capsys):
    config = preset("dalle-12b")
    layers, width = 64, 62 * 64
    assert (config.depth, config.dim, config.dim // config.num_heads) == (layers, width, 64)
    assert (config.text_length, config.code_shape, config.codebook_size) == (256, (1, 32, 32), 8192)
    count = parameters(config)
    by_hand = layers * (12 * width**2 + 2 * width + 2 * 64) + width  # blocks and norms
    by_hand += (16384 + 256 + 2 * 8192 + 2 * 32) * width  # embeddings, positions and the head
    assert count == by_hand and abs(count / 12e9 - 1) < 0.02
    report = describe("dalle-12b")
    assert report["parameters"] == count and report["kind"] == "preset" and report["attention"] == "dalle"


def test_a_recipe_takes_a_preset_s_sizes_and_changes_them(tmp_path):
    recipe = {"codes": "c", "text_tokenizer": "t", "run": {"output": "o", "steps": 1, "batch_size": 1}}
    (tmp_path / "prior.yaml").write_text(yaml.safe_dump(recipe))
    model = read_recipe(PriorRecipe, tmp_path / "prior.yaml", ["model.preset=dalle-12b", "model.depth=2"]).model
    assert (model.dim, model.num_heads, model.depth, model.attention) == (3968, 62, 2, "dalle")
    with pytest.raises(InputError, match="'dalle-12' is not a preset, did you mean 'dalle-12b'"):
        read_recipe(PriorRecipe, tmp_path / "prior.yaml", ["model.preset=dalle-12"])
    with pytest.raises(InputError, match="order_annealing must be two rising shares"):
        read_recipe(PriorRecipe, tmp_path / "prior.yaml", ["order_annealing=[0.7, 0.2]"])


def test_two_levels_of_codes_from_pictures_to_a_prior_and_back(tmp_path):
    """VQ-VAE-2's tokenizer, `tessera encode`, a prior in random order with all options on, and pictures."""
    random = np.random.default_rng(0)
    for i in range(6):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "text": [f"picture {i}"]} for i in range(6)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    torch.manual_seed(0)
    trunk = {"channels": 8, "multipliers": [1, 2], "encoder_blocks": 1, "decoder_blocks": 1, "latent_dim": 4,
             "norm_groups": 4}  # fmt: skip
    config = {"image_size": 16, "trunk": trunk, "bottleneck": {"type": "hierarchy", "codebook_size": 16}}
    tokenizer = Autoencoder(AutoencoderConfig.model_validate(config))
    tokenizer(torch.rand(6, 3, 16, 16) * 2 - 1)  # codebooks start from what they are shown first
    tokenizer.eval().save_pretrained(tmp_path / "tokenizer")
    recipes = {
        "text": {"data": {"folder": str(tmp_path)}, "vocab_size": 260, "output": str(tmp_path / "text")},
        "codes": {"data": {"folder": str(tmp_path)}, "image_tokenizer": str(tmp_path / "tokenizer"),
                  "output": str(tmp_path / "codes")},
        "prior": {
            "codes": str(tmp_path / "codes"), "text_tokenizer": str(tmp_path / "text"),
            "image_tokenizer": str(tmp_path / "tokenizer"), "pkeep": 0.9, "activation_checkpointing": True,
            "order_annealing": [0.2, 0.8],
            "model": {"text_length": 12, "dim": 16, "depth": 2, "num_heads": 2, "order": "random", "mlp": "swiglu",
                      "positions": "rotary-2d", "padding": "masked"},
            "run": {"output": str(tmp_path / "run"), "steps": 4, "batch_size": 4, "sample_every": 4, "log_every": 2},
        },
    }  # fmt: skip
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    stage2_prior.train_text.train(tmp_path / "text.yaml")
    stage2_prior.encode.encode(tmp_path / "codes.yaml")
    prior = load_prior(stage2_prior.train.train(tmp_path / "prior.yaml"))
    assert prior.code_shape == tokenizer.code_shape == (5, 4, 4)
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    drawn = sample(prior, prior.prefix(["picture 1"]), range(2))
    assert tokenizer.decode(unflatten_codes(drawn, tokenizer.code_shape)).shape == (2, 3, 16, 16)
