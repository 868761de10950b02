"""The benchmark of decoding from latents: a wrong patch gets no number, what does not fit is known before, and the bars."""

from __future__ import annotations

import json
from types import SimpleNamespace

import bench_latent_decode
import latent_points
import latent_results
import mla_families
import models
import pytest
import torch
import verdicts
from bench_decode import BENCHMARK
from decode_shapes import EXPANDED, LATENT_ARITHMETIC, LATENT_MEMORY, LATENT_SMALL
from generation import Point
from transformers.cache_utils import StaticLayer

from flashmla_hf.host_memory import GIB
from flashmla_hf.patches import mla

pytestmark = [
    *mla_families.latent_tests,
    pytest.mark.skipif(not hasattr(StaticLayer, "crop"), reason="this Transformers has no crop of a static cache"),
]
SMALL = ["--device", "cpu", "--contexts", "128", "--batch_sizes", "2", "--tokens", "2"]


def run(folder, *arguments):
    bench_latent_decode.main([*SMALL, "--output_dir", str(folder), *arguments])


def points(folder):
    (path,) = folder.glob("latent-*.json")
    return json.loads(path.read_text())["points"]


def test_a_tiny_run_writes_json_and_the_page_and_goes_on_where_it_was(tmp_path, capsys):
    run(tmp_path, "--groups", "layer", "dynamic")
    first = points(tmp_path)
    assert [(r["cache"], r["attention"]) for r in first] == [
        (cache, way) for cache in ("layer", "dynamic") for way in latent_points.WAYS
    ]
    for record in first:
        assert record["status"] == "ok", record
        assert 0 < record["seconds"] < 5
        assert record["errors"]["these rows"] < 1e-5
    page = (tmp_path / "RESULTS.md").read_text()
    assert "### generate(), dynamic cache: tiny-mla, float32" in page
    assert "| batch | tokens | flashmla+mla_decode | flashmla | sdpa | flashmla / flashmla+mla_decode, time |" in page
    capsys.readouterr()
    run(tmp_path, "--groups", "layer", "dynamic")
    assert "0 of 6 points to measure" in capsys.readouterr().out
    run(tmp_path, "--groups", "static", "--tiny", "--ways", "flashmla+mla_decode")
    assert points(tmp_path)[:6] == first
    assert points(tmp_path)[6]["status"] == "ok"


@pytest.mark.parametrize("group", ["layer", "dynamic"])
def test_a_wrong_patch_gets_no_number(group, tmp_path, monkeypatch):
    absorb = mla.Absorption.absorb

    def of_other_heads(self, query):
        query, expand = absorb(self, query)
        return query, lambda out: expand(out).flip(2)

    monkeypatch.setattr(mla, "_try", lambda *_: None)
    monkeypatch.setattr(mla.Absorption, "absorb", of_other_heads)
    with pytest.raises(SystemExit, match="bench_latent_decode: 1 points failed"):
        run(tmp_path, "--groups", group)
    assert [r["status"] for r in points(tmp_path)] == ["wrong", "ok", "ok"]
    assert "relative to the norm" in points(tmp_path)[0]["reason"]


def test_the_layer_s_step_writes_the_same_row_again():
    layer = latent_points.LatentLayer("tiny-v3", "float32", "cpu")
    for way in latent_points.WAYS:
        latent_points.use(layer.model, way)
        call = layer._call(layer.model, way, 2, 64)
        assert torch.equal(call(), call())


def test_what_does_not_fit_is_known_by_arithmetic(monkeypatch):
    monkeypatch.setattr("flashmla_hf.training.machine.memory_limit", lambda device: int(79.2 * GIB))
    made = latent_points.LatentGeneration.__new__(latent_points.LatentGeneration)
    made.model = SimpleNamespace(config=models.SHAPES["deepseek-v2-lite"])
    made.dtype, made.device, made.weight_bytes = torch.bfloat16, "cuda", 31 * 10**9
    assert made.bytes_per_token() == 27 * 576 * 2
    fits = {
        (batch, context)
        for batch in bench_latent_decode.BATCH_SIZES["cuda"]
        for context in bench_latent_decode.CONTEXTS["cuda"]
        if made.refusal(Point("deepseek-v2-lite", "flashmla", "dynamic", batch, context)) is None
    }
    assert fits == {(1, 2048), (1, 32768), (1, 131072), (16, 2048), (16, 32768)}


def test_what_matters_most_comes_first(capsys):
    bench_latent_decode.main(["--device", "cuda", "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 6 * 3 + 6 * 3 + 6 * 2
    assert all("model='deepseek-v3'" in line and "cache='layer'" in line for line in listed[:18])
    assert all("model='deepseek-v2-lite'" in line for line in listed[18:])
    assert "batch_size=1, context=2048" in listed[18]
    bench_latent_decode.main(["--device", "cuda", "--list", "--tiny"])
    assert "tiny-v3" in capsys.readouterr().out.splitlines()[0]


def document_of(times):
    """A GPU run's records from (cache, way, batch, context) -> ms."""
    return {
        "environment": {"device": "a GPU", "device_type": "cuda"},
        "points": [
            {"model": "m", "dtype": "bfloat16", "status": "ok", "cache": cache, "attention": way, "batch_size": batch,
             "context": context, "seconds": ms / 1e3, "peak_bytes": 20 * GIB}
            for (cache, way, batch, context), ms in times.items()
        ],
    }  # fmt: skip


def test_the_bars_are_those_of_the_issue():
    document = document_of({
        ("dynamic", "flashmla+mla_decode", 1, 32768): 10.0, ("dynamic", "flashmla", 1, 32768): 101.0,
        ("dynamic", "flashmla+mla_decode", 16, 32768): 10.0, ("dynamic", "flashmla", 16, 32768): 90.0,
        ("dynamic", "flashmla+mla_decode", 1, 2048): 10.0, ("dynamic", "flashmla", 1, 2048): 5.0,
        ("compiled", "flashmla+mla_decode", 1, 32768): 10.0,
    })  # fmt: skip
    assert verdicts.lines(latent_results.bars(document)) == [
        "pass  m, dynamic, batch 1, 32,768 tokens, aim: at least 10× the unpatched speed: 10.1×",
        "FAIL  m, dynamic, batch 16, 32,768 tokens, aim: at least 10× the unpatched speed: 9.0×",
    ]
    assert "| 1 | 2,048 | 10.000 ms, 20.00 GiB | 5.000 ms, 20.00 GiB | 0.50× |" in latent_results.section(document)


def test_the_bars_of_the_kernel_are_those_of_the_issue():
    seconds = {LATENT_MEMORY: 0.4e-3, LATENT_ARITHMETIC[0]: 1e-3, LATENT_SMALL[0]: 10e-6, EXPANDED[0]: 14e-6}
    records = [
        {"shape": str(shape), "peer": "flashmla", "mode": "graph", "status": "ok", "seconds": s,
         "bytes_per_second": shape.bytes_read() / s,
         **({"flops_per_second": shape.flops() / s} if shape.is_latent else {})}
        for shape, s in seconds.items()
    ]  # fmt: skip
    document = {
        "kind": "decode", "environment": {"device_type": "cuda"}, "copy_bytes_per_second": 3e12,
        "read_bytes_per_second": 3e12, "records": records,
    }  # fmt: skip
    lines = verdicts.lines(BENCHMARK.bars(document))
    assert "pass  latent576/512 B128 H16/1 S1/8192 dense bf16: at least 2,700 GB/s, aim 3,000: 3,020 GB/s" in lines
    assert "pass  latent576/512 B128 H128/1 S2/8192 dense bf16: at least 550 TFLOP/s, aim 660: 584 TFLOP/s" in lines
    assert any(line.startswith("pass  latent576/512 B1 H128/1 S1/8192") and line.endswith("1.40×") for line in lines)
