"""Calibration of layer groups against an independent computation, on a real base and text."""

import hashlib
import json
from collections import Counter

import forked
import pytest
import torch

from nemo_tiedlora.analysis.texts import read_texts
from nemo_tiedlora.errors import UsageError
from nemo_tiedlora.job import calibrate


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("rows.jsonl", "{\n", "line 1 is not JSON"),
        ("empty.txt", "\n\n", "no text in it"),
        ("missing.txt", None, "no such file"),
    ],
)
def test_bad_texts_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_texts(tmp_path / name, 10)


def test_texts_come_from_jsonl_and_from_plain_text(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    (tmp_path / "plain.txt").write_text("a\n\nb\nc\n")
    for name in ("rows.jsonl", "plain.txt"):
        assert read_texts(tmp_path / name, 3) == read_texts(tmp_path / name, 9) == ["a", "b", "c"]


def test_a_seed_draws_the_texts_from_all_of_them(tmp_path):
    path = tmp_path / "plain.txt"
    path.write_text("".join(f"{number}\n" for number in range(100)))
    drawn = [read_texts(path, 10, seed=seed) for seed in range(300)]
    assert drawn[0] == read_texts(path, 10, seed=0) != drawn[1]
    assert all(sorted(texts, key=int) == texts and len(set(texts)) == 10 for texts in drawn)
    times = Counter(number for texts in drawn for number in texts)
    assert len(times) == 100 and max(times.values()) < 3 * 30  # 30 on average


def test_the_outputs_are_those_of_the_last_token_of_every_layer(finetuning):
    model, _ = finetuning(peft_scheme="none")
    model.model.eval()
    text = "what is 1 plus 2?"
    (ours,) = calibrate.layer_outputs(model, [text], 64)
    assert ours.shape == (4, 32)
    ids = torch.tensor([model.tokenizer.text_to_ids(text)])
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        hidden = model.model.embedding(ids, positions)
        rotary = model.model.rotary_pos_emb(ids.shape[1])
        for layer, expected in zip(model.model.decoder.layers, ours, strict=True):
            hidden, _ = layer(hidden, attention_mask=None, rotary_pos_emb=rotary)
            torch.testing.assert_close(hidden[-1, 0], expected)


def test_the_command_writes_groups_that_share_lora_takes(files, tmp_path):
    from nemo_tiedlora import variants

    (tmp_path / "text.txt").write_text("what is 1 plus 2?\nwhat is 3 plus 4? the answer is 7.\n")
    out = tmp_path / "out" / "groups.json"
    arguments = ["groups", "--base", files["llama"], "--data", tmp_path / "text.txt"]
    arguments += ["--threshold", "0.5", "--out", out, "--json", "--rank", "4"]
    code, said, err = forked.script("-m", "nemo_tiedlora.cli", *arguments)
    assert code == 0, err[-2000:]
    assert json.loads(said)["groups"] == json.loads(out.read_text())["groups"]
    written = json.loads(out.read_text())
    assert written["base_sha256"] == hashlib.sha256(files["llama"].read_bytes()).hexdigest()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    values = written["similarity"]
    assert all(values[i][j] >= 0.5 for group in written["groups"] for i in group for j in group)
    variant = variants.build(variants.SharedConfig(groups=str(out), rank=4), 4)
    assert variant.groups == written["groups"]


def test_an_adapter_keeps_its_groups_when_the_file_is_gone(finetuning, tmp_path):
    (tmp_path / "groups.json").write_text(json.dumps({"groups": [[0, 1], [2, 3]]}))
    settings = {"rank": 4, "groups": str(tmp_path / "groups.json"), "rank_expansion": "budget"}
    model, _ = finetuning(peft_scheme="share_lora", share_lora_tuning=settings)
    saved = model.cfg.peft.share_lora_tuning
    assert saved.groups == [[0, 1], [2, 3]] and saved.rank_expansion == 8
