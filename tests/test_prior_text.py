"""What training a prior does with captions: cuts that differ from step to step and not from run to run."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from stage2_prior.train import train
from tessera.errors import InputError
from tessera.text import TextTokenizer

CAPTION = "a red heart above a blue circle"


@pytest.fixture
def recipe(tmp_path, tiny_text_tokenizer):
    tiny_text_tokenizer.save_pretrained(tmp_path / "text")
    folder = tmp_path / "codes"
    folder.mkdir()
    save_file({"codes": torch.arange(16).view(4, 1, 2, 2).int()}, folder / "codes-00000.safetensors")
    (folder / "captions.jsonl").write_text((json.dumps({"text": [CAPTION], "weight": 1.0}) + "\n") * 4)
    meta = {"tokenizer_fingerprint": "x", "codebook_size": 16, "code_shape": [1, 2, 2], "rows": 4, "shard_rows": 4}
    (folder / "meta.json").write_text(json.dumps(meta))
    content = {
        "codes": str(folder),
        "text_tokenizer": str(tmp_path / "text"),
        "model": {"text_length": 12, "dim": 16, "depth": 1, "num_heads": 1},
        "condition_dropout": 0.0,
        "run": {"output": str(tmp_path / "run"), "steps": 6, "batch_size": 2, "checkpoint_every": 3},
    }
    (tmp_path / "prior.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def test_bpe_dropout_cuts_anew_and_a_resumed_run_ends_the_same(recipe, monkeypatch, capsys):
    cuts = []
    encode = TextTokenizer.encode

    def watched(self, text, *given):
        cuts.append(tuple(encode(self, text, *given)))
        return list(cuts[-1])

    monkeypatch.setattr(TextTokenizer, "encode", watched)
    model = train(recipe / "prior.yaml", ["bpe_dropout=0.3"])
    assert len(set(cuts)) > 8 and all(len(cut) > 3 for cut in cuts)
    assert "captions cut at 12 tokens, <start> among them: Latin" in capsys.readouterr().err
    trained = load_file(model / "model.safetensors")

    (recipe / "run" / "checkpoints" / "step-0000006.pt").unlink()
    before, cuts[:] = list(cuts), []
    again = load_file(train(recipe / "prior.yaml", ["bpe_dropout=0.3"]) / "model.safetensors")
    assert cuts == before[6:]
    assert all(torch.equal(weight, again[name]) for name, weight in trained.items())


def test_without_it_every_cut_is_the_tokenizers_own(recipe, monkeypatch):
    given = []
    encode = TextTokenizer.encode
    monkeypatch.setattr(TextTokenizer, "encode", lambda self, *a: given.append(encode(self, *a)) or given[-1])
    train(recipe / "prior.yaml")
    own = encode(TextTokenizer.from_pretrained(recipe / "text"), CAPTION)
    assert len(given) == 12 and all(one == own for one in given)


def test_clip_s_tokenizer_trains_a_prior_and_dropout_out_of_range_is_refused(recipe):
    model = train(recipe / "prior.yaml", ["text_tokenizer=clip", "run.steps=1"])
    assert json.loads((model / "config.json").read_text())["text_vocab_size"] == 49411
    with pytest.raises(InputError, match="bpe_dropout"):
        train(recipe / "prior.yaml", ["bpe_dropout=1.5"])
