"""Labels and maps from a data folder to drawn pictures: encode, train, evaluate, bundle, generate, with bad input."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import stage2_prior.encode
import stage2_prior.finetune
import stage2_prior.train
from pipelines import TextToImagePipeline, cli
from pipelines.bundle import assemble_bundle
from pipelines.conditions import ClassLabel, NoPrompt, SegmentationMap
from stage2_prior import load_prior
from stage2_prior.codes import Codes
from stage2_prior.evaluate import evaluate
from tessera.data.folder import class_names, read_items
from tessera.errors import InputError
from tessera.images import open_image, read_map, to_tensor

from .conftest import tiny_autoencoder

CLASSES = ["dog", "cat", "owl"]
SIZES = {
    "gpt": {"dim": 16, "depth": 1, "num_heads": 2},
    "pixelcnn": {"type": "pixelcnn", "dim": 16, "depth": 2, "kernel_size": 3, "num_heads": 2},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures with labels and maps, two tokenizers, and their codes."""
    root = tmp_path_factory.mktemp("world")
    random, rows = np.random.default_rng(0), []
    for i in range(7):
        for name in (f"{i}.png", f"map{i}.png"):
            Image.fromarray(random.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / name)
        split = "train" if i < 6 else "test"
        rows.append({"file_name": f"{i}.png", "segmentation": f"map{i}.png", "label": CLASSES[i % 3], "split": split})
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    tiny_autoencoder(0).save_pretrained(root / "images")
    tiny_autoencoder(1).save_pretrained(root / "maps")
    recipe = {"data": {"folder": str(root)}, "image_tokenizer": str(root / "images"), "shard_rows": 4, "batch_size": 3,
              "segmentation_tokenizer": str(root / "maps"), "output": str(root / "codes")}  # fmt: skip
    (root / "encode.yaml").write_text(yaml.safe_dump(recipe))
    stage2_prior.encode.encode(root / "encode.yaml")
    return root


def trained(world, out, kind, condition, *overrides):
    run = {"steps": 2, "batch_size": 4, "sample_every": 2, "log_every": 1, "output": str(out)}
    recipe = {"codes": str(world / "codes"), "image_tokenizer": str(world / "images"), "condition": condition,
              "model": SIZES[kind], "run": run}  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "prior.yaml").write_text(yaml.safe_dump(recipe))
    return stage2_prior.train.train(out / "prior.yaml", list(overrides))


def test_codes_on_disk_hold_labels_and_the_codes_of_maps(world):
    codes = Codes(world / "codes")
    assert codes.meta.class_names == ("cat", "dog", "owl")  # by the alphabet, of all splits
    assert codes.labels == [1, 0, 2, 1, 0, 2]
    maps = torch.stack([to_tensor(open_image(world / f"map{i}.png")) for i in range(6)])
    expected = tiny_autoencoder(1).encode(maps)
    assert torch.equal(codes.read_maps(range(len(codes))), expected)
    assert codes.meta.segmentation.tokenizer_fingerprint == tiny_autoencoder(1).fingerprint
    assert load_file(world / "codes" / "codes-00001.safetensors")["segmentation"].shape[0] == 2
    batch = codes.batch([4, 0], ["", ""])
    assert batch.labels == [0, 1] and torch.equal(batch.segmentation, expected[[4, 0]])


def test_classes_are_numbered_by_their_number_or_name(tmp_path):
    def labelled(*labels):
        rows = [{"file_name": f"{i}.png", "label": label} for i, label in enumerate(labels)]
        rows = [{key: value for key, value in row.items() if value is not None} for row in rows]
        (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        return class_names(read_items(tmp_path))

    assert labelled(2, 0, "2") == ("0", "1", "2")
    assert labelled("b", "a", "b") == ("a", "b")
    assert labelled("10", "9", "a") == ("10", "9", "a")
    assert labelled(None, None) == ()
    with pytest.raises(InputError, match=r"1\.png has no label and others have"):
        labelled(0, None)
    with pytest.raises(InputError, match="the label 1000000000 is too high"):
        labelled(0, 10**9)
    for wrong in (-1, 0.5, True, ["a"]):
        with pytest.raises(InputError, match="line 1: 'label' must be a name or a number from 0 on"):
            labelled(wrong)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"segmentation": 3}, "'segmentation' must be the file of a map, got 3"),
        ({"segmentation": "../x.png"}, "'segmentation' ../x.png leads out of the folder"),
    ],
)
def test_wrong_maps_in_the_metadata_are_named(tmp_path, row, message):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png"} | row))
    with pytest.raises(InputError, match=message):
        read_items(tmp_path)


def test_a_picture_without_a_map_is_named_before_anything_is_written(world, tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes((world / name).read_bytes())
    rows = [{"file_name": "0.png", "segmentation": "1.png"}, {"file_name": "1.png"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(InputError, match=r"1\.png has no segmentation map; name one in 'segmentation'"):
        stage2_prior.encode.encode(world / "encode.yaml", [f"data.folder={tmp_path}", f"output={tmp_path}/codes"])
    assert not (tmp_path / "codes").exists()


def test_maps_are_scaled_without_mixing_labels(tmp_path):
    labels = np.random.default_rng(0).integers(0, 5, (16, 16), dtype=np.uint8)
    Image.fromarray(labels).save(tmp_path / "labels.png")
    one_hot = read_map(tmp_path / "labels.png", 16, channels=5)
    assert torch.equal(one_hot.argmax(0), torch.from_numpy(labels).long()) and bool((one_hot.sum(0) == 1).all())
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9], [255, 255, 255]], dtype=np.uint8)
    Image.fromarray(colours[labels]).save(tmp_path / "colours.png")
    small = read_map(tmp_path / "colours.png", 8)
    known = {tuple(colour) for colour in (torch.from_numpy(colours).float() / 127.5 - 1).tolist()}
    assert {tuple(pixel) for pixel in small.flatten(1).T.tolist()} <= known
    with pytest.raises(InputError, match="has the label 4, and this tokenizer knows labels 0 to 3"):
        read_map(tmp_path / "labels.png", 16, channels=4)


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("condition", ["class", "segmentation", "none"])
def test_trained_evaluated_bundled_and_drawn_by_the_same_commands(world, tmp_path, kind, condition, capsys):
    folder = trained(world, tmp_path / "run", kind, condition)
    prior = load_prior(folder)
    assert prior.condition == condition and prior.config.type == kind
    report = evaluate(folder, world / "codes")
    with torch.no_grad():
        codes = Codes(world / "codes")
        prefix = {
            "class": lambda: prior.prefix(classes=codes.labels),
            "segmentation": lambda: prior.prefix(segmentation=codes.read_maps(range(len(codes)))),
            "none": lambda: prior.null_prefix(6),
        }[condition]()
        logits = prior(prefix, codes.read(range(len(codes))))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.read(range(len(codes))).flatten())
    assert report["image"] == pytest.approx(float(loss), abs=1e-3) and report["text"] is None

    bundle = assemble_bundle(
        tmp_path / "bundle", image_tokenizer=world / "images", prior=folder, text_tokenizer=None,
        segmentation_tokenizer=world / "maps" if condition == "segmentation" else None,
    )  # fmt: skip
    prompt, options, wrong = {
        "class": (ClassLabel("owl"), ["--class", "owl"], (["--unconditional"], "was given no condition")),
        "segmentation": (SegmentationMap(world / "map6.png"), ["--segmentation", str(world / "map6.png")],
                         (["--class", "2"], "draws from segmentation maps and was given class labels")),
        "none": (NoPrompt(), ["--unconditional"], (["a cat"], "draws from no condition, say --unconditional")),
    }[condition]  # fmt: skip
    out = ["--model", str(bundle), "-o", str(tmp_path / "out"), "--device", "cpu", "-n", "1", "--candidates", "2"]
    assert cli.main(["generate", *options, *out]) == 0
    picture = next(path for path in (tmp_path / "out").glob("*.png") if "candidates" not in path.name)
    expected = TextToImagePipeline.from_pretrained(bundle, device="cpu")(prompt, num_candidates=2)
    assert np.array_equal(np.asarray(open_image(picture)), np.asarray(expected.images[0]))
    capsys.readouterr()
    assert cli.main(["generate", *wrong[0], *out]) == 2
    assert wrong[1] in capsys.readouterr().err

    again = ["--segmentation", str(world / "map6.png")] if condition == "segmentation" else []
    assert cli.main(["generate", "--replay", str(picture), *again, *out[:6], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"]


def test_a_class_is_called_by_its_number_or_its_name(world, tmp_path):
    prior = load_prior(trained(world, tmp_path, "gpt", "class"))
    assert [prior.class_number(name) for name in ("cat", "owl", "1")] == [0, 2, 1]
    with pytest.raises(InputError, match="this prior has no class 'dgo', did you mean 'dog'"):
        prior.class_number("dgo")


def test_codes_without_the_condition_and_models_without_it_are_refused(world, tmp_path):
    folder = trained(world, tmp_path / "class", "gpt", "class")
    bare = tmp_path / "bare"
    bare.mkdir()
    for i in range(2):
        (bare / f"{i}.png").write_bytes((world / f"{i}.png").read_bytes())
    plain = [f"data.folder={bare}", "data.split=null", "segmentation_tokenizer=null", f"output={bare}/codes"]
    stage2_prior.encode.encode(world / "encode.yaml", plain)
    with pytest.raises(InputError, match="have no labels; give every picture a 'label'"):
        trained(world, tmp_path / "a", "gpt", "class", f"codes={bare}/codes")
    with pytest.raises(InputError, match="has no codes of segmentation maps; encode with a segmentation_tokenizer"):
        trained(world, tmp_path / "b", "pixelcnn", "segmentation", f"codes={bare}/codes")
    with pytest.raises(InputError, match="a prior of text needs text_tokenizer"):
        trained(world, tmp_path / "c", "gpt", "text")
    with pytest.raises(InputError, match="bart reads text, and the condition is class"):
        trained(world, tmp_path / "d", "gpt", "class", "model={type: bart}")
    with pytest.raises(InputError, match="prompts are texts, and the condition is class"):
        trained(world, tmp_path / "e", "gpt", "class", "prompts=[a cat]")
    with pytest.raises(InputError, match="code_dropout is for a gpt, and the prior is a pixelcnn"):
        trained(world, tmp_path / "f", "pixelcnn", "class", "code_dropout=0.5")
    with pytest.raises(InputError, match="have no labels"):
        evaluate(folder, bare / "codes")
    with pytest.raises(InputError, match="was trained with another condition"):
        trained(world, tmp_path / "f", "gpt", "none", f"prior={folder}")


@pytest.mark.parametrize("condition", ["class", "segmentation", "none"])
def test_a_bundle_of_any_condition_is_merged_with_a_lora(world, tmp_path, condition):
    prior = trained(world, tmp_path / "prior", "gpt", condition)
    recipe = {
        "prior": str(prior),
        "codes": str(world / "codes"),
        "lora": {"rank": 4, "alpha": 64, "targets": ["out", "mlp"]},  # fresh blocks add nothing but by these
        "optimizer": {"learning_rate": 0.5, "weight_decay": 0.0},
        "run": {"output": str(tmp_path / "lora"), "steps": 4, "batch_size": 4, "ema_decay": 0.0},
    }
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(recipe))
    lora = stage2_prior.finetune.finetune(tmp_path / "lora.yaml")
    maps = world / "maps" if condition == "segmentation" else None
    bundle = assemble_bundle(
        tmp_path / "bundle", image_tokenizer=world / "images", prior=prior, text_tokenizer=None,
        segmentation_tokenizer=maps,
    )  # fmt: skip
    assert cli.main(["merge", str(bundle), "--lora", str(lora), "--out", str(tmp_path / "merged")]) == 0

    prompt = {"class": ClassLabel("cat"), "segmentation": SegmentationMap(world / "map0.png"), "none": NoPrompt()}
    plain, merged = (
        TextToImagePipeline.from_pretrained(folder, device="cpu") for folder in (bundle, tmp_path / "merged")
    )
    before = plain(prompt[condition], num_candidates=8).codes
    plain.load_lora_weights(lora)
    wanted = plain(prompt[condition], num_candidates=8).codes
    assert torch.equal(merged(prompt[condition], num_candidates=8).codes, wanted)
    assert not torch.equal(before, wanted)  # else the LoRA would show nothing
