"""Results of the benchmarks: verdicts, the page, profiles, provenance and comparison."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import bench_attention
import bench_model
import compare
import pytest
import records
import render_results
import timing
import verdicts
from peers import Peer
from shapes import Shape

ROOT = Path(__file__).resolve().parent.parent


def _gpu_document(**rates):
    """A GPU run's records from (shape, mode, peer) -> TFLOP/s, or µs for host modes."""
    records = []
    for (text, mode, peer), rate in rates["rates"].items():
        record = {"shape": text, "mode": mode, "peer": peer, "status": "ok", "spread": 0.01, "errors": {}}
        if mode.startswith("host"):
            record["seconds"] = rate * 1e-6
        else:
            shape = Shape.parse(text)
            record |= {"flops_per_second": rate * 1e12, "seconds": shape.flops(mode) / rate / 1e12, "watts": 600.0}
            record |= {"peak_bytes": 2**30, "output_bytes": 2**29, "sm_mhz": 1755}
        records.append(record)
    environment = {
        "device": "a GPU", "device_type": "cuda", "clocks": "", "memory_gib": 80, "python": "3", "versions": {},
        "commit": "abc", "date": "today",
    }  # fmt: skip
    return {
        "kind": "attention", "environment": environment, "matmul_flops_per_second": {"bf16": 7e14},
        "copy_bytes_per_second": 3e12, "driver": "580", "window_tile": [128, 128], "records": records,
    }  # fmt: skip


LONG_TEXT, SHORT_TEXT = "d128 B1 H32/8 S4096 causal bf16", "d128 B1 H32/8 S512 causal bf16"
PACK, DENSE = "d128 B16 H16/16 S1024 causal ragged bf16", "d128 B16 H16/16 S1024 causal bf16"
WINDOW = "d128 B1 H32/8 S4096 window1024 bf16"


def test_the_bars_are_judged_and_written(tmp_path):
    rates = {
        (LONG_TEXT, "fwd", "flashmla"): 660, (LONG_TEXT, "fwd", "sdpa-cudnn"): 550, (LONG_TEXT, "fwd", "fa4"): 670,
        (LONG_TEXT, "fwd", "eager"): 22, (DENSE, "fwd", "flashmla"): 400, (DENSE, "fwd", "sdpa-cudnn"): 440,
        (PACK, "fwd", "flashmla"): 390, (PACK, "fwd", "fa4"): 380, (WINDOW, "fwd", "flashmla"): 500,
        (SHORT_TEXT, "fwd", "flashmla"): 10, (SHORT_TEXT, "fwd", "sdpa-cudnn"): 20,
        (SHORT_TEXT, "host", "flashmla"): 25, (SHORT_TEXT, "host", "sdpa"): 20,
    }  # fmt: skip
    document = _gpu_document(rates=rates)
    found = {bar.what: (bar.measured, bar.met) for bar in verdicts.bars(document)}
    cudnn, best, aim, host, ragged, window = found.values()
    assert cudnn == ("1 of 2 shapes below 0.97×, lowest 0.91×, geometric mean 1.04×", False)  # short ones do not count
    assert best == ("0.946× over 2 shapes", False)
    assert aim[1] is False
    assert host == ("1.25× its time", False)
    assert ragged == ("0.97×", True)
    tiles = Shape.parse(WINDOW).tiles_visited(128, 128) / Shape.parse(LONG_TEXT).tiles_visited(128, 128)
    assert f"for {tiles:.3f} of its tiles" in window[0]
    assert window[1] is None
    assert verdicts.lines(verdicts.bars(document))[0].startswith("FAIL  fwd: at least cuDNN")
    (tmp_path / "gpu.json").write_text(json.dumps(document))
    page = render_results.write(tmp_path).read_text()
    assert "driver 580; SM clock while measuring 1755 to 1755 MHz, power 600 to 600 W" in page
    assert "copy within the device: 3,000 GB/s" in page
    row = f"| {LONG_TEXT} | 660 (±1 %) | 550 (±1 %) | 670 (±1 %) | 22 (±1 %) | 1.20× | 0.99× (fa4) | 94 % |"
    assert row in page
    assert f"| {DENSE} | flashmla | 400 | – | 390 | 0.97× |" in page
    assert "30× | 1.00× |" in page  # times faster, times smaller than eager
    assert "![gpu-fwd: TFLOP/s per shape](gpu-fwd.png)" in page
    assert (tmp_path / "gpu-fwd.png").stat().st_size > 1000


def test_a_run_above_every_bar_meets_all():
    document = _gpu_document(
        rates={(LONG_TEXT, "bwd", "flashmla"): 600, (LONG_TEXT, "bwd", "sdpa-cudnn"): 500}
        | {(LONG_TEXT, "bwd", "flashmla-deterministic"): 501}
    )
    assert [bar.met for bar in verdicts.bars(document)] == [True] * 4
    assert "| flashmla-deterministic | 1.20× |" in render_results.attention_section(document)


def test_reproducible_gradients_have_a_bar_from_2k_tokens_on():
    rates = {(text, "bwd", "flashmla"): 600 for text in (LONG_TEXT, DENSE, WINDOW)}
    rates |= {(text, "bwd", "flashmla-deterministic"): 400 for text in (LONG_TEXT, DENSE)}
    rates |= {(WINDOW, "bwd", "flashmla-deterministic"): 550, (WINDOW, "bwd", "fa4-deterministic"): 100}
    (bar,) = [bar for bar in verdicts.bars(_gpu_document(rates=rates)) if "reproducible" in bar.what]
    assert (bar.measured, bar.met) == ("1.09 to 1.50× over 2 shapes, 1 above", False)


def test_first_calls_of_torchs_flash_attention_stand_beside_flexs():
    rates = {
        (text, "fwd", peer): rate
        for peer, rate in (("flashmla-torch-flash", 300), ("flashmla-flex", 120))
        for text in (LONG_TEXT, PACK)
    }
    document = _gpu_document(rates=rates)
    assert not list(verdicts.bars(document))
    for record, seconds in zip(document["records"], (0.031, None, 21.9, 0.002), strict=True):
        if seconds is not None:
            record["first_seconds"] = seconds
    page = render_results.attention_section(document)
    assert "| shape | torch_flash, first call | flex, first call | torch_flash / flex, rate |" in page
    assert f"| {LONG_TEXT} | 0.03 s | 21.90 s | 2.50× |" in page
    assert f"| {PACK} | – | 0.00 s | 2.50× |" in page
    assert "first call" not in render_results.attention_section(
        _gpu_document(rates={(LONG_TEXT, "fwd", "flashmla"): 1})
    )


def test_the_first_call_is_timed_until_its_end():
    calls = []
    timed = timing.Timed(Peer(lambda: None), lambda: (time.sleep(0.02), calls.append(1)))
    assert 0.02 <= timing.first_call_seconds(timed, "cpu") < 1
    assert calls == [1]


def test_stored_results_still_render(tmp_path):
    stored = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    for path in stored:
        shutil.copy(path, tmp_path)
    page = render_results.write(tmp_path).read_text()
    # Install times stand in docs/install.md alone, errors of fp8 in docs/fp8.md.
    others = ["fp8-error-cpu", "install-cpu", "install-hopper"]
    assert [path.stem for path in stored if f"## {path.stem}" not in page] == others


def test_a_profile_is_read_from_what_ncu_prints():
    import profile_attention
    import profile_results

    columns = [*profile_results.SHARES, profile_attention.CYCLES, profile_attention.SECONDS]
    head = '"ID","Kernel Name",' + ",".join(f'"{column}"' for column in columns)
    units = '"","",' + ",".join(['"%"'] * len(profile_results.SHARES) + ['"cycle"', '"ns"'])
    numbers = ",".join(f'"{10 * (i + 1)}.0"' for i in range(len(profile_results.SHARES))) + ',"4,089,644","2,830,000"'
    kernels = (
        "void forward_kernel<192, 128, 1, bfloat16_t>(ForwardArguments)",
        "void flashmla::sm90::backward_queries_kernel<(int)256, cutlass::bfloat16_t>(flashmla::sm90::Arguments)",
    )
    rows = "\n".join(f'"{i}","{kernel}",{numbers}' for i, kernel in enumerate(kernels))
    records = profile_attention.parse(f"==PROF== Connected\n{head}\n{units}\n{rows}\n")
    assert [(r["kernel"], r["head_dims"]) for r in records] == [("forward", "192/128"), ("backward_queries", "256/256")]
    assert records[0]["cycles"] == 4_089_644
    assert records[0]["seconds"] == pytest.approx(2.83e-3)
    assert records[0]["shares"]["tensor cores"] == pytest.approx(0.1)
    table = profile_results.section({"seqlen": 4096, "is_causal": False, "records": records})
    assert "| forward | 192/128 | 4,089,644 | 10% | 20% | 30% | 40% | 50% | **60%** |" in table
    of_decoding = profile_attention.parse(f"{head}\n{units}\n{rows}\n", profile_attention.LATENTS)
    assert [r["shape"] for r in of_decoding] == list(map(str, profile_attention.LATENTS))
    table = profile_results.section({"records": of_decoding})
    assert f"| forward | {profile_attention.LATENTS[0]} | 4,089,644 |" in table


def test_a_result_names_its_command_and_commit(monkeypatch):
    monkeypatch.setattr(
        "sys.argv", ["/somewhere/bench_attention.py", "--suite", "tiny", "--output_dir", "/somewhere/else"]
    )
    record = records.describe("cpu")
    assert record["command"] == ["bench_attention.py", "--suite", "tiny", "--output_dir", "else"]
    assert "`bench_attention.py --suite tiny --output_dir else`" in records.sentence(record)


def test_a_dirty_tree_is_one_with_other_changes_than_results(tmp_path, monkeypatch):
    def git(*arguments):
        names = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *names, *arguments], check=True, capture_output=True)

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "code.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setattr(records, "REPOSITORY", tmp_path)
    (tmp_path / "benchmarks" / "results" / "new.json").write_text("{}")
    (tmp_path / "benchmarks" / "RESULTS.md").write_text("new")
    assert not records.commit().endswith("+")
    (tmp_path / "code.py").write_text("2")
    assert records.commit().endswith("+")


@pytest.mark.parametrize("module", [bench_attention, bench_model])
def test_a_dirty_tree_does_not_write_into_the_results(module, monkeypatch):
    monkeypatch.setattr(records, "commit", lambda: "abc+")
    with pytest.raises(SystemExit, match=rf"{module.__name__}: .*uncommitted changes: .*--output_dir.*--allow_dirty"):
        module.main(["--device", "cpu"])
    records.refuse_dirty_tree("x", records.RESULTS, allow_dirty=True)
    monkeypatch.setattr(records, "commit", lambda: "abc")
    records.refuse_dirty_tree("x", records.RESULTS, allow_dirty=False)


def _slower(document, factor, peer):
    copy = json.loads(json.dumps(document))
    for record in copy["records"]:
        record["seconds"] *= factor if record["peer"] == peer else 1
    return copy


def test_compare_gives_ratios_and_fails_on_a_slower_run(tmp_path, capsys):
    texts = ("d64 B1 H2/2 S128 causal bf16", "d64 B1 H2/2 S256 causal bf16")
    old = _gpu_document(rates={(text, "fwd", peer): 100.0 for text in texts for peer in ("flashmla", "sdpa")})
    new = _slower(old, 1.04, "flashmla")
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, document in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(document))
    arguments = [str(path) for path in paths]
    compare.main(arguments)
    out = capsys.readouterr().out
    assert f" 0.962×  fwd       flashmla               {texts[0]}" in out
    assert " 1.000×  fwd       sdpa                   geometric mean" in out
    with pytest.raises(SystemExit, match=r"fwd flashmla: geometric mean 0\.962×, expected at least 0\.970×"):
        compare.main([*arguments, "--tolerance", "0.03"])
    compare.main([*arguments, "--tolerance", "0.03", "--peers", "sdpa"])
    with pytest.raises(SystemExit, match="no shape, mode and peer in common"):
        compare.main([*arguments, "--peers", "fa4"])
    paths[1].write_text("{}")
    with pytest.raises(SystemExit, match="is not a file of bench_attention"):
        compare.main(arguments)
