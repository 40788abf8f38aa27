"""`tessera evaluate prior`: losses against ones summed code by code, and codes of another tokenizer."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from stage2_prior import flatten_codes, load_prior
from stage2_prior.evaluate import by_depth, evaluate
from stage2_prior.sampling.settings import guide
from tessera.errors import InputError

CAPTIONS = ["a red heart", "a dog", "红心在蓝色圆圈上方"]


@pytest.fixture
def codes(tiny_parts, tmp_path):
    """A folder as `tessera encode` writes it: four pictures, the last without a caption."""
    config = load_prior(tiny_parts / "prior").config
    drawn = torch.randint(0, config.codebook_size, (4, *config.code_shape), generator=torch.Generator().manual_seed(0))
    save_file({"codes": drawn.int()}, tmp_path / "codes-00000.safetensors")
    rows = [{"text": [caption, "another"], "weight": 1.0} for caption in CAPTIONS] + [{"text": [], "weight": 1.0}]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    meta = {"tokenizer_fingerprint": config.image_tokenizer_fingerprint, "codebook_size": config.codebook_size}
    meta |= {"code_shape": config.code_shape, "rows": 4, "shard_rows": 4}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    return tmp_path, drawn


@torch.no_grad()
def test_losses_are_the_means_over_single_codes_and_tokens(tiny_parts, codes):
    folder, drawn = codes
    report = evaluate(tiny_parts / "prior", folder, guidance_scale=2.0, batch_size=3)

    prior, sequences = load_prior(tiny_parts / "prior"), flatten_codes(drawn)
    sums = {"image": 0.0, "image_without_caption": 0.0, "image_guided": 0.0, "text": 0.0}
    tokens = 0
    for caption, sequence in zip([*CAPTIONS, ""], sequences, strict=True):
        said, none = prior(prior.prefix([caption]), sequence[None])[0], prior(prior.null_prefix(1), sequence[None])[0]
        for t, code in enumerate(sequence.tolist()):
            sums["image"] -= float(said[t].log_softmax(-1)[code])
            sums["image_without_caption"] -= float(none[t].log_softmax(-1)[code])
            sums["image_guided"] -= float(guide(said[t : t + 1], none[t : t + 1], 2.0)[0].log_softmax(-1)[code])
        wanted = [*prior.text_tokenizer.encode(caption), 0] if caption else []
        predicted = prior.predict(prior.prefix([caption]), sequence[None]).text[0]
        sums["text"] -= sum(float(predicted[i].log_softmax(-1)[token]) for i, token in enumerate(wanted))
        tokens += len(wanted)
    for name, total in sums.items():
        assert report[name] == pytest.approx(total / (tokens if name == "text" else sequences.numel()), abs=1e-3)
    assert report["image_by_depth"] == [report["image"]] and report["pictures"] == 4


def test_codes_of_a_position_are_told_apart_by_depth():
    logits = torch.zeros(1, 6, 4)  # three positions of two codes each
    logits[0, ::2, 1] = 50.0  # the first of each position is certain to be 1
    found = by_depth(logits, torch.ones(1, 6, dtype=torch.int64), 2)
    torch.testing.assert_close(found, torch.tensor([0.0, 3 * math.log(4)], dtype=torch.float64))


def test_codes_of_another_tokenizer_are_refused(tiny_parts, codes):
    folder, _ = codes
    meta = json.loads((folder / "meta.json").read_text()) | {"tokenizer_fingerprint": "another"}
    (folder / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="holds codes of another; encode the pictures with the prior's own"):
        evaluate(tiny_parts / "prior", folder)
