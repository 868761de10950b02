"""The memory report: points measured in processes of their own, series, what is skipped, resuming, and the page."""

from __future__ import annotations

import json
from dataclasses import replace

import measure_model
import memory_page
import memory_report
import pytest
import records
import render_results
import torch
from measure_model import Measurement, Point
from measure_support import in_fork
from training_support import ON_PATH, ROOT

from flashmla_hf.host_memory import GIB
from flashmla_hf.training import machine

# ---------------------------------------------------------------- memory_report and measure_model


def test_memory_report_measures_in_processes_and_writes_files(tmp_path, monkeypatch, capsys):
    """One process is the program as it is started, the other a fork."""
    monkeypatch.setenv("PYTHONPATH", ON_PATH["PYTHONPATH"])
    started, real = [], measure_model.in_subprocess

    def one_real(point, timeout):
        started.append(point.attn_implementation)
        return (real if point.attn_implementation == "flashmla" else in_fork)(point, timeout)

    monkeypatch.setattr(measure_model, "in_subprocess", one_real)
    memory_report.main(
        ["--model", "tiny", "--backends", "eager", "flashmla", "--contexts", "1024", "--device", "cpu",
         "--repeats", "1", "--dtype", "float32", "--output_dir", str(tmp_path)]
    )  # fmt: skip
    document = json.loads((tmp_path / "memory_report.json").read_text())
    assert sorted(started) == ["eager", "flashmla"]
    eager, flashmla = document["points"]
    assert eager["status"] == flashmla["status"] == "ok", document["points"]
    # Eager holds scores of 4 heads x 1024² x 4 bytes per layer, several times.
    assert eager["peak_bytes"] > flashmla["peak_bytes"] + 2 * 4 * 1024**2 * 4
    assert flashmla["tokens_per_second"] > 0
    assert document["environment"]["versions"]["torch"] == torch.__version__
    assert "| 1,024 |" in (tmp_path / "memory_report.md").read_text()
    assert (tmp_path / "memory_report.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_beyond_the_memory_limit_is_out_of_memory_and_not_a_crash():
    result = in_fork(Point("tiny", "eager", 8192, memory_limit=3 * 2**30), timeout=120)
    assert (result.status, result.peak_bytes) == ("out_of_memory", None), result


def test_points_that_cannot_fit_or_take_too_long_are_skipped_with_the_reason(monkeypatch):
    def fake(point, timeout):
        gib = 2**30 * point.context * (point.context / 4096 if point.attn_implementation == "eager" else 1) / 1024
        seconds = point.context / (50 if point.attn_implementation == "slow" else 1e4)
        return Measurement(point, "ok", peak_bytes=int(gib), model_bytes=2**29, seconds=seconds)

    monkeypatch.setattr(measure_model, "in_subprocess", fake)
    monkeypatch.setattr(machine, "memory_available", lambda device: 20 * 2**30)
    points = memory_report.points_for("m", ["eager", "sdpa", "slow"], [1024, 2048, 4096, 16384], device="cpu")
    results = memory_report.measure_all(points, time_limit=60, time_budget=None, on_result=lambda r: None)
    status = {(r.point.attn_implementation, r.point.context): (r.status, r.reason) for r in results}
    assert status["eager", 4096][0] == "ok"
    assert status["eager", 16384] == ("skipped", "would take about 64 GiB of 18 available")
    assert status["sdpa", 16384][0] == "ok"
    assert status["slow", 4096] == ("skipped", "would take about 82 s per step")
    assert status["slow", 16384] == ("skipped", "4096 tokens: skipped")
    text = memory_page.table(results)
    assert "eager at 16,384: skipped: would take about 64 GiB" in text


@pytest.mark.parametrize(
    ("measured", "context", "value"),
    [([], 8, None), ([(2, 4.0)], 8, 16.0), ([(1, 1.0), (2, 4.0)], 4, 16.0), ([(1, 3.0), (2, 6.0)], 4, 12.0)],
)
def test_extrapolation_is_linear_plus_quadratic(measured, context, value):
    assert memory_report.extrapolated(measured, context) == value


# ---------------------------------------------------------------- memory_report: series, resuming, rendering


def test_a_series_names_a_backend_and_its_switches():
    kind = memory_report.parse_series("sdpa+liger+gradient_checkpointing", "cuda", True)
    assert (kind["attn_implementation"], kind["liger"], kind["gradient_checkpointing"]) == ("sdpa", True, True)
    kind = memory_report.parse_series("flashmla+checkpointing+offload=31", "cuda", True)
    assert (kind["patches"], kind["patch_options"]) == (("checkpointing", "offload"), (("offload", 31),))
    assert {"offload", "lora"} <= set(memory_report.parse_series("flashmla+all", "cuda", True)["patches"])
    assert "offload" not in memory_report.parse_series("flashmla+all", "cpu", True)["patches"]
    assert "lora" not in memory_report.parse_series("flashmla+all", "cuda", False)["patches"]
    with pytest.raises(SystemExit, match="unknown patch 'ligr'"):
        memory_report.main(["--model", "tiny", "--series", "sdpa+ligr", "--device", "cpu"])


def test_patches_take_memory_away_and_a_second_run_measures_only_what_is_new(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_model, "in_subprocess", in_fork)
    arguments = [
        "--model", "tiny", "--series", "flashmla", "flashmla+all", "--device", "cpu", "--repeats", "0",
        "--dtype", "float32", "--output_dir", str(tmp_path), "--name", "memory-tiny",
    ]  # fmt: skip
    memory_report.main([*arguments, "--contexts", "4096"])
    first = json.loads((tmp_path / "memory-tiny.json").read_text())
    plain, patched = first["points"]
    assert plain["status"] == patched["status"] == "ok", first["points"]
    assert patched["peak_bytes"] < 0.8 * plain["peak_bytes"]
    assert patched["point"]["optim"] == "adamw_torch"
    assert patched["mfu"] > 0

    measured = []
    monkeypatch.setattr(measure_model, "in_subprocess", lambda p, t: measured.append(p.context) or in_fork(p, t))
    memory_report.main([*arguments, "--contexts", "2048", "4096"])
    assert measured == [2048, 2048]
    second = json.loads((tmp_path / "memory-tiny.json").read_text())
    assert [p["point"]["context"] for p in second["points"]] == [2048, 2048, 4096, 4096]
    assert second["points"][2:] == first["points"]
    with pytest.raises(SystemExit, match="holds other measurements"):
        memory_report.main([*arguments, "--contexts", "4096", "--full"])

    page = render_results.write(tmp_path).read_text()
    assert "| flashmla+all | 4,096 |" in page
    assert "Bytes of a further token" in page
    assert "memory-tiny.png" in page
    assert page.count("commit ") >= 1


def test_series_that_fill_memory_are_neither_extrapolated_nor_given_a_slope(monkeypatch):
    monkeypatch.setattr(machine, "memory_available", lambda device: 80 * GIB)
    names = ["flashmla+all", "flashmla+loss+checkpointing"]
    short, long = (
        memory_report.points_for("llama-8b", names, [tokens], device="cuda", dtype="bfloat16")
        for tokens in (98304, 262144)
    )
    assert [point.fills_memory for point in short] == [True, False]
    numbers = {"status": "ok", "peak_bytes": 44 * GIB, "model_bytes": 15 * GIB, "seconds": 1.0}
    results = [Measurement(point, **numbers) for point in short]
    assert memory_report._skip(long[0], results, 900, None) is None  # all the ledger needs is there
    assert "would take about 132 GiB" in memory_report._skip(long[1], results, 900, None).reason
    results += [Measurement(point, **numbers | {"peak_bytes": 40 * GIB, "memory_bytes": 80 * GIB}) for point in long]
    table = memory_page.slopes(results)
    assert "| flashmla+loss+checkpointing | 98,304 – 262,144 |" in table
    assert "| flashmla+all |" not in table
    assert "Left out: flashmla+all. The patches fill free memory" in table
    point = replace(short[0], patch_options=(("keep_attention", 0), ("offload", 31)))
    assert not point.fills_memory


def test_a_limit_of_gpu_memory_is_part_of_a_measurement():
    def points(**settings):
        return memory_report.points_for("tiny", ["flashmla"], [2048], device="cuda", **settings)

    whole, limited = points()[0], points(gpu_memory=78.0)[0]
    assert limited.memory_limit == 78 * GIB
    assert memory_report._key(whole) != memory_report._key(limited)
    assert "at most 78 GiB of the GPU" in memory_page.description(limited)
    assert "of the GPU" not in memory_page.description(whole)
    with pytest.raises(SystemExit, match="--gpu_memory: expected GiB above 0 and --device cuda"):
        memory_report.main(["--model", "tiny", "--device", "cpu", "--gpu_memory", "8"])


def test_a_killed_report_keeps_its_points(tmp_path, monkeypatch):
    def fake(point, timeout):
        if point.context == 2048:
            raise KeyboardInterrupt
        return Measurement(point, "ok", peak_bytes=2**20, model_bytes=0, seconds=1.0, tokens_per_second=1.0,
                           peak_allocated_bytes=2**20, mfu=0.5, peak_flops="known")  # fmt: skip

    monkeypatch.setattr(measure_model, "in_subprocess", fake)
    arguments = ["--model", "tiny", "--series", "sdpa", "--device", "cpu", "--output_dir", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        memory_report.main([*arguments, "--contexts", "1024", "2048"])
    points = json.loads((tmp_path / "memory_report.json").read_text())["points"]
    assert [p["point"]["context"] for p in points] == [1024]


def test_the_memory_configs_that_ship_are_valid(tmp_path, monkeypatch):
    seen: list[Point] = []
    monkeypatch.setattr(
        memory_report, "_skip", lambda point, *args: seen.append(point) or Measurement(point, "skipped")
    )
    record = records.describe("cpu")
    monkeypatch.setattr(records, "describe", lambda device: record)
    monkeypatch.setattr(memory_report.importlib.util, "find_spec", lambda name: name)  # bitsandbytes, for QLoRA
    configs = sorted((ROOT / "benchmarks" / "configs").glob("*.yaml"))
    for config in configs:
        memory_report.main(["--config", str(config), "--device", "cuda", "--output_dir", str(tmp_path)])
    assert {point.memory_limit for point in seen} == {78 * GIB, 22 * GIB}
    assert {point.memory_limit for point in seen if not point.load_in_4bit} == {78 * GIB}
    assert {point.model for point in seen} == {"llama-8b", "llama-1b", "mistral-7b"}
    assert {point.optim for point in seen} == {"adamw_torch"}
    assert {path.stem for path in tmp_path.glob("*.json")} == {
        "memory-llama-8b",
        "memory-llama-8b-window",
        "memory-llama-8b-qlora",
        "memory-llama-8b-peft",
        "memory-llama-8b-qlora-window",
        "memory-llama-1b-full",
        "memory-llama-1b-full-window",
        "memory-mistral-7b",
    }
    assert {point.sliding_window for point in seen} == {None, 4096}
