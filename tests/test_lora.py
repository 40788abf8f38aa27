"""LoRA: no effect at first, ours equal to peft's, only the adapter learns, and what goes wrong is a sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from pipelines import cli
from pipelines.bundle import find_bundle
from pipelines.output import generate
from pipelines.replay import replay
from pipelines.text_to_image import TextToImagePipeline
from stage2_prior import GPTConfig, GPTPrior, flatten_codes, load_prior
from stage2_prior.finetune import LoraSettings, add_lora, finetune, save_lora, split_qkv
from stage2_prior.lora import Loras, base_fingerprint, read_lora, target_layers
from tessera.errors import InputError
from tessera.text import TextTokenizer
from tessera.training.run import OptimizerConfig, Optimizers, Run

ALL = ("q", "k", "v", "out", "mlp")
SHIPPED_BASE = "65606d684697c5c7"  # fingerprint of the shipped prior as the base of LoRAs, computed by release 0.1


def random_prior(codebooks: int = 1, seed: int = 0) -> GPTPrior:
    torch.manual_seed(seed)
    config = GPTConfig(
        codebook_size=32, code_shape=(codebooks, 2, 3), text_vocab_size=300, text_length=6, dim=32, depth=2, num_heads=2
    )
    prior = GPTPrior(config).eval()
    with torch.no_grad():
        for weight in prior.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    return prior


def batch(prior: GPTPrior) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    prefix = prior.pad(torch.randint(3, 300, (3, 5), generator=generator).tolist())
    return prefix, torch.randint(0, 32, (3, prior.length), generator=generator)


def stirred(prior: nn.Module) -> None:
    """Gives B, which is zero at first, numbers as training would."""
    with torch.no_grad():
        for name, weight in prior.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.1)


def adapter(folder: Path, prior: GPTPrior, **settings: object) -> torch.Tensor:
    """Saves a stirred adapter for a prior, and returns the logits of peft's own, unmerged layers."""
    base = base_fingerprint(prior)
    add_lora(prior, LoraSettings.model_validate(settings))
    stirred(prior)
    save_lora(prior, folder, base, "some/base")
    with torch.no_grad():
        return prior(*batch(prior))


@pytest.mark.parametrize("codebooks", [1, 4])
@pytest.mark.parametrize("targets", [ALL, ("q",), ("k", "out"), ("v", "mlp")])
@torch.no_grad()
def test_a_fresh_adapter_changes_nothing(codebooks, targets):
    prior = random_prior(codebooks)
    before, base = prior(*batch(prior)), base_fingerprint(prior)
    add_lora(prior, LoraSettings(targets=targets))
    torch.testing.assert_close(prior(*batch(prior)), before, rtol=0, atol=1e-6)
    assert base_fingerprint(prior) == base
    stirred(prior)
    assert (prior(*batch(prior)) - before).abs().max() > 0.01


@pytest.mark.parametrize("codebooks", [1, 4])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", [ALL, ("q",), ("k",), ("v",), ("out",), ("mlp",), ("q", "v")])
@torch.no_grad()
def test_merged_equals_unmerged(tmp_path, codebooks, targets, rslora):
    unmerged = adapter(tmp_path / "lora", random_prior(codebooks), targets=targets, rank=3, rslora=rslora)
    prior = random_prior(codebooks)
    Loras(prior).add(tmp_path / "lora")
    torch.testing.assert_close(prior(*batch(prior)), unmerged, rtol=0, atol=1e-5)


@torch.no_grad()
def test_peft_itself_reads_the_files(tmp_path):
    from peft import PeftModel

    unmerged = adapter(tmp_path / "lora", random_prior(), rank=4, rslora=True)
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    prior = random_prior()
    split_qkv(prior, target_layers(prior, ALL))
    theirs = PeftModel.from_pretrained(prior, str(tmp_path / "lora"))
    torch.testing.assert_close(theirs(*batch(prior)), unmerged, rtol=0, atol=1e-5)


def test_each_third_of_the_attention_is_its_own(tmp_path):
    """An adapter of q alone changes the queries' rows of `qkv` and nothing else."""
    adapter(tmp_path / "lora", random_prior(), targets=("q",))
    prior, before = random_prior(), random_prior().state_dict()
    Loras(prior).add(tmp_path / "lora")
    changed = {name for name, weight in prior.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"decoder.blocks.0.attention.qkv.weight", "decoder.blocks.1.attention.qkv.weight"}
    for name in changed:
        moved = (prior.state_dict()[name] != before[name]).any(1)
        assert moved[:32].all() and not moved[32:].any()


@torch.no_grad()
def test_weights_scale_and_add_up_and_leave_no_trace(tmp_path):
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        adapter(tmp_path / name, random_prior(), rank=seed + 2)
    prior, before = random_prior(), random_prior().state_dict()
    loras = Loras(prior)
    loras.add(tmp_path / "a", 0.8)
    loras.add(tmp_path / "b", -0.5)
    for layer in ("decoder.blocks.0.attention.out", "code_head"):
        if layer == "code_head":
            assert torch.equal(prior.code_head.weight, before["code_head.weight"])
            continue
        expected = before[f"{layer}.weight"].clone()
        for name, weight in (("a", 0.8), ("b", -0.5)):
            state = load_file(tmp_path / name / "adapter_model.safetensors")
            rank = json.loads((tmp_path / name / "adapter_config.json").read_text())["r"]
            a, b = (state[f"base_model.model.{layer}.lora_{half}.weight"] for half in "AB")
            expected += weight * 16 / rank * b @ a
        torch.testing.assert_close(prior.get_parameter(f"{layer}.weight"), expected)
    loras.remove()
    assert all(torch.equal(weight, before[name]) for name, weight in prior.state_dict().items())


def test_a_fused_lora_makes_another_base(tmp_path):
    adapter(tmp_path / "lora", random_prior())
    loras = Loras(random_prior())
    loras.add(tmp_path / "lora")
    loras.fuse()
    with pytest.raises(InputError, match="was trained on the prior"):
        loras.add(tmp_path / "lora")
    loras.remove()
    assert base_fingerprint(loras.prior) != base_fingerprint(random_prior()) and len(loras.fused) == 1


def test_the_fingerprint_of_a_base_holds_at_lower_precision():
    prior = random_prior()
    assert (
        base_fingerprint(prior.bfloat16()) == base_fingerprint(random_prior()) != base_fingerprint(random_prior(1, 1))
    )


def test_only_the_adapter_is_trained_and_b_at_its_own_rate():
    prior = random_prior()
    add_lora(prior, LoraSettings(targets=("q", "mlp")))
    learned = {name for name, weight in prior.named_parameters() if weight.requires_grad}
    assert learned and all(".lora_" in name for name in learned)
    config = OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, warmup_steps=1, betas=(0.0, 0.0))
    before = {name: weight.detach().clone() for name, weight in prior.named_parameters()}
    optimizers = Optimizers(prior, config, 10, {"lora_B": 16.0})
    for name, weight in prior.named_parameters():
        weight.grad = torch.ones_like(weight) if name in learned else None
    optimizers.step(0)
    for name, weight in prior.named_parameters():  # Adam's first step is the learning rate itself
        step = 0.0 if name not in learned else 16e-3 if ".lora_B." in name else 1e-3
        torch.testing.assert_close(before[name] - weight, torch.full_like(weight, step), rtol=1e-3, atol=1e-6)


# tessera finetune -----------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tiny_parts, tmp_path) -> Path:
    """Codes of four pictures that are new and of four that are known, and a recipe for them."""
    config = load_prior(tiny_parts / "prior").config
    for seed, name in enumerate(("new", "known")):
        folder = tmp_path / name
        folder.mkdir()
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(0, config.codebook_size, (4, *config.code_shape), generator=generator)
        save_file({"codes": drawn.int()}, folder / "codes-00000.safetensors")
        rows = [{"text": [f"a {name} thing"], "weight": 1.0}] * 4
        (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        meta = {"tokenizer_fingerprint": config.image_tokenizer_fingerprint, "codebook_size": config.codebook_size}
        meta |= {"code_shape": config.code_shape, "rows": 4, "shard_rows": 4}
        (folder / "meta.json").write_text(json.dumps(meta))
    content = {
        "prior": str(tiny_parts / "prior"),
        "codes": str(tmp_path / "new"),
        "image_tokenizer": str(tiny_parts / "image_tokenizer"),
        "remember": str(tmp_path / "known"),
        "lora": {"rank": 4, "b_rate": 2.0},
        "optimizer": {"learning_rate": 0.02, "weight_decay": 0.0, "warmup_steps": 2},
        "run": {
            "output": str(tmp_path / "run"),
            "steps": 30,
            "batch_size": 4,
            "ema_decay": 0.5,
            "checkpoint_every": 10,
            "sample_every": 30,
        },
    }
    path = tmp_path / "lora.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_it_learns_and_a_resumed_run_ends_the_same(recipe, tiny_parts, tmp_path):
    folder = finetune(recipe)
    prior = load_prior(tiny_parts / "prior")
    codes = flatten_codes(load_file(tmp_path / "new" / "codes-00000.safetensors")["codes"].long())
    prefix = prior.prefix(["a new thing"] * 4)

    @torch.no_grad()
    def nats() -> float:
        return float(nn.functional.cross_entropy(prior(prefix, codes).flatten(0, 1), codes.flatten()))

    before = nats()
    loras = Loras(prior)
    loras.add(folder)
    assert nats() < before - 0.5
    assert (tmp_path / "run" / "samples" / "samples-000030.png").is_file()
    loras.remove()
    assert nats() == before

    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "run" / "checkpoints", stopped / "checkpoints")
    (stopped / "checkpoints" / "step-0000030.pt").unlink()
    again = finetune(recipe, [f"run.output={stopped}"])
    assert (again / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()
    size = (stopped / "checkpoints" / "step-0000030.pt").stat().st_size
    assert size < (tiny_parts / "prior" / "model.safetensors").stat().st_size * 3  # the adapter alone is in it


def test_batches_hold_new_and_known_pictures(recipe, monkeypatch):
    """The captions of every step: half of them each."""
    seen: list[list[str]] = []
    original = Run.batches

    def watched(self, steps):
        for one in original(self, steps):
            seen.append(one.captions)
            yield one

    monkeypatch.setattr(Run, "batches", watched)
    finetune(recipe, ["run.steps=3", "remember_share=0.25"])
    assert all(sorted(captions) == ["a known thing"] + ["a new thing"] * 3 for captions in seen) and len(seen) == 3


def test_noise_is_that_of_training_and_a_resumed_run_ends_the_same(recipe, tiny_parts, monkeypatch):
    """Captions are cut anew from step to step and codes read with mistakes."""
    cuts, encode = [], TextTokenizer.encode

    def watched(self, text, *given):
        cuts.append(tuple(encode(self, text, *given)))
        return list(cuts[-1])

    monkeypatch.setattr(TextTokenizer, "encode", watched)
    noise = ["bpe_dropout=0.4", "pkeep=0.6", "run.steps=4", "run.checkpoint_every=2", "run.sample_every=4"]
    noisy = (finetune(recipe, noise) / "adapter_model.safetensors").read_bytes()
    during = cuts[:16]  # 4 steps of 4 captions; those of the sample pictures follow
    assert len(set(during)) > 6 and len(set(cuts[16:])) == 1
    run = Path(yaml.safe_load(recipe.read_text())["run"]["output"])
    (run / "checkpoints" / "step-0000004.pt").unlink()
    cuts.clear()
    assert (finetune(recipe, noise) / "adapter_model.safetensors").read_bytes() == noisy
    assert cuts[:8] == during[8:]

    read, predict = [], GPTPrior.predict
    monkeypatch.setattr(GPTPrior, "predict", lambda self, *given: read.append(given[1]) or predict(self, *given))
    shown, batches = [], Run.batches
    monkeypatch.setattr(Run, "batches", lambda self, steps: (shown.append(b.codes) or b for b in batches(self, steps)))
    finetune(recipe, [*noise, f"run.output={run}-2"])
    kept = [(a.flatten() == b.flatten()).float().mean() for a, b in zip(read, shown, strict=True)]
    assert abs(sum(kept) / 4 - (0.6 + 0.4 / 32)) < 0.1  # of 4 · 4 · 16 codes; one in 32 is drawn as it was
    for wrong in ("pkeep=0", "bpe_dropout=2"):
        with pytest.raises(InputError, match=wrong.partition("=")[0]):
            finetune(recipe, [wrong])


def test_what_cannot_be_fine_tuned_is_a_sentence(recipe, tiny_parts, tmp_path, capsys):
    def refused(*overrides: str) -> str:
        assert cli.main(["finetune", "prior", str(recipe), *overrides]) == 2
        return capsys.readouterr().err

    assert "must be adamw" in refused("optimizer.type=muon")
    assert "did you mean 'rank'?" in refused("lora.rnk=3")
    assert "leaves one side empty" in refused("remember_share=0.01")
    assert "lora.targets" in refused("lora.targets=[gate]")
    assert "has no meta.json" in refused(f"codes={tiny_parts}")
    meta = json.loads((tmp_path / "known" / "meta.json").read_text()) | {"tokenizer_fingerprint": "another"}
    (tmp_path / "known" / "meta.json").write_text(json.dumps(meta))
    assert "holds codes of another; encode with the prior's own tokenizer" in refused()
    with pytest.raises(InputError, match="this prior has no layers 'q'; it has mlp"):
        target_layers(nn.ModuleDict({"mlp_in": nn.Linear(2, 2)}), ["q"])


# The pipeline and the command line ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_lora(tiny_parts, tmp_path_factory) -> Path:
    """A LoRA of the tiny bundle's prior, strong enough to change what is drawn."""
    folder = tmp_path_factory.mktemp("loras") / "stirred"
    prior = load_prior(tiny_parts / "prior")
    base = base_fingerprint(prior)
    torch.manual_seed(0)
    add_lora(prior, LoraSettings(rank=4))
    with torch.no_grad():
        for name, weight in prior.named_parameters():
            if ".lora_B." in name:
                weight.normal_(std=0.5)
    save_lora(prior, folder, base, "tiny")
    return folder


def test_a_pipeline_draws_with_a_lora_and_without_it_again(tiny_bundle, tiny_lora, tmp_path):
    pipeline = TextToImagePipeline.from_pretrained(tiny_bundle, device="cpu", rerank=False)

    def codes() -> list[int]:
        return pipeline("a red heart", num_candidates=2).codes.flatten().tolist()

    before = codes()
    pipeline.load_lora_weights(tiny_lora, weight=0.0)
    assert codes() == before
    pipeline.unload_lora_weights()
    pipeline.load_lora_weights(tiny_lora, weight=0.8)
    changed = codes()
    assert changed != before
    with pytest.raises(InputError, match="not fused"):
        pipeline.save_pretrained(tmp_path / "bundle")
    pipeline.fuse_lora()
    assert codes() == changed and pipeline.fingerprint is None
    pipeline.save_pretrained(tmp_path / "bundle")
    saved = TextToImagePipeline.from_pretrained(tmp_path / "bundle", device="cpu", rerank=False)
    assert saved("a red heart", num_candidates=2).codes.flatten().tolist() == changed
    pipeline.unload_lora_weights()
    assert codes() == changed


def test_generate_and_merge_draw_the_same(tiny_bundle, tiny_parts, tiny_lora, tmp_path, capsys):
    small = ["a red heart", "-n", "1", "--candidates", "2", "--json", "-o"]

    def drawn(out: str, *options: object) -> bytes:
        assert cli.main(["generate", *small, str(tmp_path / out), *map(str, options)]) == 0, capsys.readouterr().err
        from PIL import Image

        path = json.loads(capsys.readouterr().out)["prompts"][0]["images"][0]["path"]
        return Image.open(path).tobytes()

    plain = drawn("plain", "--model", tiny_bundle)
    with_lora = drawn("lora", "--model", tiny_bundle, "--lora", f"{tiny_lora}:0.8")
    assert with_lora != plain != drawn("whole", "--model", tiny_bundle, "--lora", tiny_lora)
    assert cli.main(["merge", str(tiny_bundle), "--lora", f"{tiny_lora}:0.8", "-o", str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "merged")
    assert drawn("merged-out", "--model", tmp_path / "merged") == with_lora

    merge = ["merge", str(tiny_parts / "prior"), "--lora", f"{tiny_lora}:0.8", "-o", str(tmp_path / "prior")]
    assert cli.main(merge) == 0
    prior = load_prior(tmp_path / "prior")
    inside = load_prior(tmp_path / "merged" / "prior")
    assert all(torch.equal(weight, inside.state_dict()[name]) for name, weight in prior.state_dict().items())


def test_a_picture_remembers_its_loras(tiny_bundle, tiny_lora, tmp_path):
    options = {"model": tiny_bundle, "num_candidates": 1, "rerank": False, "sheet": False, "device": "cpu"}
    report = generate("a dog", tmp_path / "out", loras=[(tiny_lora, 0.5)], **options)
    picture = report.prompts[0].images[0].path
    assert replay(picture, tmp_path / "again", model=tiny_bundle, loras=[(tiny_lora, 0.5)]).identical
    for wrong in ([], [(tiny_lora, 0.6)]):
        with pytest.raises(InputError, match="was drawn with --lora FOLDER:0.5 .*; give exactly that"):
            replay(picture, tmp_path / "again", model=tiny_bundle, loras=wrong)
    without = generate("a dog", tmp_path / "out", **options).prompts[0].images[0].path
    with pytest.raises(InputError, match="was drawn with no LoRA"):
        replay(without, tmp_path / "again", model=tiny_bundle, loras=[(tiny_lora, 0.5)])


def test_a_wrong_lora_is_a_sentence(tiny_bundle, tiny_lora, tmp_path, capsys):
    def refused(lora: object, *options: str) -> str:
        command = ["generate", "a dog", "--model", str(tiny_bundle), "-o", str(tmp_path / "out"), "--lora", str(lora)]
        assert cli.main([*command, *options]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    def changed(name: str, **changes: object) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_lora, folder)
        content = json.loads((folder / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps(content))
        return folder

    assert "neither an existing folder nor a hub name" in refused(tmp_path / "none")
    assert "the weight 'much' is not a number; write FOLDER:0.8" in refused(f"{tiny_lora}:much")
    assert "must be a finite number, got nan" in refused(f"{tiny_lora}:nan")
    assert "is not a LoRA, it has no adapter_config.json" in refused(tiny_bundle)
    other = refused(changed("other", revision="0123456789abcdef"))
    assert "was trained on the prior 0123456789abcdef, this one is" in other and "use it with the model" in other
    assert "(it does not say which)" in refused(changed("unnamed", revision=None))
    assert "use_dora" in refused(changed("dora", use_dora=True))
    assert "is not of rank 5" in refused(changed("rank", r=5))
    broken = changed("broken")
    (broken / "adapter_model.safetensors").write_bytes(b"\0" * 20)
    assert "cannot be read" in refused(broken)
    half = changed("half")
    state = load_file(half / "adapter_model.safetensors")
    save_file(dict(list(state.items())[1:]), half / "adapter_model.safetensors")
    assert "has no whole pair of A and B" in refused(half)
    extra = changed("extra")
    save_file({**state, "base_model.model.norm.weight": torch.ones(2)}, extra / "adapter_model.safetensors")
    assert "which is no part of a plain LoRA" in refused(extra)
    wide = changed("wide")
    save_file({name: torch.cat([w, w], 1) if ".lora_A." in name else w for name, w in state.items()},
              wide / "adapter_model.safetensors")  # fmt: skip
    assert "this prior's is" in refused(wide)
    named = {name.replace("blocks.0", "blocks.9"): weight for name, weight in state.items()}
    elsewhere = changed("elsewhere")
    save_file(named, elsewhere / "adapter_model.safetensors")
    assert "which this prior does not have" in refused(elsewhere)


def test_a_wrong_merge_is_a_sentence(tiny_bundle, tiny_lora, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("in the way")
    for arguments, sentence in (
        (["merge", str(tiny_bundle)], "there is nothing to merge"),
        (
            ["merge", str(tiny_bundle), "--lora", str(tiny_lora), "-o", str(tmp_path / "full")],
            "exists and is not a bundle",
        ),
        (["merge", "emojo", "--lora", str(tiny_lora), "-o", str(tmp_path / "new")], "there is no bundle 'emojo'"),
    ):
        assert cli.main(arguments) == 2
        assert sentence in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_info_knows_a_lora(tiny_lora, capsys):
    assert cli.main(["info", str(tiny_lora), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "LoRA" and report["r"] == 4 and report["revision"] == read_lora(tiny_lora).base
    assert report["parameters"] == sum(a.numel() + b.numel() for a, b in read_lora(tiny_lora).layers.values())


def test_an_adapter_of_release_0_1_is_one_of_the_same_prior(tmp_path):
    """It named the trunk's layers without `decoder.`; the fingerprint of its base is the one of then."""
    adapter(tmp_path / "new", random_prior(), rank=2)
    old = tmp_path / "old"
    old.mkdir()
    state = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert any(".decoder.blocks." in name for name in state)
    save_file({name.replace(".decoder.blocks.", ".blocks."): one for name, one in state.items()},
              old / "adapter_model.safetensors")  # fmt: skip
    config = (tmp_path / "new" / "adapter_config.json").read_text("utf-8").replace("decoder.blocks.", "blocks.")
    (old / "adapter_config.json").write_text(config, "utf-8")
    new_prior, old_prior = random_prior(), random_prior()
    Loras(new_prior).add(tmp_path / "new")
    Loras(old_prior).add(old)
    old_state = old_prior.state_dict()
    assert all(torch.equal(weight, old_state[name]) for name, weight in new_prior.state_dict().items())
    shipped = load_prior(find_bundle("emoji") / "prior")
    assert base_fingerprint(shipped) == SHIPPED_BASE  # as release 0.1 computed it
