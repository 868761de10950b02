"""The benchmark of decoding: its check refuses wrong results, its shapes count what they read, and a run writes the page."""

from __future__ import annotations

import json
import math

import bench_decode
import decode_check
import decode_results
import pytest
import records
import series
import timing
import torch
import verdicts
from decode_check import Inputs
from decode_peers import PEERS
from decode_shapes import DEFAULT_SUITES, RAGGED, SUITES, TABLE, DecodeShape
from peers import Peer, Unsupported

from flashmla_hf import decode_attention

DENSE = DecodeShape.parse("d64 B2 H4/2 S2/96 dense fp32")
PAGED = DecodeShape.parse("d64 B3 H4/2 S2/80 paged16 ragged fp32")


def _paged(inputs, **changes):
    options = {"cache_seqlens": inputs.cache_seqlens, "block_table": inputs.block_table, **changes}
    return lambda q, k, v: decode_attention(q, k, v, **options)


WRONG = {
    "zeros": (lambda i, q, k, v: 0 * _paged(i)(q, k, v), "O is off"),
    "a key missing": (lambda i, q, k, v: _paged(i, cache_seqlens=i.cache_seqlens - 1)(q, k, v), "O is off"),
    "mask ignored": (lambda i, q, k, v: _paged(i, is_causal=False)(q, k, v), "O is off"),
    "wrong kv head": (lambda i, q, k, v: _paged(i)(q, k.flip(2), v), "O is off"),
    "pages in order": (
        lambda i, q, k, v: _paged(i, block_table=i.block_table.clamp(min=0).sort(1).values)(q, k, v), "O is off",
    ),
    "infinite elsewhere": (
        lambda i, q, k, v: _paged(i)(q, k, v).index_fill(2, torch.tensor([0]), torch.inf), "not finite",
    ),
    "heads and rows swapped": (lambda i, q, k, v: _paged(i)(q, k, v).transpose(1, 2), "the output has shape"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_implementation_gets_no_number(wrong):
    run, said = WRONG[wrong]
    inputs = Inputs.random(PAGED, "cpu")
    truth = decode_check.expected(PAGED, inputs)
    problem, _ = decode_check.verdict(PAGED, Peer(lambda q, k, v: run(inputs, q, k, v)), inputs, truth)
    assert problem is not None
    assert said in problem


@pytest.mark.parametrize("layout", ["dense", "heads-first", "paged16", "paged48", "paged64 ragged", "dense ragged"])
@pytest.mark.parametrize("call", ["d64 B2 H4/2 S1/96", "d64 B3 H4/1 S3/150 window40", "d96/64 B2 H2/2 S1/150 window40"])
@pytest.mark.parametrize("peer", ["flashmla", "flashmla-invariant", "flashmla-attention", "sdpa", "sdpa-math"])
def test_right_implementations_pass_the_check(call, layout, peer):
    shape = DecodeShape.parse(f"{call} {layout} fp32")
    inputs = Inputs.random(shape, "cpu")
    if peer not in ("flashmla", "flashmla-invariant") and (shape.page_size or shape.is_ragged):
        with pytest.raises(Unsupported):
            PEERS[peer](shape, inputs, "cpu")
        return
    truth = decode_check.expected(shape, inputs)
    problem, errors = decode_check.verdict(shape, PEERS[peer](shape, inputs, "cpu"), inputs, truth)
    assert problem is None, errors


def test_a_shape_is_its_text_and_a_wrong_text_is_refused():
    for suite in SUITES.values():
        for shape in suite.shapes:
            assert DecodeShape.parse(str(shape)) == shape
    for text, said in (
        ("d64 B2 H4/2 S96", "expected a shape like"),
        ("d64 B2 H4/3 S1/96", "4 query heads are no multiple of 3 kv heads"),
        ("d64 B2 H4/2 S1/96 paged24", "expected pages of a multiple of 16 rows, got 24"),
    ):
        with pytest.raises(ValueError, match=said):
            DecodeShape.parse(text)


def test_bytes_are_those_of_the_keys_that_a_query_sees():
    assert TABLE[0].bytes_read() == 4096 * 8 * (128 + 128) * 2
    assert DecodeShape.parse("d192/128 B2 H4/2 S4/1000 window99").bytes_read() == 2 * 103 * 2 * (192 + 128) * 2
    assert sum(RAGGED.lengths()) == 64 * 12800
    assert (min(RAGGED.lengths()), max(RAGGED.lengths())) == (127, 57914)  # as documented


def test_copies_of_a_small_cache_are_more_than_a_cache_on_the_chip_holds(monkeypatch):
    monkeypatch.setitem(decode_check.ROTATED_BYTES, "cpu", 10 * DENSE.bytes_read())
    inputs = Inputs.random(DENSE, "cpu")
    assert len(inputs.caches) == 10
    assert len({k.data_ptr() for k, _ in inputs.caches}) == 10
    assert all(torch.equal(k, inputs.caches[0][0]) and torch.equal(v, inputs.caches[0][1]) for k, v in inputs.caches)
    seen = []
    calls = inputs.calls(Peer(lambda q, k, v: seen.append(k.data_ptr())))
    timing.rotation(Peer(None), calls, 25, "cpu").call()
    assert seen == [inputs.caches[i % 10][0].data_ptr() for i in range(25)]


@pytest.mark.parametrize("layout", ["dense", "heads-first"])
def test_a_copy_has_the_memory_layout_of_the_shape(layout, monkeypatch):
    monkeypatch.setitem(decode_check.ROTATED_BYTES, "cpu", 10**6)
    shape = DecodeShape.parse(f"d64 B2 H4/2 S1/96 {layout} fp32")
    strides = (96 * 2 * 64, 64, 96 * 64, 1) if layout == "heads-first" else (96 * 2 * 64, 2 * 64, 64, 1)
    for k, v in Inputs.random(shape, "cpu").caches:
        assert k.stride() == v.stride() == strides


def test_a_tiny_run_writes_json_and_the_page_and_can_be_resumed(tmp_path, monkeypatch):
    arguments = ["--device", "cpu", "--repeats", "2", "--seconds", "0.01", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(series, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(bench_decode, "read_bandwidth", lambda device: 1e10)
    bench_decode.main([*arguments, "--time_budget", "0"])
    (path,) = tmp_path.glob("decode-*.json")
    assert json.loads(path.read_text())["skipped"] == [str(shape) for shape in SUITES["tiny"].shapes]
    bench_decode.main([*arguments, "--resume"])
    document = json.loads(path.read_text())
    assert document["skipped"] == []
    for record in document["records"]:
        if record["mode"] == "graph":
            expected = DecodeShape.parse(record["shape"]).bytes_read() / record["seconds"]
            assert record["bytes_per_second"] == pytest.approx(expected)
    assert {r["mode"] for r in document["records"] if r["status"] == "ok"} == {"graph", "host"}
    page = (tmp_path / "RESULTS.md").read_text()
    assert "| d64 B2 H4/2 S1/96 dense fp32 | " in page
    assert "it has no pages" in page
    bench_decode.main([*arguments, "--resume"])  # nothing is left
    assert json.loads(path.read_text())["records"] == document["records"]


def test_check_times_nothing_and_names_what_is_wrong(monkeypatch, tmp_path, capsys):
    arguments = ["--device", "cpu", "--check", "--shape", str(DENSE), "--peers", "flashmla"]
    with pytest.raises(SystemExit) as ended:
        bench_decode.main(arguments)
    assert ended.value.code == 0
    assert "1 results are right, 0 are wrong" in capsys.readouterr().out
    monkeypatch.setitem(PEERS, "flashmla", lambda *_: Peer(lambda q, k, v: 0 * q))
    with pytest.raises(SystemExit) as ended:
        bench_decode.main(arguments)
    assert ended.value.code == 1
    assert "O is off" in capsys.readouterr().out


def test_a_tree_with_changes_is_refused(monkeypatch):
    monkeypatch.setattr(records, "commit", lambda: "abc+")
    with pytest.raises(SystemExit, match="bench_decode: benchmarks/results holds numbers of committed code"):
        bench_decode.main(["--device", "cpu"])


def _gpu_document(rates, host=()):
    """A GPU run's records from (shape, peer) -> GB/s, and (shape, peer) -> µs of the host."""
    rows = []
    for (shape, peer), rate in rates.items():
        record = {"shape": str(shape), "mode": "graph", "peer": peer, "status": "ok", "spread": 0.01, "errors": {}}
        rows.append(record | {"bytes_per_second": rate * 1e9, "seconds": shape.bytes_read() / rate / 1e9})
    for (shape, peer), seconds in dict(host).items():
        rows.append({"shape": str(shape), "mode": "host", "peer": peer, "status": "ok", "seconds": seconds * 1e-6})
    return {
        "kind": "decode", "environment": {"device": "a GPU", "device_type": "cuda"}, "records": rows, "driver": "580",
        "copy_bytes_per_second": 3.0e12, "read_bytes_per_second": 3.1e12,
    }  # fmt: skip


def test_the_bars_are_those_of_the_issue():
    parse = DecodeShape.parse
    table = {(shape, peer): 2900 for shape in TABLE for peer in ("flashmla", "sdpa-cudnn")}
    short = parse("d128 B1 H32/8 S1/4096")
    rates = table | {
        (parse("d128 B1 H32/8 S1/4096 paged16"), "flashmla"): 2900 * 0.96,
        (parse("d128 B1 H32/8 S1/4096 paged64"), "flashmla"): 2900 * 0.94,
        (RAGGED, "flashmla"): 2500,
        (parse("d128 B64 H32/8 S1/12800 paged64"), "flashmla"): 2900,
        (parse("d128 B1 H32/8 S1/131072 window4095"), "flashmla"): 2700,
        (parse("d128 B1 H32/8 S4/131072"), "flashmla"): 1450,
        (short, "flashmla-invariant"): 290,
    }
    host = {(short, "flashmla"): 11.0, (short, "sdpa"): 12.0}
    document = _gpu_document(rates, host)
    found = {bar.what: (bar.measured, bar.met) for bar in decode_results.bars(document)}
    expected = {
        "the table: at least 0.97×": True, "a copy's bandwidth": True, "a pure read's bandwidth": True,
        "pages of 16": True, "pages of 64": False, "ragged bf16, 127 to 57,914 keys": False,
        "a window of 4,096 of 131,072 keys": True, "takes the host no longer": True, "num_splits=1": None,
        "4 queries to 1 × 131,072 keys": None,
    }  # fmt: skip
    assert len(found) == len(expected), found
    for words, met in expected.items():
        ((measured, is_met),) = [values for what, values in found.items() if words in what]
        assert is_met is met, (words, measured)
    assert found["4 queries to 1 × 131,072 keys: time over one query's"][0] == "2.00×"
    assert "lowest 0.940×" in found["pages of 64 in random order: at least 0.95× the rate without pages"][0]
    assert verdicts.lines(decode_results.bars(document))[0].startswith("pass  the table")

    slow = _gpu_document(table | {(TABLE[3], "flashmla"): 2700})
    (table_bar, copy_bar, read_bar) = decode_results.bars(slow)
    assert [table_bar.met, copy_bar.met, read_bar.met] == [False, False, False]
    assert str(TABLE[3]) in table_bar.measured
    missing = _gpu_document({key: rate for key, rate in table.items() if key[0] is not TABLE[0]})
    assert next(iter(decode_results.bars(missing))).met is False  # eight of nine rows are no verdict


def test_the_default_suites_measure_what_the_bars_need():
    shapes = {shape for name in DEFAULT_SUITES["cuda"] for shape in SUITES[name].shapes}
    rates = {(shape, "flashmla"): 1000.0 for shape in shapes}
    document = _gpu_document(rates)
    assert (
        len(decode_results.paged_ratios(document)) == 3 * len(TABLE) + 1
    )  # and the equal sequences beside ragged ones
    assert len(decode_results.ragged_ratios(document)) == 2
    assert len(decode_results.window_ratios(document)) == 4
    assert math.isclose(min(decode_results.window_ratios(document).values()), 1.0)
