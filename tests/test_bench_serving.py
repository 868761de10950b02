"""The benchmark of continuous batching: the same requests for all, no number for wrong tokens, and a page of the results."""

from __future__ import annotations

import json
import math

import bench_serving
import inference_results
import point_runs
import pytest
import torch
import verdicts
from bench_serving import Point
from hf_support import needs_kernel
from transformers import AttentionInterface

from flashmla_hf.hf import forward

pytestmark = [
    needs_kernel,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # the paged| prefix after 5.17
]
LLAMA = ("llama-8b", "sdpa", 256, (128, 4096), (32, 512), "bfloat16", "5.24.0")


def run(folder, *arguments):
    bench_serving.main(["--device", "cpu", "--requests", "3", "--output_dir", str(folder), *arguments])


def points(folder):
    (path,) = folder.glob("serving-*.json")
    return json.loads(path.read_text())["points"]


def test_lengths_are_log_uniform_and_the_same_for_every_attention():
    lengths = Point(*LLAMA).lengths()
    assert len(lengths) == 256
    assert lengths == Point("llama-8b", "flashmla", *LLAMA[2:]).lengths()
    assert lengths != Point(*LLAMA, seed=1).lengths()
    for column, (low, high) in zip(zip(*lengths, strict=True), ((128, 4096), (32, 512)), strict=True):
        assert low <= min(column) < 1.2 * low
        assert 0.8 * high < max(column) <= high
        below = sum(n < math.sqrt(low * high) for n in column) / len(column)
        assert 0.4 < below < 0.6  # half of them below the middle of the logarithms


def test_a_tiny_run_writes_json_and_the_page_and_goes_on_where_it_was(tmp_path, capsys):
    run(tmp_path, "--attentions", "flashmla", "sdpa")
    first = points(tmp_path)
    lengths = Point("tiny", "sdpa", 3, (8, 64), (4, 16), "float32", "").lengths()
    for record in first:
        assert record["status"] == "ok", record
        assert (record["prompt_tokens"], record["answer_tokens"]) == tuple(map(sum, zip(*lengths, strict=True)))
        assert record["answer_tokens_per_second"] == pytest.approx(record["answer_tokens"] / record["seconds"])
        assert record["errors"]["log probability"] < 1e-4
    page = (tmp_path / "RESULTS.md").read_text()
    assert "3 requests, 8 to 64 tokens in, 4 to 16 out, tiny, float32" in page
    assert "| sdpa | " in page
    capsys.readouterr()
    run(tmp_path, "--attentions", "flashmla", "sdpa")
    assert "0 of 2 points to measure" in capsys.readouterr().out
    assert points(tmp_path) == first


def test_an_attention_that_does_not_end_bounds_the_others_lead(tmp_path, monkeypatch):
    collect, slow = bench_serving._collect, []

    def in_time_or_not(manager, outputs, count):
        if slow and count == slow[0]:
            collect(manager, outputs, 1)
            raise point_runs.OutOfTimeError("not done in 5 s")
        collect(manager, outputs, count)

    monkeypatch.setattr(bench_serving, "_collect", in_time_or_not)
    monkeypatch.setattr(bench_serving, "CHECKED", (3, 40))
    run(tmp_path, "--attentions", "flashmla")
    slow.append(2)  # the check's requests
    run(tmp_path, "--attentions", "sdpa")
    assert "seconds_at_least" not in points(tmp_path)[1]
    assert points(tmp_path)[1]["reason"].startswith("the short requests: not done in 5 s")
    slow[0] = 3
    run(tmp_path, "--attentions", "sdpa")
    ours, theirs = points(tmp_path)
    assert theirs["status"] == "timeout"
    assert theirs["reason"] in [f"not done in 5 s: {n} of 3 requests were answered" for n in (1, 2, 3)]
    assert theirs["seconds_at_least"] > 0
    assert theirs["answer_tokens"] == ours["answer_tokens"]
    least = theirs["seconds_at_least"] / ours["seconds"]
    page = (tmp_path / "RESULTS.md").read_text()
    assert f"| sdpa | < {theirs['answer_tokens'] / theirs['seconds_at_least']:,.0f} | – | > " in page
    assert f"| > {least:.2f}× |" in page
    (path,) = tmp_path.glob("serving-*.json")
    document = json.loads(path.read_text())
    document["environment"]["device_type"] = "cuda"
    for seconds, met in ((1.5 * ours["seconds"], True), (1.2 * ours["seconds"], None)):
        document["points"][1]["seconds_at_least"] = seconds
        (bar,) = inference_results.bars(document)
        assert (bar.measured.split(":")[0], bar.met) == (f"more than {seconds / ours['seconds']:.2f}×", met)


def other_heads(module, query, key, value, *arguments, **options):
    out, weights = forward.attention_forward(module, query, key, value, *arguments, **options)
    return out.flip(2), weights


def test_wrong_tokens_get_no_number(tmp_path, monkeypatch):
    for name in ("flashmla", "paged|flashmla"):
        monkeypatch.setitem(AttentionInterface._global_mapping, name, other_heads)
    # Small weights make attention matter little to a tiny model's tokens.
    monkeypatch.setattr(bench_serving.Serving, "__init__", with_large_weights(bench_serving.Serving.__init__))
    with pytest.raises(SystemExit, match=r"bench_serving: 1 points failed; first: .*log probabilities are off by"):
        run(tmp_path, "--attentions", "flashmla", "sdpa")
    wrong, right = points(tmp_path)
    assert wrong["status"] == "wrong"
    assert "seconds" not in wrong
    assert right["status"] == "ok"


def with_large_weights(original):
    def init(self, *arguments):
        original(self, *arguments)
        torch.manual_seed(0)
        for name, parameter in self.model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.data.normal_(0, 0.3)

    return init


def test_a_request_that_fails_is_an_error(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no such key")

    monkeypatch.setitem(AttentionInterface._global_mapping, "flashmla", fails)
    monkeypatch.setitem(AttentionInterface._global_mapping, "paged|flashmla", fails)
    with pytest.raises(SystemExit, match="error: RuntimeError: "):
        run(tmp_path, "--attentions", "flashmla", "--requests", "1")
    assert points(tmp_path)[0]["status"] == "error"


def test_the_aim_is_that_of_the_issue():
    def record(attention, rate, **changes):
        return {
            "model": "llama-8b", "attention": attention, "requests": 256, "prompts": [128, 4096], "answers": [32, 512],
            "dtype": "bfloat16", "transformers": "5.24.0", "max_batch_tokens": None, "status": "ok", "commit": "abc",
            "answer_tokens_per_second": rate, "tokens_per_second": 7 * rate, "seconds": 44000 / rate, "peak_bytes": 2**36,
            "block_tables": True, "warmup_seconds": 3.0, **changes,
        }  # fmt: skip

    document = {
        "kind": "serving",
        "environment": {"device": "a GPU", "device_type": "cuda", "commit": "abc"},
        "points": [
            record("flashmla/flash-attn3", 1400.0),
            record("flashmla", 1200.0),
            record("sdpa", 1000.0),
            record("paged|eager", 1.0, status="out_of_memory", reason="the allocation failed"),
            record("flashmla", 900.0, requests=64),
        ],
    }
    assert verdicts.lines(inference_results.bars(document)) == [
        "pass  Transformers 5.24.0, 256 requests, flashmla/flash-attn3, aim: at least 1.3× sdpa's tokens a second: 1.40×",
        "FAIL  Transformers 5.24.0, 256 requests, flashmla, aim: at least 1.3× sdpa's tokens a second: 1.20×",
    ]
    page = inference_results.section(document)
    assert "| flashmla/flash-attn3 | 1,400 | 9,800 | 31.4 | 64.00 GiB | yes | 3.0 | 1.40× |" in page
    assert "- paged\\|eager, 256 requests: out of memory: the allocation failed" in page
    assert [*inference_results.readme_rows(document)] == [
        "| continuous batching, llama-8b's shape, a GPU, Transformers 5.24.0, 256 requests of 128 to 4,096 tokens "
        "| `flashmla/flash-attn3`: 1,400 tokens/s, 1.40 × sdpa's |"
    ]
