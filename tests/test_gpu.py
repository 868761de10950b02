"""The operator contract on a GPU, for every implementation there is: ``flex``, and ``sm90`` where its library is built.

    python3 -m pytest tests/test_gpu.py -k sm90                      # under a minute on an H100
    python3 -m pytest tests/test_gpu.py -k "not sm90"                # about three minutes, most of them compiling flex
    python3 -m pytest tests/test_gpu.py -k "not sm90" -m "not slow"

FlexAttention is compiled once per kind of call (dtype, heads, head dims, options, gradients wanted), in seconds: the
cases here share the few shapes of ``_BASE``, and differ in what costs no compiling. What only sm90 can get wrong is in
tests/test_sm90.py and tests/test_sm90_backward.py.
"""

import importlib
import random

import gpu_support
import numerics
import pytest
import torch
from cases import Case
from gpu_support import captured, peak_bytes

from flashmla_hf import direct
from flashmla_hf.backends import aten_flash, flex
from flashmla_hf.dispatch import IMPLEMENTATIONS, attention
from flashmla_hf.reference import visible_keys

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

DEVICE = "cuda"
ALL = (True, True, True)  # of q, k and v the gradients
_BASE = {"heads_q": 8, "heads_kv": 2, "head_dim_qk": 64}


@pytest.fixture(params=["flex", "sm90"])
def impl(request):
    if request.param == "sm90" and gpu_support.sm90_missing() is not None:
        pytest.skip(gpu_support.sm90_missing())
    return request.param


def check(impl, case, dtype=torch.bfloat16, **options):
    """numerics.check on the GPU. What sm90 does not promise it must refuse."""
    # FlexAttention's backward keeps fewer bits where a row sees one key, so that dP - delta cancels: 3.3 times eager's
    # error was seen (dQ, window (0, 0), torch 2.11, H100). The kernels are torch's; ours get no allowance.
    grad_factor = 4.0 if impl == "flex" else 2.0
    if impl == "sm90" and not gpu_support.is_for_sm90(case, dtype):
        with pytest.raises(RuntimeError, match="cannot compute this call"):
            numerics.check(impl, case, dtype, DEVICE, **options)
        return None
    return numerics.check(impl, case, dtype, DEVICE, grad_factor=grad_factor, **options)


def normal(*shape, dtype=torch.bfloat16, seed=0, requires_grad=False):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE).to(dtype).requires_grad_(requires_grad)


def qkv(batch, seqlen_q, seqlen_kv, dtype=torch.bfloat16, requires_grad=(False, False, False)):
    lengths, heads = (seqlen_q, seqlen_kv, seqlen_kv), (8, 2, 2)
    return [
        normal(batch, length, h, 64, dtype=dtype, seed=seed, requires_grad=requires)
        for seed, (length, h, requires) in enumerate(zip(lengths, heads, requires_grad, strict=True))
    ]


# ---- Features: few kinds of call, many calls -------------------------------------------------------------------------

DENSE = [
    Case("full", batch=2, seqlen_q=333, **_BASE),
    Case("causal", batch=2, seqlen_q=1000, is_causal=True, **_BASE),
    Case("causal, multiple of 128", batch=2, seqlen_q=512, is_causal=True, **_BASE),
    Case("chunked prefill", batch=2, seqlen_q=60, seqlen_kv=390, is_causal=True, **_BASE),
    Case("masked rows", batch=3, seqlen_q=390, seqlen_kv=137, is_causal=True, **_BASE),
    Case("cross attention", batch=2, seqlen_q=90, seqlen_kv=437, **_BASE),
    Case("sliding window", batch=2, seqlen_q=700, window=(100, 0), **_BASE),
    Case("window both sides", batch=2, seqlen_q=340, seqlen_kv=350, window=(17, 140), **_BASE),
    Case("window right only", batch=2, seqlen_q=340, window=(None, 3), **_BASE),
    Case("window zero", batch=2, seqlen_q=240, window=(0, 0), **_BASE),
    Case("window on the edge of a block", batch=2, seqlen_q=640, window=(127, 128), **_BASE),
    Case("one key", batch=2, seqlen_q=5, seqlen_kv=1, **_BASE),
    Case("scale", batch=2, seqlen_q=300, scale=0.5, is_causal=True, **_BASE),
    Case("negative scale", batch=2, seqlen_q=300, scale=-0.2, is_causal=True, **_BASE),
    Case("peaked", batch=2, seqlen_q=300, magnitude=8.0, is_causal=True, **_BASE),
    Case("no keys", batch=2, seqlen_q=9, seqlen_kv=0, **_BASE),
    Case("no queries", batch=2, seqlen_q=0, seqlen_kv=9, **_BASE),
    Case("no batch", batch=0, seqlen_q=9, **_BASE),
]
SINKS = [
    Case("sinks", batch=2, seqlen_q=333, is_causal=True, has_sinks=True, **_BASE),
    Case("sinks, window", batch=2, seqlen_q=333, window=(40, 0), has_sinks=True, **_BASE),
    Case("sinks, masked rows", batch=2, seqlen_q=333, seqlen_kv=77, is_causal=True, has_sinks=True, **_BASE),
    Case("sinks, no keys", batch=2, seqlen_q=33, seqlen_kv=0, has_sinks=True, **_BASE),
]
SOFTCAP = [
    Case("softcap", batch=2, seqlen_q=333, is_causal=True, softcap=2.0, magnitude=2.0, **_BASE),
    Case("softcap, window", batch=2, seqlen_q=333, window=(40, 9), softcap=30.0, magnitude=4.0, **_BASE),
]
PACKED = [
    Case("packed", seqlens_q=(270, 1, 145, 128), is_causal=True, **_BASE),
    Case("packed, ragged, empty, rest", seqlens_q=(33, 0, 205, 64, 7), seqlens_kv=(20, 9, 0, 380, 7), rest_q=6,
         rest_kv=3, is_causal=True, **_BASE),
    Case("packed, window", seqlens_q=(250, 90), seqlens_kv=(160, 290), window=(12, 5), **_BASE),
    Case("packed, many short", seqlens_q=(7, 1, 2, 30) * 40, is_causal=True, **_BASE),
    Case("packed, only empty sequences", seqlens_q=(0, 0), rest_q=4, rest_kv=4, **_BASE),
    Case("packed, no sequence", seqlens_q=(), rest_q=4, rest_kv=4, **_BASE),
]  # fmt: skip
# One call each of the kinds that must be compiled anew.
KINDS = [
    Case("packed with sinks", seqlens_q=(33, 0, 205), seqlens_kv=(20, 9, 80), rest_q=6, has_sinks=True, **_BASE),
    Case("everything", batch=2, seqlen_q=333, window=(40, 0), has_sinks=True, softcap=5.0, layout="sliced", **_BASE),
    Case("transposed", batch=2, seqlen_q=333, is_causal=True, layout="transposed", **_BASE),
    Case("batch of one", batch=1, seqlen_q=333, is_causal=True, **_BASE),
    Case("heads 7/1", batch=2, seqlen_q=165, heads_q=7, heads_kv=1, is_causal=True),
    Case("heads 4/4, head dim 128", batch=2, seqlen_q=333, heads_q=4, head_dim_qk=128, is_causal=True),
    Case("head dims 192/128", batch=2, seqlen_q=330, heads_q=4, head_dim_qk=192, head_dim_v=128, is_causal=True),
    Case("head dim 256", batch=2, seqlen_q=170, heads_q=4, heads_kv=1, head_dim_qk=256, is_causal=True),
    Case("head dims 40/24", batch=2, seqlen_q=233, head_dim_qk=40, head_dim_v=24, is_causal=True),
    Case("head dims 3/5", batch=2, seqlen_q=133, head_dim_qk=3, head_dim_v=5, is_causal=True),
]


def named(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@named(DENSE + SINKS + SOFTCAP + PACKED)
def test_every_feature_equals_the_reference(impl, case):
    check(impl, case)


@named(KINDS)
def test_every_kind_of_call_equals_the_reference(impl, case):
    check(impl, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@named([DENSE[1], DENSE[4], DENSE[7]])
def test_other_dtypes_equal_the_reference(impl, case, dtype):
    check(impl, case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "head_dim_qk", "head_dim_v"),
    [
        (torch.float32, 128, 128),
        (torch.float32, 192, 128),
        (torch.float32, 256, 256),
        (torch.bfloat16, 192, 192),
        (torch.bfloat16, 64, 256),
        (torch.bfloat16, 512, 512),
    ],
    ids=str,
)
def test_wide_head_dims_fit_the_gpu(impl, dtype, head_dim_qk, head_dim_v):
    check(impl, Case(batch=2, seqlen_q=170, head_dim_qk=head_dim_qk, head_dim_v=head_dim_v, is_causal=True), dtype)


def test_random_lengths_windows_and_scales_equal_the_reference(impl):
    draw = random.Random(0)
    for seed in range(25):
        bound = draw.choice([None, 0, draw.randrange(400)]), draw.choice([None, 0, draw.randrange(400)])
        case = Case(
            batch=draw.randint(2, 4), seqlen_q=draw.randint(2, 400), seqlen_kv=draw.randint(2, 400),
            is_causal=draw.random() < 0.5, window=bound, scale=draw.choice([None, draw.uniform(-0.3, 0.3)]), **_BASE,
        )  # fmt: skip
        check(impl, case, seed=seed)


def test_random_packs_equal_the_reference(impl):
    draw = random.Random(1)
    for seed in range(15):
        sequences = draw.randint(1, 12)
        lengths = [tuple(draw.choice([0, 1, draw.randrange(200)]) for _ in range(sequences)) for _ in range(2)]
        case = Case(
            seqlens_q=lengths[0], seqlens_kv=lengths[draw.randrange(2)], rest_q=2 + draw.randrange(9),
            rest_kv=2 + draw.randrange(9), is_causal=draw.random() < 0.5,
            window=(draw.choice([None, draw.randrange(100)]), draw.choice([None, draw.randrange(100)])), **_BASE,
        )  # fmt: skip
        check(impl, case, seed=seed)


@pytest.mark.parametrize(("has_dout", "has_dlse"), [(True, False), (False, True)])
def test_gradients_flow_through_either_result_alone(impl, has_dout, has_dlse):
    check(impl, DENSE[4], has_dout=has_dout, has_dlse=has_dlse)


@pytest.mark.parametrize("wants", [("q",), ("k", "v")], ids=str)
def test_gradients_of_some_inputs_are_computed_alone(impl, wants):
    result = check(impl, DENSE[1], wants=wants)
    assert set(result.grads) == set(wants)


def test_decoding_equals_the_reference(impl):
    for seqlen_kv in (1, 2, 200, 1111, 4096):
        check(impl, Case(batch=2, seqlen_q=1, seqlen_kv=seqlen_kv, is_causal=True, **_BASE), wants=())


def test_masked_rows_are_exactly_zero_and_minus_infinity(impl):
    q, k, v = qkv(2, 300, 100)
    out, lse = attention(q, k, v, is_causal=True, return_lse=True, impl=impl)
    assert (out[:, :200] == 0).all()
    assert (lse[:, :, :200] == float("-inf")).all()
    assert lse[:, :, 200:].isfinite().all()
    assert lse.dtype == torch.float32


def test_repeating_a_call_gives_the_same_bits(impl):
    inputs = qkv(2, 1000, 1000, requires_grad=ALL)
    results = []
    for _ in range(2):
        out, lse = attention(*inputs, is_causal=True, deterministic=True, return_lse=True, impl=impl)
        results.append([out, lse, *torch.autograd.grad(out.float().square().sum(), inputs)])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


# ---- Memory: nothing of size seqlen_q * seqlen_kv --------------------------------------------------------------------


def forward_backward(impl, seqlen, requires_grad, **options):
    inputs = qkv(2, seqlen, seqlen, requires_grad=requires_grad)
    out = attention(*inputs, impl=impl, **options)
    if any(requires_grad):
        out.backward(out.detach())
    return out


def test_many_lengths_and_grad_modes_in_one_process_stay_fused(impl):
    """More combinations than dynamo's recompile limit: one n² matrix here takes 2 * 8 * 4000² * 2 bytes = 488 MiB."""
    modes = [ALL, (True, False, False), (False, False, False)]
    kinds = set(flex._kernels)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for n in range(5):
        for window in (None, (700 + n, 0)):
            for mode in modes:
                peak = peak_bytes(lambda m=mode, w=window, n=n: forward_backward(impl, 4000 + 37 * n, m, window=w))
                assert peak < 200 * 2**20, f"{peak / 2**20:.0f} MiB for seqlen {4000 + 37 * n}, gradients of {mode}"
    if impl == "flex":
        assert len(set(flex._kernels) - kinds) <= len(modes)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled <= len(modes)


def test_64k_tokens_fit_and_are_right(impl):
    """The scores alone would be 2 * 8 * 65536² * 2 bytes = 128 GiB."""
    seqlen, tail = 65536, 40
    inputs = qkv(2, seqlen, seqlen, requires_grad=ALL)
    outs = []

    def run():
        outs.append(attention(*inputs, is_causal=True, impl=impl))
        outs[0].backward(outs[0].detach())

    peak = peak_bytes(run)
    operands = sum(x.numel() * x.element_size() for x in (*inputs, inputs[0]))
    assert peak < 4 * operands, f"{peak / 2**20:.0f} MiB, q, k, v and out take {operands / 2**20:.0f} MiB"

    q, k, v = (x.detach()[:1] for x in inputs)
    last = numerics.eager(q[:, -tail:].double(), k.double(), v.double(), is_causal=True)[0]
    error = (outs[0][:1, -tail:].double() - last).abs().max().item()
    assert error < 0.01 * last.abs().max().item() + 1e-4
    assert all(x.grad.isfinite().all() for x in inputs)


def test_128k_tokens_with_a_window_fit_and_are_right(impl):
    seqlen, window = 131072, 1000
    q, k, v = qkv(2, seqlen, seqlen)
    outs = []
    peak = peak_bytes(lambda: outs.append(attention(q, k, v, window=(window, 0), impl=impl)))
    assert peak < 2**30
    rows = slice(100_000, 100_040)
    keys = slice(rows.start - window, rows.stop)
    expected, _ = numerics.eager(
        q[:1, rows].double(), k[:1, keys].double(), v[:1, keys].double(), window=(window, 0)
    )  # fmt: skip
    error = (outs[0][:1, rows].double() - expected).abs().max().item()
    assert error < 0.02 * expected.abs().max().item()


# ---- Streams, graphs, torch.compile ----------------------------------------------------------------------------------


def test_a_call_does_not_wait_for_the_gpu(impl):
    case = PACKED[1]
    inputs = case.inputs(torch.bfloat16, DEVICE)
    for _ in range(2):  # once to compile, which does wait
        numerics.run(impl, case, inputs)
    boundaries = {"cu_seqlens_q": inputs.cu_seqlens_q.clone(), "cu_seqlens_kv": inputs.cu_seqlens_kv.clone()}
    leaves = [x.clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = attention(*leaves, **boundaries, is_causal=True, return_lse=True, impl=impl)
        torch.autograd.backward([out, lse], [inputs.dout, inputs.dlse])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_call_on_another_stream_gives_the_same(impl):
    q, k, v = qkv(2, 777, 777)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = attention(q, k, v, window=(123, 0), impl=impl)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, attention(q, k, v, window=(123, 0), impl=impl))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_call_on_another_device_than_the_current_one_gives_the_same(impl):
    inputs = qkv(2, 300, 300)
    out = attention(*(x.to("cuda:1") for x in inputs), is_causal=True, impl=impl)
    assert out.device == torch.device("cuda:1")
    torch.testing.assert_close(out.to(DEVICE), attention(*inputs, is_causal=True, impl=impl))


def test_a_cuda_graph_replays_with_new_values(impl):
    q, k, v = qkv(2, 300, 300)
    graph, out = captured(lambda: attention(q, k, v, is_causal=True, impl=impl))
    with torch.no_grad():
        q.mul_(0.5)
        v.add_(1.0)
    attention(*qkv(2, 500, 500), window=(9, 9), impl=impl)  # must find none of the graph's memory in a cache
    graph.replay()
    assert torch.equal(out, attention(q, k, v, is_causal=True, impl=impl))


def test_a_cuda_graph_replays_with_new_boundaries(impl):
    q, k, v = (x[0] for x in qkv(1, 300, 300))
    cu_seqlens = torch.tensor([0, 100, 300], dtype=torch.int32, device=DEVICE)
    options = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens, "is_causal": True, "impl": impl}
    graph, out = captured(lambda: attention(q, k, v, **options))
    cu_seqlens.copy_(torch.tensor([0, 250, 290], dtype=torch.int32))
    graph.replay()
    assert torch.equal(out, attention(q, k, v, **options))
    assert (out[290:] == 0).all()


def test_torch_compile_takes_a_call_whole(impl):
    def layer(q, k, v):
        return attention(torch.sin(q), k, v, window=(100, 0), impl=impl).square()

    inputs = qkv(2, 333, 333, requires_grad=ALL)
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        out = function(*inputs)
        results.append([out.detach(), *torch.autograd.grad(out.float().sum(), inputs)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_checkpointing_recomputes_the_same(impl):
    from torch.utils.checkpoint import checkpoint

    inputs = qkv(2, 333, 333, requires_grad=ALL)

    def layer(q, k, v):
        return attention(q, k, v, is_causal=True, impl=impl).float().square().sum()

    expected = torch.autograd.grad(layer(*inputs), inputs)
    got = torch.autograd.grad(checkpoint(layer, *inputs, use_reentrant=False), inputs)
    for x, y in zip(expected, got, strict=True):
        torch.testing.assert_close(x, y)


# ---- Choice and refusal ----------------------------------------------------------------------------------------------


def test_the_default_is_a_fused_kernel(monkeypatch):
    chosen = []
    for name in IMPLEMENTATIONS:
        implementation = IMPLEMENTATIONS[name]

        def run(call, name=name, implementation=implementation):
            chosen.append(name)
            return implementation.run(call)

        monkeypatch.setitem(IMPLEMENTATIONS, name, type(implementation)(implementation.refusal, run))
    # The fast path computes the call before an implementation is chosen.
    monkeypatch.setattr(direct, "enabled", False)
    attention(*qkv(2, 300, 300), is_causal=True)
    has_torchs = aten_flash.device_refusal(torch.device(DEVICE)) is None
    assert chosen == ["sm90" if gpu_support.sm90_missing() is None else "torch_flash" if has_torchs else "flex"]


@pytest.mark.parametrize(
    ("name", "dtype", "options", "reason"),
    [
        ("flex", torch.float64, {}, "dtype float64"),
        ("flex", torch.bfloat16, {"dropout_p": 0.1}, "dropout_p=0.1"),
        ("flex", torch.bfloat16, {"attn_mask": True}, "attn_mask is given"),
        ("torch_flash", torch.float32, {}, "dtype float32|compute capability"),
        ("sm90", torch.float32, {}, "sm90.so|dtype float32|not a Hopper GPU"),
        ("cpu", torch.bfloat16, {}, "expected cpu|was not built"),
        (None, torch.float64, {}, "no implementation computes this call"),
    ],
)
def test_an_explicit_implementation_computes_the_call_or_refuses(name, dtype, options, reason):
    q, k, v = qkv(2, 30, 30, dtype=dtype)
    if "attn_mask" in options:
        options = {"attn_mask": torch.ones(30, 30, dtype=torch.bool, device=DEVICE)}
    with pytest.raises(RuntimeError, match=reason):
        attention(q, k, v, impl=name, **options)


def test_boundaries_on_the_wrong_device_are_refused():
    q, k, v = (x[0] for x in qkv(1, 30, 30))
    cu_seqlens = torch.tensor([0, 30], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q: expected device cuda"):
        attention(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens)


def test_flex_without_torch_compile_raises():
    with torch.compiler.set_stance("force_eager"), pytest.raises(RuntimeError, match="is switched off here"):
        attention(*qkv(2, 30, 30), impl="flex")


def test_the_doctor_finds_nothing_wrong():
    report = importlib.import_module("flashmla_hf.doctor").examine()
    assert report["problems"] == []
    assert report["implementations"]["flex"]["available"]
    if gpu_support.sm90_missing() is None:
        assert report["implementations"]["sm90"]["available"]


def test_negative_controls_fail(impl):
    """The rule of this file must catch a wrong mask and a wrong scale."""
    case = DENSE[1]
    inputs = case.inputs(torch.bfloat16, DEVICE)
    assert visible_keys(case.seqlen_q, case.seqlen_kv, -1, 0) is not None
    for wrong in ({"is_causal": False}, {"scale": 0.12}, {"window": (900, 0)}):

        def broken(*, impl=impl, wrong=wrong, **arguments):
            return attention(**{**arguments, **wrong}, impl=impl)

        got = numerics.run(broken, case, inputs, wants=())
        yardstick, truth = numerics.run("eager", case, inputs), numerics.reference64(case, inputs)
        with pytest.raises(AssertionError, match="error"):
            numerics.assert_close_to_reference("out", got.out, yardstick.out, truth.out)
