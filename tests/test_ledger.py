"""The ledger of training memory, against counted models, published numbers and measured GPUs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import memory_page
import memory_report
import models
import pytest
import records
import torch
import transformers
from training_support import ON_PATH, ROOT

import flashmla_hf
from flashmla_hf.host_memory import GIB
from flashmla_hf.training import ledger
from flashmla_hf.training.ledger import KIB, build_ledger
from flashmla_hf.training.shape import PUBLISHED, Shape
from flashmla_hf.training.step_time import MFU, Cluster, step_time
from flashmla_hf.training.terms import Switches

LLAMA_8B = Shape.of(models.SHAPES["llama-8b"])
ALL = frozenset({"loss", "mlp", "norm", "rope", "checkpointing", "keep_attention", "offload"})


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
        (["--memory_gib", "inf"], "expected GiB above 0 and at most 8.6e+09, got inf"),
        (["--memory_gib", "1e300"], "expected GiB above 0 and at most 8.6e+09, got 1e+300"),
        (["--tokens", "9" * 400], "expected at most 9223372036854775807, got a number of 400 digits"),
    ],
    ids=str,
)
def test_the_ledger_refuses_token_counts_and_memory_sizes_out_of_range(arguments, said, capsys):
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
    assert "by memory" not in out
    first = "assumed: 32,768 tokens x 1, LoRA of rank 16, bfloat16, attention flashmla, patches none, gradient_checkpointing, a"
    assert out.startswith(f"{first} card of 80 GiB\n")


def test_the_ledger_names_the_positions_that_memory_is_beyond(tiny_model, capsys):
    ledger.main([str(tiny_model), "--max_length", "4096", "--full", "--batch_size", "2", "--patches", "rope", "loss"])
    out = capsys.readouterr().out
    assert "assumed: 4,096 tokens (beyond the model's 2,048 positions) x 2, all weights trained, bfloat16, " in out
    assert "attention flashmla, patches loss rope, a card of 80 GiB" in out
    assert " tokens by memory; the model has 2,048 positions" in out
    assert Shape.of(models.SHAPES["tiny"]).positions == 8192


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_are_those_of_the_configurations(name):
    assert PUBLISHED[name] == Shape.of(models.SHAPES[name])


def test_the_ledger_answers_in_python_and_imports_nothing_that_trains(tiny_model):
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


@pytest.mark.parametrize("kind", ["BertConfig", "ModernBertConfig", "BartConfig", "T5Config"])
def test_a_model_with_an_encoder_has_no_ledger(kind):
    with pytest.raises(
        ValueError, match=rf"{kind} is of a model with an encoder: the ledger knows decoder-only models"
    ):
        Shape.of(getattr(transformers, kind)())
    assert Shape.of(transformers.BertConfig(is_decoder=True)).layers == 12


# ---- several GPUs ----------------------------------------------------------------------------------------------------


def test_gpus_divide_weights_by_fsdp_and_tokens_by_sp():
    alone = Switches(patches=ALL, use_peft=False)
    divided = build_ledger(LLAMA_8B, replace(alone, gpus=4, sp=4, fsdp=True))
    fixed, growing = ({t.name: getattr(t, kind) for t in divided.terms} for kind in ("fixed", "per_token"))
    for term in build_ledger(LLAMA_8B, alone).terms:
        assert growing[term.name] == term.per_token / 4, term.name
        if term.name in ("weights", "gradients", "optimizer states"):
            assert fixed[term.name] == term.fixed / 4, term.name
    # Two layers of 218,103,808 parameters in bfloat16, and a head of 128,256 x 4,096.
    assert fixed["two layers' gathered weights"] == 2 * 2 * 218_103_808
    assert fixed["the gathered head"] == 2 * 128_256 * 4096
    assert growing["what Ulysses sends and receives"] == 2 * (8192 + 2 * 2048) / 4


def test_ddp_divides_nothing_and_has_its_gradients_twice():
    alone, ddp = (build_ledger(LLAMA_8B, Switches(patches=ALL, gpus=gpus)) for gpus in (1, 4))
    adapter = LLAMA_8B.lora_parameters(16) * 4
    assert ddp.peak(65536) == alone.peak(65536) + adapter


def test_ledger_refuses_gpus_that_share_no_sequence_evenly():
    with pytest.raises(ValueError, match="sp: expected a divisor of gpus 4, got 3"):
        flashmla_hf.ledger("llama-8b", gpus=4, sp=3)
    with pytest.raises(ValueError, match="gpus: expected a number of at least 1, got 0"):
        flashmla_hf.ledger("llama-8b", gpus=0)


def test_the_command_says_what_each_gpu_holds(capsys):
    ledger.main(["llama-8b", "--gpus", "4", "--sp", "4", "--fsdp", "--patches", "all", "--tokens", "1048576"])
    told = capsys.readouterr().out
    assert "each of 4 GPUs by FSDP2, 4 for each sequence, cards of 80 GiB" in told
    assert "what Ulysses sends and receives" in told


# ---- the seconds of a step on several GPUs ---------------------------------------------------------------------------


def test_a_step_divides_its_operations_and_adds_what_crosses_links():
    """Two layers, by hand: 4 GPUs of two hosts, 1,000 tokens."""
    shape = Shape(hidden=64, layers=2, heads_q=8, heads_kv=4, head_dim=8, intermediate=96, vocabulary=100)
    cluster = Cluster(gpus_per_host=2, nvlink=100, network=10, tflops=1, mfu=0.5)
    switches = Switches(patches=ALL, gpus=4, sp=4, fsdp=True, use_peft=False)
    found = step_time(shape, switches, 1000, 1, cluster)
    assert found.compute == pytest.approx(shape.training_flops([1000], use_peft=False) / 4 / 0.5e12)
    # A GPU's 250 tokens of q, k, v and output in bfloat16, three times in two layers; three quarters are others'.
    sent = 3 * 2 * 250 * (8 + 4 + 4 + 8) * 8 * 2 * 3 / 4
    assert found.exchange == pytest.approx(sent / 3 / 1e9 / 100 + 2 * sent / 3 / 1e9 / 10)
    # Weights twice in bfloat16, gradients once in float32, and both cards of a host.
    assert found.sharding == pytest.approx(3 / 4 * shape.parameters * (2 * 2 + 4) / 1e9 / 20)
    assert found.seconds == max(found.compute, found.sharding) + found.exchange
    alone = step_time(shape, Switches(patches=ALL), 1000, 1, cluster)
    assert (alone.exchange, alone.sharding) == (0, 0)
    ddp = step_time(shape, Switches(patches=ALL, gpus=2, adapter_bytes=4), 1000, 1, cluster)
    assert ddp.sharding == pytest.approx(2 / 2 * shape.lora_parameters(16) * 4 / 1e9 / 100)
    few = step_time(
        shape, Switches(gpus=8, sp=8), 1000, 1, cluster
    )  # 8 GPUs repeat 4 heads of keys, no layer runs again
    sent = 2 * 2 * 125 * (8 + 8 + 8 + 8) * 8 * 2 * 7 / 8
    assert few.exchange == pytest.approx(sent / 7 / 1e9 / 100 + 6 * sent / 7 / 1e9 / 10)


def test_the_share_that_one_gpu_reaches_is_the_committed_one():
    measured, _ = memory_page.read(records.RESULTS / "memory-llama-8b-h200.json")
    assert round(max((m for m in measured if m.mfu), key=lambda m: m.point.context).mfu, 2) == MFU


def test_the_command_predicts_seconds_on_several_hosts(capsys):
    ledger.main(["llama-8b", "--gpus", "16", "--sp", "16", "--fsdp", "--patches", "all", "--tokens", "1048576"])
    told = capsys.readouterr().out
    assert "predicted and not yet confirmed on several GPUs" in told
    assert "on 2 hosts." in told
    assert "an MFU of 43%" in told
    with pytest.raises(SystemExit, match="Cluster: mfu: expected a number above 0 and up to 1, got 43"):
        ledger.main(["llama-8b", "--gpus", "2", "--mfu", "43"])
    with pytest.raises(SystemExit, match="sp: expected a divisor of the model's 32 heads"):
        ledger.main(["llama-8b", "--gpus", "64", "--sp", "64"])
