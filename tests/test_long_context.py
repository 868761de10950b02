"""Training on long contexts: the ledger against published and measured numbers, patches and evaluation in finetune, the
search for the longest context, running out of memory or disk, and the report's series."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent

import context_quality  # noqa: E402
import documents  # noqa: E402
import measure_model  # noqa: E402
import memory_page  # noqa: E402
import memory_report  # noqa: E402
import models  # noqa: E402
import numpy as np  # noqa: E402
import records  # noqa: E402
import render_results  # noqa: E402
from measure_model import Measurement, Point  # noqa: E402
from test_scripts import ON_PATH, corpus, fresh_accelerate_state, losses, options, tiny_model  # noqa: E402, F401

import flashmla_hf  # noqa: E402
from flashmla_hf.host_memory import GIB  # noqa: E402
from flashmla_hf.training import evaluation, finetune, ledger, machine, max_length, memory  # noqa: E402
from flashmla_hf.training.ledger import KIB, build_ledger  # noqa: E402
from flashmla_hf.training.model import keep_adapter_inputs  # noqa: E402
from flashmla_hf.training.shape import PUBLISHED, Shape  # noqa: E402
from flashmla_hf.training.terms import Switches  # noqa: E402

LLAMA_8B = Shape.of(models.SHAPES["llama-8b"])
ALL = frozenset({"loss", "mlp", "norm", "rope", "checkpointing", "keep_attention", "offload"})

# ---------------------------------------------------------------- ledger


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m", "llama-1b", "mistral-7b"])
def test_parameters_are_counted_as_the_model_has_them(name):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.SHAPES[name])
    assert Shape.of(models.SHAPES[name]).parameters == sum(p.numel() for p in model.parameters())


def test_an_adapter_is_counted_as_peft_makes_it():
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.SHAPES["llama-1b"])
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert Shape.of(models.SHAPES["llama-1b"]).lora_parameters(16) == trained


@pytest.mark.parametrize(
    ("term", "least", "most"),
    [
        ("logits and cross-entropy", 1753, 1753),
        ("checkpointed hidden states", 256, 256),
        ("one layer's MLP in backward", 192, 192),
        ("one layer's attention in backward", 84, 119),
        ("kept attention outputs", 260, 260),
    ],
)
def test_the_components_of_llama_8b_are_those_of_the_published_ladder(term, least, most):
    """KiB per token in bf16: ALST's ladder and counts of Transformers' Llama."""
    found = [value / KIB for value in ledger.components(LLAMA_8B)[term]]
    assert found == pytest.approx([least, most], rel=0.05)


@pytest.mark.parametrize(
    ("backend", "liger", "tokens", "gib"),
    [
        ("eager", False, 8192, 50.4),
        ("sdpa", False, 8192, 29.4),
        ("sdpa", False, 16384, 43.2),
        ("sdpa", True, 16384, 24.7),
        ("sdpa", True, 32768, 33.9),
        ("sdpa", True, 65536, 52.3),
        ("sdpa", True, 98304, 70.7),
    ],
)
def test_the_ledger_predicts_what_an_h100_measured(backend, liger, tokens, gib):
    """Llama-3.1-8B's shape, bf16, LoRA r=16 with a float32 adapter, checkpointing, batch 1; torch 2.11, transformers 5.17."""
    predicted = build_ledger(LLAMA_8B, Switches(backend, liger=liger, gradient_checkpointing=True))
    assert predicted.peak(tokens) / GIB == pytest.approx(gib, rel=0.03)


def test_the_ledger_predicts_what_an_h200_measured():
    """Where patches do not fill free memory: 131,072 and 262,144 tokens with numbers, and so much that nothing is left over."""
    results, _ = memory_page.read(ROOT / "benchmarks" / "results" / "memory-llama-8b-window-h200.json")
    measured = [r for r in results if not r.point.fills_memory]
    full, _ = memory_page.read(ROOT / "benchmarks" / "results" / "memory-llama-1b-full-window-h200.json")
    measured += [r for r in full if r.point.context > 2**20]
    # SDPA with a window: its mask.
    mistral, _ = memory_page.read(ROOT / "benchmarks" / "results" / "memory-mistral-7b-h200.json")
    measured += [r for r in mistral if r.status == "ok" and not r.point.fills_memory]
    assert len(measured) == 6
    for r in measured:
        predicted = memory_page.ledger_of(r.point).peak(r.point.context)
        assert predicted == pytest.approx(r.peak_allocated_bytes, rel=0.05), r.point.label


def test_a_window_leaves_memory_as_it_is():
    """Measured: the same bytes, on the GPU and pinned, at 1,048,576 tokens with a window of 4,096 and without."""
    found = []
    for name in ("memory-llama-1b-full-h200", "memory-llama-1b-full-window-h200"):
        results, _ = memory_page.read(ROOT / "benchmarks" / "results" / f"{name}.json")
        (r,) = (r for r in results if r.point.context == 2**20)
        found.append((r.peak_allocated_bytes, r.host_pinned_bytes, r.model_bytes))
    assert found[0] == found[1]


def test_a_shape_with_a_window_is_the_same_model_that_sees_less():
    whole, windowed = (models.load("tiny", "eager", torch.float32, "cpu", window) for window in (None, 4))
    windowed.load_state_dict(whole.state_dict())
    ids = torch.arange(32)[None]
    changed = ids.clone()
    changed[0, 8] += 1  # two layers of 4 tokens reach 6 tokens back
    with torch.no_grad():
        reached = [(m(ids).logits - m(changed).logits).abs().amax((0, 2)) > 1e-6 for m in (whole, windowed)]
        assert torch.allclose(whole(ids[:, :4]).logits, windowed(ids[:, :4]).logits)
    assert reached[0].tolist() == [False] * 8 + [True] * 24
    assert reached[1].tolist() == [False] * 8 + [True] * 7 + [False] * 17
    assert Shape.of(windowed.config).window == 4
    for name, window in (("tiny", 0), ("folder", 4)):
        with pytest.raises(models.NoModelError, match=f"a window of {window} for '{name}': expected at least 1 token"):
            models.config_of(name, window)


def test_every_patch_lowers_the_peak_or_moves_it():
    lean = Switches("flashmla", patches=frozenset({"checkpointing"}), casts_adapter_inputs=False)
    peaks = []
    for name in ("loss", "offload", "mlp", "norm", "rope", "attention"):
        lean = replace(lean, patches=lean.patches | {name})
        peaks.append(build_ledger(LLAMA_8B, lean).peak(262144))
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < 0.75 * 80 * GIB < peaks[0]


def test_models_that_the_ledger_would_count_wrong_are_refused_by_name(tmp_path):
    from transformers import MixtralConfig

    with pytest.raises(ValueError, match="MixtralConfig has 8 experts: the ledger knows dense models"):
        Shape.of(MixtralConfig())
    MixtralConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="memory_report: MixtralConfig has 8 experts"):
        memory_report.main(["--model", str(tmp_path), "--device", "cpu", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tokens", "0"], "expected at least 1, got 0"),
        (["--memory_gib", "inf"], "expected GiB above 0, got inf"),
    ],
    ids=str,
)
def test_the_ledger_refuses_numbers_that_are_none(arguments, said, capsys):
    with pytest.raises(SystemExit):
        ledger.main(["llama-8b", *arguments])
    assert said in capsys.readouterr().err


def test_the_longest_context_is_where_the_peak_reaches_the_memory():
    lean = build_ledger(LLAMA_8B, Switches("flashmla", patches=ALL, casts_adapter_inputs=False))
    longest = lean.longest(80 * GIB)
    assert lean.peak(longest) <= 80 * GIB * (1 - ledger.RESERVE) < lean.peak(longest + 1)
    assert longest > 524288
    assert lean.longest(GIB) == 0


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        (
            Switches("eager", gradient_checkpointing=True),
            "scores of eager attention: use --attn_implementation flashmla",
        ),
        (Switches("flashmla", gradient_checkpointing=True), "logits and cross-entropy: add loss to --patches"),
        (Switches("flashmla", patches=frozenset({"loss"})), "activations of every layer: add --gradient_checkpointing"),
        (Switches("sdpa", liger=True, gradient_checkpointing=True), "hidden states: add checkpointing offload to"),
        (
            Switches("flashmla", patches=ALL | {"attention"}, casts_adapter_inputs=False),
            "no switch removes: lower --max_",
        ),
        # Not "add attention": it excludes keep_attention and takes no packed documents.
        (Switches("flashmla", patches=ALL, casts_adapter_inputs=False), "no switch removes: lower --max_"),
        (Switches("flashmla", patches=ALL, use_peft=False, weight_bytes=4), "optimizer states: use --use_peft"),
    ],
)
def test_advice_names_the_largest_term_and_its_switch(switches, said):
    assert said in build_ledger(LLAMA_8B, switches).advice(131072)


def test_flops_are_six_per_parameter_and_token_and_attention_by_its_pairs():
    shape = LLAMA_8B
    pairs = 1000 * 1001 // 2
    attention = 4 * 128 * 32 * 32 * pairs * 7 // 2
    assert shape.training_flops([1000], use_peft=False) == 6 * shape.matmul_parameters * 1000 + attention
    assert shape.training_flops([500, 500], use_peft=True) < shape.training_flops([1000], use_peft=True)
    windowed = replace(shape, window=100)
    assert windowed.attended_pairs(1000) == sum(min(i + 1, 100) for i in range(1000))


def test_the_ledger_prints_its_table(capsys):
    ledger.main(["llama-8b", "--patches", "none", "--gradient_checkpointing", "--tokens", "32768"])
    out = capsys.readouterr().out
    assert "| logits and cross-entropy | 1,503 | 46.97 |" in out
    assert "longest context in 80 GiB" in out


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_those_of_the_configurations(name):
    assert PUBLISHED[name] == Shape.of(models.SHAPES[name])


def test_the_ledger_answers_in_python_and_imports_nothing_that_trains(tiny_model):  # noqa: F811
    found = flashmla_hf.ledger("llama-8b", 131072, patches="all")
    assert 20 * GIB < found.peak_bytes < 30 * GIB
    assert found.host_bytes == 31 * 131072 * 4096 * 2
    assert found.longest(80) > 262144
    assert "| **peak, at the " in str(found)
    same = flashmla_hf.ledger(models.SHAPES["llama-8b"], 131072, patches="all")
    assert same.peak_bytes == found.peak_bytes
    assert flashmla_hf.ledger(str(tiny_model), 1024, dtype="float32").peak_bytes > 0
    for wrong, said in (({"tokens": 0}, "tokens: expected a number"), ({"dtype": "int8"}, "dtype: expected one of")):
        with pytest.raises(ValueError, match=said):
            flashmla_hf.ledger("llama-8b", **wrong)
    with pytest.raises(ValueError, match="has no loadable configuration"):
        flashmla_hf.ledger("./nowhere")
    for program in (
        "import sys, flashmla_hf; "
        "assert not {'flashmla_hf.training', 'accelerate', 'peft', 'datasets', 'yaml', 'tqdm'} & {*sys.modules}",
        "import sys; sys.modules |= dict.fromkeys(('accelerate', 'peft', 'datasets')); "  # as if not installed
        "import flashmla_hf; flashmla_hf.ledger('llama-8b')",
    ):
        subprocess.run([sys.executable, "-c", program], env=ON_PATH, check=True, timeout=200)


# ---------------------------------------------------------------- finetune: patches, evaluation, search, failures


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
def test_flashmla_with_every_patch_trains_as_eager_without(use_peft, tiny_model, corpus, tmp_path):  # noqa: F811
    """Same seed, float32: the curves differ by rounding alone; packed documents, accumulation, an odd tile and chunk."""
    shared = {
        "max_steps": 12, "use_peft": use_peft, "gradient_accumulation_steps": 2, "validation_split_percentage": 20,
    }  # fmt: skip
    finetune.main(options(tiny_model, corpus, tmp_path / "eager", **shared, attn_implementation="eager"))
    patches = ["--patches", "all", "offload", "mlp_tile=37", "loss_chunk=29"]
    finetune.main([*options(tiny_model, corpus, tmp_path / "patched", **shared), *patches])
    expected, found = losses(tmp_path / "eager"), losses(tmp_path / "patched")
    assert expected[-1] < 0.8 * expected[0], "nothing is learnt: the comparison says little"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    results = json.loads((tmp_path / "patched" / "all_results.json").read_text())
    assert "offload" in results["patches"]
    assert results["mfu"] > 0


def test_bfloat16_autocast_and_patches_go_together(tiny_model, corpus, tmp_path):  # noqa: F811
    shared = {"max_steps": 4, "use_peft": True, "bf16": True}
    finetune.main(options(tiny_model, corpus, tmp_path / "plain", **shared))
    finetune.main(options(tiny_model, corpus, tmp_path / "patched", **shared, patches="all"))
    torch.testing.assert_close(losses(tmp_path / "patched"), losses(tmp_path / "plain"), rtol=0.02, atol=0.02)


def test_a_patched_run_resumes_with_the_same_losses(tiny_model, corpus, tmp_path):  # noqa: F811
    shared = {"use_peft": True, "patches": "all", "save_steps": 3, "lr_scheduler_type": "constant"}
    finetune.main(options(tiny_model, corpus, tmp_path / "whole", **shared, max_steps=6))
    finetune.main(options(tiny_model, corpus, tmp_path / "parts", **shared, max_steps=3))
    finetune.main(
        options(tiny_model, corpus, tmp_path / "parts", **shared, max_steps=6, resume_from_checkpoint="latest")
    )
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("attn_implementation", ["flashmla", "eager"])
def test_evaluation_by_position_is_the_loss_of_each_token(tiny_model, attn_implementation, monkeypatch):  # noqa: F811
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    rng = np.random.default_rng(0)
    packs = [[rng.integers(5, 300, size=n).astype(np.int32) for n in sizes] for sizes in ((60, 21), (70,))]
    model = models.load(str(tiny_model), attn_implementation, torch.float32, "cpu")
    model.config.use_cache = False
    monkeypatch.setattr(evaluation, "LOGITS_BYTES", 4 * 304 * 13)  # chunks of 13 tokens
    loss, buckets = finetune.evaluate(model, packs, finetune.Collator(attn_implementation), accelerator, size=2)
    assert "forward" not in vars(model.get_decoder())
    expected: dict[int, list[float]] = {}
    with torch.no_grad():
        for piece in (piece for one in packs for piece in one):
            ids = torch.tensor(piece[None].astype(np.int64))
            each = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
            for position, value in enumerate(each.tolist(), start=1):
                expected.setdefault(2 ** (position.bit_length() - 1), []).append(value)
    assert [b["from"] for b in buckets] == sorted(expected)
    for bucket in buckets:
        assert bucket["tokens"] == len(expected[bucket["from"]])
        assert bucket["loss"] == pytest.approx(np.mean(expected[bucket["from"]]), rel=1e-4)
    every = [value for values in expected.values() for value in values]
    assert loss == pytest.approx(np.mean(every), rel=1e-5)


def test_the_search_finds_the_length_and_writes_it(tiny_model, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The processes are real for two lengths; what would not fit is told by a limit of ours, as the machine's memory is large."""
    monkeypatch.setenv("PYTHONPATH", ON_PATH["PYTHONPATH"])
    real, limit = max_length.run_trial, 2500

    def limited(argv, length, timeout):
        if length > limit:
            return {"length": length, "status": "out_of_memory", "reason": "finetune: out of memory"}
        if length < 600:
            return real(argv, length, timeout)
        return {"length": length, "status": "ok", "peak_bytes": 2**20 * length, "seconds": 1.0}

    monkeypatch.setattr(max_length, "run_trial", limited)
    monkeypatch.setattr(ledger.Ledger, "longest", lambda self, memory: 512)
    monkeypatch.setattr(machine, "memory_available", lambda device: 4 * GIB)
    arguments = options(tiny_model, tmp_path, tmp_path / "out", use_peft=True, find_max_length=True)
    finetune.main(arguments)
    result = json.loads((tmp_path / "out" / "max_length.json").read_text())
    assert result["trials"][0]["status"] == "ok", result
    assert result["trials"][0]["peak_bytes"] > 0
    assert 0.96 * limit <= result["max_length"] <= limit < result["first_that_does_not_fit"]
    assert "max_length: " in capsys.readouterr().out


def test_a_trial_without_host_memory_is_too_long_and_no_error(tmp_path, monkeypatch):
    program = tmp_path / "finetune.py"
    said = "finetune: flashmla_hf.patch: patch 'offload': host memory: expected 3 GiB"
    program.write_text(f"import sys\nsys.exit({said!r})\n")
    monkeypatch.setattr(max_length, "PROGRAM", (str(program),))
    assert max_length.run_trial([], 64, 60) == {"length": 64, "status": "out_of_memory", "reason": said}
    assert machine.is_out_of_memory(RuntimeError(said))


def test_a_trial_beyond_the_memory_ends_with_the_ledgers_advice(tiny_model, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", ON_PATH["PYTHONPATH"])
    program = (
        "import sys; from flashmla_hf.training import finetune, machine; "
        "machine.memory_available = lambda device: 3 * 2**30; finetune.main(sys.argv[1:])"
    )
    arguments = options(tiny_model, tmp_path, tmp_path, attn_implementation="eager", trial_length=16384)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=ON_PATH, capture_output=True, text=True, timeout=120
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("finetune: out of memory; by the ledger"), last
    assert "are scores of eager attention: use --attn_implementation flashmla" in last


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            "out of memory; by the ledger .* add loss|out of memory; by the",
        ),
        (MemoryError(), "out of memory; by the ledger"),
        (OSError(28, "No space left on device"), "No space left on device; what is saved there stays"),
        (
            RuntimeError("flashmla_hf.patch: patch 'offload': host memory: expected more"),
            "patch 'offload': host memory",
        ),
        (ValueError("flashmla_hf.patch: patch 'mlp': expected\na tensor"), "patch 'mlp': expected a tensor"),
    ],
)
def test_running_out_ends_with_one_sentence(error, said, tiny_model, corpus, tmp_path, monkeypatch):  # noqa: F811
    def fail(*args):
        raise error

    monkeypatch.setattr(finetune, "run_batches", fail)
    with pytest.raises(SystemExit, match=said) as caught:
        finetune.main(options(tiny_model, corpus, tmp_path, max_steps=1))
    assert "\n" not in str(caught.value)


def test_a_disk_that_fills_up_at_a_checkpoint_loses_nothing_saved(tiny_model, corpus, tmp_path):  # noqa: F811
    """Really: the system refuses files beyond a limit, which the optimizer's state is over."""
    shared = {"save_steps": 1, "lr_scheduler_type": "constant"}
    finetune.main(options(tiny_model, corpus, tmp_path, **shared, max_steps=1))
    before = (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes()
    arguments = options(tiny_model, corpus, tmp_path, **shared, max_steps=2, resume_from_checkpoint="latest")
    done = subprocess.run(
        [sys.executable, "-m", "flashmla_hf.training.finetune", *arguments], env=ON_PATH, capture_output=True, text=True,
        timeout=120, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )  # fmt: skip
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("finetune: checkpoint-2 could not be written"), done.stderr
    assert last.endswith("checkpoint-1 is whole: resume from it")
    assert not list(tmp_path.glob("*checkpoint-2"))
    assert (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes() == before
    finetune.main(arguments)
    assert len(losses(tmp_path)) == 2


@pytest.mark.parametrize(
    ("patches", "said"),
    [
        (["nothing"], "unknown patch 'nothing': expected all, none, some of loss"),
        (["offload=many"], "expected a number after offload="),
        (["offload"], "needs patch 'checkpointing'"),
    ],
)
def test_a_wrong_patch_ends_with_one_sentence(patches, said, tiny_model, corpus, tmp_path):  # noqa: F811
    with pytest.raises(SystemExit) as caught:
        finetune.main([*options(tiny_model, corpus, tmp_path / "out", max_steps=1), "--patches", *patches])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_adapters_inputs_are_not_copied_and_the_numbers_stay_the_same():
    from peft import LoraConfig, get_peft_model

    found = []
    for is_kept in (False, True):
        model = models.load("tiny", "sdpa", torch.bfloat16, "cpu")
        torch.manual_seed(1)
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
        if is_kept:
            keep_adapter_inputs(model)
        ids = torch.arange(64)[None]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---------------------------------------------------------------- memory_report: series, resuming, rendering


def test_a_series_is_a_backend_and_what_is_added():
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
    monkeypatch.setenv("PYTHONPATH", ON_PATH["PYTHONPATH"])
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
    real = measure_model.in_subprocess
    monkeypatch.setattr(measure_model, "in_subprocess", lambda p, t: measured.append(p.context) or real(p, t))
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


def test_a_smaller_gpu_is_another_measurement():
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
    configs = sorted((ROOT / "benchmarks" / "configs").glob("*.yaml"))
    for config in configs:
        memory_report.main(["--config", str(config), "--device", "cuda", "--output_dir", str(tmp_path)])
    assert {point.memory_limit for point in seen} == {78 * GIB}
    assert {point.model for point in seen} == {"llama-8b", "llama-1b", "mistral-7b"}
    assert {point.optim for point in seen} == {"adamw_torch"}
    assert {path.stem for path in tmp_path.glob("*.json")} == {
        "memory-llama-8b",
        "memory-llama-8b-window",
        "memory-llama-1b-full",
        "memory-llama-1b-full-window",
        "memory-mistral-7b",
    }
    assert {point.sliding_window for point in seen} == {None, 4096}


# ---------------------------------------------------------------- quality


def _quality(folder, output_dir, *more):
    arguments = ["--model", str(folder), "--contexts", "64", "128", "--tokens_per_step", "128", "--max_steps", "3"]
    context_quality.main(
        [*arguments, "--device", "cpu", "--eager_context", "64", "--output_dir", str(output_dir), *more]
    )


def test_the_loss_by_context_stands_beside_eagers_curve(tiny_model, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", ON_PATH["PYTHONPATH"])
    text = " ".join(f"{word} {i}" for i in range(150) for word in ("alpha", "beta", "gamma"))
    monkeypatch.setattr(documents, "standard_library", lambda: {f"{i}.py": text[i:] for i in range(6)})
    monkeypatch.setattr(machine, "fastest_dtype", lambda device: "float32")
    _quality(tiny_model, tmp_path)
    document = json.loads((tmp_path / "context_quality.json").read_text())
    assert [p["context"] for p in document["points"]] == [64, 128]
    curves = context_quality.beside_eager(document)
    assert len(curves["mine"]) == len(curves["eager"]) == 3
    assert 0 <= curves["apart"] <= curves["allowed"]
    assert "At 64 tokens also by eager attention" in (tmp_path / "context_quality.md").read_text()
    assert (tmp_path / "context_quality.png").read_bytes().startswith(b"\x89PNG")

    def again(folder, context, files, output_dir, args, attn_implementation="flashmla"):
        if attn_implementation == "eager":
            document["eager"]["losses"][-1] += 0.01
            return document["eager"]
        return next(p for p in document["points"] if p["context"] == context)

    monkeypatch.setattr(context_quality, "train_one", again)
    with pytest.raises(SystemExit, match=r"the losses differ by .*e-0[12] nats, allowed 1e-03"):
        _quality(tiny_model, tmp_path / "again")
    with pytest.raises(SystemExit, match="expected one of --contexts"):
        _quality(tiny_model, tmp_path, "--eager_context", "32")


# ---------------------------------------------------------------- the commands


def _flashmla(capsys, *arguments):
    from flashmla_hf.__main__ import main

    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr()
    return code, said.out + said.err


@pytest.mark.parametrize("command", ["finetune", "max-length", "memory", "ledger", "check", "doctor"])
def test_every_command_has_a_help(command, capsys):
    code, said = _flashmla(capsys, command, "--help")
    assert code == 0
    assert said.startswith(f"usage: flashmla {command}")
    assert len(said.splitlines()) > 6
    assert f"    {command}" in _flashmla(capsys)[1]


def test_a_missing_extra_is_named_with_its_command(monkeypatch, capsys):
    from flashmla_hf import training

    found = training.importlib.util.find_spec
    monkeypatch.setattr(
        training.importlib.util, "find_spec", lambda name: None if name in ("peft", "yaml") else found(name)
    )
    code, said = _flashmla(capsys, "finetune", "--help")
    assert (code, said) == (1, 'flashmla finetune: not installed: peft, yaml. Run: pip install "flashmla_hf[train]"\n')
    assert _flashmla(capsys, "ledger", "llama-8b")[0] == 0


def test_check_reports_a_model_without_its_weights(tiny_model, capsys):  # noqa: F811
    code, said = _flashmla(capsys, "check", tiny_model)
    assert code == 0
    assert "LlamaForCausalLM: 2 of 2 attention layers use the flashmla kernel" in said
    code, said = _flashmla(capsys, "check", "./nowhere")
    assert code == 1
    assert "'./nowhere' cannot be built" in said


def test_memory_is_measured_beside_the_ledger(tiny_model, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", ON_PATH["PYTHONPATH"])
    real = memory.run_trial

    def limited(argv, length, timeout):
        out_of_memory = {"length": length, "status": "out_of_memory", "reason": "finetune: out of memory"}
        return out_of_memory if length > 512 else real(argv, length, timeout)

    monkeypatch.setattr(memory, "run_trial", limited)
    code, said = _flashmla(
        capsys, "memory", "--model_name_or_path", tiny_model, "--use_cpu", "--tokens", 256, 1024, "--disable_tqdm"
    )
    assert code == 0, said
    assert "| 256 | " in said
    assert "| 1,024 | out of memory | " in said
    code, said = _flashmla(capsys, "memory", "--model_name_or_path", "./nowhere", "--tokens", 256)
    assert "has no loadable configuration" in str(code)


# ---------------------------------------------------------------- documentation


def test_the_trainer_example_of_the_documentation_runs(tiny_model, corpus, tmp_path, monkeypatch, capsys):  # noqa: F811
    text = (ROOT / "docs" / "transformers.md").read_text()
    code = text.split("<!-- example: trainer -->\n```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    # The example does not name a device: it takes a GPU if there is one, and the tiny model is float32.
    code = code.replace('report_to="none"', 'report_to="none", use_cpu=True, logging_steps=1')
    names = {"MODEL": str(tiny_model), "TEXTS": texts}
    exec(compile(code, "transformers.md", "exec"), names)
    logged = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert logged[-1] < logged[0]


def test_the_options_of_the_documented_commands_exist():
    text = (ROOT / "docs" / "finetune.md").read_text()
    commands = [line.split() for line in text.splitlines() if "--config scripts/configs/" in line]
    assert len(commands) == 5
    for words in commands:
        finetune.parse_arguments(words[words.index("--config") :])
