"""Documents are read, packed and shared among processes: every token once."""

from __future__ import annotations

import json

import numpy as np

from flashmla_hf.training import data, finetune, packing, rows, step


def test_documents_are_read_whatever_their_characters(tmp_path):
    texts = ["one\u2028two", "three\u0085four\x0bfive"]
    file = tmp_path / "a.jsonl"
    file.write_text(
        "\ufeff" + "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8"
    )
    assert [row["text"] for _, row in rows.read_files(str(file), list, "train")] == texts
    (tmp_path / ".git" / "objects").mkdir(parents=True)
    (tmp_path / ".git" / "objects" / "ab").write_bytes(b"\xff\xfe")
    assert [row["text"] for _, row in rows.read_files(str(tmp_path), list, "train")] == texts


def test_held_out_documents_of_a_file_go_with_a_dataset(monkeypatch, tmp_path):
    (tmp_path / "held_out.txt").write_text("held out")
    monkeypatch.setattr(data, "read_dataset", lambda *args: iter([(rows.Place("d", "row", 1), {"text": "train"})]))
    data_args = finetune.DataArguments(dataset_name="d", validation_file=str(tmp_path / "held_out.txt"))
    loaded = data.load_documents(data_args, 0, rows.BadRows())
    assert [[content for _, content in side] for side in loaded] == [["train"], ["held out"]]


def test_packing_keeps_every_token_once_and_fills_packs():
    rng = np.random.default_rng(0)
    documents = [np.arange(n, dtype=np.int32) for n in rng.integers(2, 700, size=200)]
    packs = packing.pack(documents, 256)
    pieces = [piece for one in packs for piece in one]
    assert all(sum(map(len, one)) <= 256 for one in packs)
    # Only a last piece of a single token, which predicts nothing, is left out.
    assert sum(map(len, pieces)) == sum(len(d) - (len(d) % 256 == 1) for d in documents)
    assert sum(map(len, pieces)) > 0.97 * 256 * len(packs)


def test_the_processes_of_a_step_share_its_packs_and_an_epoch_repeats_none():
    packs = [[np.full(2 + i, i)] for i in range(17)]
    args = finetune.TrainingArguments(output_dir="x", gradient_accumulation_steps=2, per_device_train_batch_size=2)
    epoch = []
    for number in (0, 1):  # 17 packs are two steps of 8
        mine = []
        for rank in (0, 1):
            accelerator = type("Accelerator", (), {"num_processes": 2, "process_index": rank})
            batches, count, _ = step.step_batches(packs, number, accelerator, args)
            assert [len(batch) for batch in batches] == [2, 2]
            mine.append([int(one[0][0]) for batch in batches for one in batch])
        assert count == sum(1 + i for ids in mine for i in ids)
        epoch += mine[0] + mine[1]
    assert len(set(epoch)) == 16
