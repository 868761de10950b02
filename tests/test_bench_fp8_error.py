"""docs/fp8.md holds the committed numbers, the bars that can be judged on a CPU are met, and the benchmark runs."""

import json
import math

import bench_fp8_error
import pytest
import records
import torch

RESULT = records.RESULTS / "fp8-error-cpu.json"


@pytest.fixture(scope="module")
def document():
    return json.loads(RESULT.read_text())


def test_the_page_holds_the_committed_numbers(document):
    text = bench_fp8_error.PAGE.read_text()
    assert bench_fp8_error.updated(text, document) == text, "run: python benchmarks/bench_fp8_error.py --parts"
    assert bench_fp8_error.updated(text.replace("causal |", "casual |"), document) == text
    with pytest.raises(SystemExit, match="expected the markers of 'loss' once"):
        bench_fp8_error.updated(text.replace("<!-- fp8 loss -->", ""), document)


def test_outliers_cost_what_is_promised(document):
    """9.1e-3 is what FlashAttention 3 publishes for rotation and blocks. Causal rows of few keys err more, smaller heads too."""
    for point in document["random"]:
        ours, plain, bf16 = (point["rmse"][name] for name in ("ours", "plain", "bf16"))
        assert bf16 < ours / 5
        if point["distribution"] == "outliers" and point["head_dim"] >= 128 and not point["causal"]:
            assert ours <= 9.1e-3
            assert ours <= 0.65 * plain
        assert ours <= 1.1 * plain
        # A power of two costs next to nothing against amax / 448.
        assert ours <= 1.05 * point["rmse"]["rotation, blocks"]


def test_a_real_model_loses_what_the_page_says(document):
    """The aim, 0.3 % of perplexity, is not met: the page says so, and this fails if it gets worse, or if it is met."""
    assert len(document["layers"]) == 30
    assert max(layer["ours"] / layer["plain"] for layer in document["layers"][1:]) < 0.9
    changes = [math.expm1(row["fp8"] - row["exact"]) for row in document["loss"]]
    assert all(0.003 < change < 0.02 for change in changes), changes
    assert "more than the 0.3 % that this project aims at" in bench_fp8_error.PAGE.read_text()


def test_a_run_writes_points_and_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_fp8_error, "SHAPES", [(16, 256, 2, False), (24, 130, 1, True)])
    bench_fp8_error.main(["--parts", "random", "--output_dir", str(tmp_path)])
    document = json.loads((tmp_path / RESULT.name).read_text())
    assert [(p["distribution"], p["head_dim"], p["causal"]) for p in document["random"]] == [
        ("normal", 16, False), ("normal", 24, True), ("outliers", 16, False), ("outliers", 24, True),
    ]  # fmt: skip
    assert all(0 < value < 1 for point in document["random"] for value in point["rmse"].values())
    table = bench_fp8_error._random_table(document, "outliers")
    assert "| 24, 130, causal |" in table


def test_the_loss_through_a_cache_is_that_of_the_second_half():
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )  # fmt: skip
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="flashmla").eval()
    tokens = torch.randint(0, 50, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(tokens[:, :32]).logits[0, 16:-1]
        expected = torch.nn.functional.cross_entropy(logits, tokens[0, 17:32]).item()
        got = bench_fp8_error.loss_of(model, tokens[:, :32], 32, transformers.DynamicCache)
    assert got == pytest.approx(expected, rel=1e-5)
