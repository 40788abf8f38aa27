"""Bundles: whole and fitting together, or one sentence that names the part, the file and the way out."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines import bundle as bundles
from pipelines.bundle import (
    INDEX,
    Bundle,
    assemble_bundle,
    bundle_fingerprint,
    find_bundle,
    load_bundle,
    read_index,
    save_bundle,
    shipped_bundles,
)
from pipelines.text_to_image import TextToImagePipeline
from rerank import ClipReranker
from rerank.clip import new_clip
from stage1_tokenizer import Autoencoder
from stage2_prior import Sampling, load_prior
from tessera.clip.folder import WEIGHT_FILE
from tessera.errors import InputError
from tessera.text import TextTokenizer
from tessera.weights.writing import file_hash
from tests.conftest import CAPTIONS, TINY_CLIP, tiny_autoencoder, tiny_prior

PARTS = ("image_tokenizer", "text_tokenizer", "prior", "reranker")
MEGABYTE = 2**20


def folders(parts: Path, **changes: Path | None) -> dict[str, Path | None]:
    """The arguments of assemble_bundle that name parts."""
    return {part: parts / part for part in PARTS} | changes


def assembled(out: Path, parts: Path, **changes: Path | None) -> Path:
    return assemble_bundle(out, **folders(parts, **changes))  # type: ignore[arg-type]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 500
    return sentence


@pytest.fixture
def copied(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


# Whole bundles --------------------------------------------------------------------------------------------------------


def test_each_part_loads_alone(tiny_bundle: Path, tiny_clip: ClipReranker) -> None:
    assert sorted(path.name for path in tiny_bundle.iterdir()) == sorted([INDEX, *PARTS])
    autoencoder = Autoencoder.from_pretrained(tiny_bundle / "image_tokenizer")
    prior = load_prior(tiny_bundle / "prior")
    text_tokenizer = TextTokenizer.from_pretrained(tiny_bundle / "text_tokenizer")
    assert autoencoder.fingerprint == prior.config.image_tokenizer_fingerprint
    assert text_tokenizer.fingerprint == prior.config.text_tokenizer_fingerprint
    assert ClipReranker.from_pretrained(tiny_bundle / "reranker").fingerprint == tiny_clip.fingerprint

    index = read_index(tiny_bundle)
    assert index.fingerprints.image_tokenizer == autoencoder.fingerprint
    assert index.fingerprints.text_tokenizer == text_tokenizer.fingerprint
    assert index.fingerprints.reranker == tiny_clip.fingerprint
    assert set(index.files) == {str(path.relative_to(tiny_bundle)) for path in tiny_bundle.glob("*/*")}


def test_the_fingerprint_changes_when_pictures_do(tiny_parts: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    same = bundle_fingerprint(tiny_bundle)
    assert bundle_fingerprint(assembled(tmp_path / "again", tiny_parts)) == same
    assert bundle_fingerprint(assembled(tmp_path / "without", tiny_parts, reranker=None)) == same
    assert load_bundle(tiny_bundle, rerank=False).fingerprint == same

    text_tokenizer = TextTokenizer.from_pretrained(tiny_parts / "text_tokenizer")
    tiny_prior(tiny_autoencoder(), text_tokenizer, seed=1).save_pretrained(tmp_path / "prior")
    assert bundle_fingerprint(assembled(tmp_path / "other", tiny_parts, prior=tmp_path / "prior")) != same


def test_a_bundle_without_a_reranker(tiny_parts: Path, tmp_path: Path) -> None:
    loaded = load_bundle(assembled(tmp_path / "bundle", tiny_parts, reranker=None))
    assert loaded.reranker is None and loaded.sampling == Sampling()
    assert not (tmp_path / "bundle" / "reranker").exists()


def test_a_pipeline_is_saved_as_a_bundle(
    tiny_pipeline: TextToImagePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_pipeline.bundle, "likelihood_weight", 0.25)
    tiny_pipeline.save_pretrained(tmp_path / "saved")
    again = TextToImagePipeline.from_pretrained(tmp_path / "saved", device="cpu")
    first, second = tiny_pipeline("a cat", num_candidates=3), again("a cat", num_candidates=3)
    assert first.scores == second.scores and first.seeds == second.seeds
    assert [image.tobytes() for image in first.images] == [image.tobytes() for image in second.images]
    assert again.sampling == tiny_pipeline.sampling and again.likelihood_weight == 0.25


def test_a_bundle_with_a_wrong_weight_is_not_written(tiny_parts: Path, tmp_path: Path) -> None:
    parts: dict[str, Any] = dict(folders(tiny_parts))
    for weight in (-1.0, float("inf"), float("nan")):
        call = partial(assemble_bundle, tmp_path / "new", **parts, likelihood_weight=weight)
        assert "likelihood_weight must be a finite number from 0 on" in refusal(call)
    assert not (tmp_path / "new").exists()


def test_an_older_bundle_is_replaced_and_nothing_else(tiny_parts: Path, copied: Path, tmp_path: Path) -> None:
    assembled(copied, tiny_parts, reranker=None)
    assert load_bundle(copied).reranker is None

    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    assert "exists and is not a bundle; give a new folder" in refusal(lambda: assembled(home, tiny_parts))
    assert "is a file, not a folder" in refusal(lambda: assembled(home / "letter.txt", tiny_parts))
    assert (home / "letter.txt").read_text() == "dear"


# Damaged bundles ------------------------------------------------------------------------------------------------------


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swapped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (Path.unlink, "is incomplete, {} is missing"),
        (cut_off, "is damaged or swapped, {} is"),
        (swapped, "swapped, {} is"),
    ],
)
def test_every_damaged_file_is_named(
    tiny_bundle: Path, tmp_path: Path, damage: Callable[[Path], None], sentence: str
) -> None:
    files = read_index(tiny_bundle).files
    assert len(files) == 9
    for number, name in enumerate(files):
        folder = Path(shutil.copytree(tiny_bundle, tmp_path / str(number)))
        damage(folder / name)
        said = refusal(lambda folder=folder: load_bundle(folder))  # type: ignore[misc]
        assert said.startswith(f"the {name.split('/')[0].replace('_', ' ')} of the bundle is")
        assert sentence.format(folder / name) in said
        assert said.endswith("restore the file, or assemble the bundle again")


def test_a_part_of_another_bundle(copied: Path, tiny_parts: Path, tmp_path: Path) -> None:
    tiny_autoencoder(seed=1).save_pretrained(copied / "image_tokenizer")
    assert "the image tokenizer of the bundle is damaged or swapped" in refusal(lambda: load_bundle(copied))

    # Also where somebody brought the index up to date.
    index = json.loads((copied / INDEX).read_text())
    index["files"] = {name: file_hash(copied / name) for name in index["files"]}
    (copied / INDEX).write_text(json.dumps(index))
    said = refusal(lambda: load_bundle(copied))
    assert f"the prior in {copied / 'prior'} was trained on codes of image tokenizer" in said
    assert tiny_autoencoder(seed=0).fingerprint in said and tiny_autoencoder(seed=1).fingerprint in said
    assert "put those together that belong together" in said


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "is not valid JSON"),
        ("[]", "got []"),
        ("{}", "the key '_tessera_version' is missing"),
        ('{"_tessera_version": "1", "fingerprints": {}, "files": {}}', "is missing"),
    ],
)
def test_a_broken_index(copied: Path, content: str, sentence: str) -> None:
    (copied / INDEX).write_text(content)
    said = refusal(lambda: load_bundle(copied))
    assert str(copied / INDEX) in said and sentence in said


@pytest.mark.parametrize("name", ["../secret", "prior/../../x", "/etc/passwd", "prior/..", "judge/config.json"])
def test_an_index_that_points_elsewhere(copied: Path, name: str) -> None:
    index = json.loads((copied / INDEX).read_text())
    (copied / INDEX).write_text(json.dumps(index | {"files": {name: "0"}}))
    assert "is not a file of a part" in refusal(lambda: load_bundle(copied))


# Parts that do not fit ------------------------------------------------------------------------------------------------


def test_a_prior_of_another_image_tokenizer(tiny_parts: Path, tmp_path: Path) -> None:
    tiny_autoencoder(seed=1).save_pretrained(tmp_path / "other")
    said = refusal(lambda: assembled(tmp_path / "out", tiny_parts, image_tokenizer=tmp_path / "other"))
    assert f"the prior in {tiny_parts / 'prior'} was trained on codes of image tokenizer" in said
    assert str(tmp_path / "other") in said
    assert not (tmp_path / "out").exists()


def test_a_prior_that_draws_other_codes(tiny_parts: Path, tiny_text_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    prior = load_prior(tiny_parts / "prior", tiny_text_tokenizer)
    prior.config = prior.config.model_copy(update={"image_tokenizer_fingerprint": "", "code_shape": (1, 2, 8)})
    prior.save_pretrained(tmp_path / "prior")
    said = refusal(lambda: assembled(tmp_path / "out", tiny_parts, prior=tmp_path / "prior"))
    assert "cannot be loaded" in said or "draws 16 codes of 32" in said


def test_a_prior_of_another_text_tokenizer(tiny_parts: Path, tmp_path: Path) -> None:
    TextTokenizer.train(CAPTIONS[:1], vocab_size=300).save_pretrained(tmp_path / "text")
    said = refusal(lambda: assembled(tmp_path / "out", tiny_parts, text_tokenizer=tmp_path / "text"))
    assert f"the prior in {tiny_parts / 'prior'} was trained with text tokenizer" in said


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_not_there(tiny_parts: Path, tmp_path: Path, part: str) -> None:
    (tmp_path / "empty").mkdir()
    said = refusal(lambda: assembled(tmp_path / "out", tiny_parts, **{part: tmp_path / "empty"}))
    assert str(tmp_path / "empty") in said
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_reranker_that_is_a_pickle(tiny_parts: Path, tiny_clip: ClipReranker, tmp_path: Path) -> None:
    import torch

    shutil.copytree(tiny_parts / "reranker", tmp_path / "reranker")
    (tmp_path / "reranker" / WEIGHT_FILE).unlink()
    torch.save(tiny_clip.model.state_dict(), tmp_path / "reranker" / "open_clip_pytorch_model.bin")
    said = refusal(lambda: assembled(tmp_path / "out", tiny_parts, reranker=tmp_path / "reranker"))
    assert f"has no {WEIGHT_FILE}; write it with ClipReranker.save_pretrained" in said


def test_a_prior_without_its_text_tokenizer(
    tiny_parts: Path, tiny_text_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    prior = load_prior(tiny_parts / "prior", tiny_text_tokenizer)
    prior.text_tokenizer = None
    assert "has no text tokenizer" in refusal(lambda: save_bundle(tmp_path / "out", Bundle(tiny_autoencoder(), prior)))


# Names ----------------------------------------------------------------------------------------------------------------


def test_names(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "shipped" / "emoji")
    monkeypatch.setattr(bundles, "SHIPPED", tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert shipped_bundles() == ["emoji"]
    assert find_bundle("emoji") == tmp_path / "shipped" / "emoji"
    (tmp_path / "emoji").mkdir()  # hides nothing, for it is not a bundle
    assert find_bundle("emoji") == tmp_path / "shipped" / "emoji"
    assert find_bundle(tiny_bundle) == tiny_bundle

    assert "there is no bundle 'emoij'" in refusal(lambda: find_bundle("emoij"))
    assert "did you mean 'emoji'?" in refusal(lambda: find_bundle("emoij"))
    assert "shipped are emoji" in refusal(lambda: find_bundle("xyz"))
    (tmp_path / "photos").mkdir()
    said = refusal(lambda: find_bundle("photos"))
    assert said == f"photos is not a bundle, it has no {INDEX}; shipped bundles are emoji"


def test_a_hub_name_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    said = refusal(lambda: find_bundle("owner/model"))
    assert "the hub did not give it" in said and "check the name and the network" in said


@pytest.mark.skipif(not shipped_bundles(), reason="no bundle is shipped yet")
@pytest.mark.parametrize("name", shipped_bundles())
def test_shipped_bundles_are_whole_and_small(name: str) -> None:
    folder = find_bundle(name)
    bundles.check_files(folder, read_index(folder))
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    assert max(sizes) <= 16 * MEGABYTE and sum(sizes) <= 48 * MEGABYTE


def test_a_new_reranker_changes_its_fingerprint(tiny_clip: ClipReranker, tiny_text_tokenizer: TextTokenizer) -> None:
    assert new_clip(TINY_CLIP, tiny_text_tokenizer).fingerprint != tiny_clip.fingerprint
