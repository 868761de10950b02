"""The fp8 kernel of Hopper: against the emulation that says what it computes, and against float64 by the rule of fp8_cases.

    FLASHMLA_FP8_KERNEL_CASES=20000 FLASHMLA_FUZZ_SEED=1 python3 -m pytest tests/test_sm90_fp8.py -k random

Its Python and what is refused are in tests/test_fp8_kernel.py, which needs no GPU.
"""

import math
import os
import random

import fp8_cases
import gpu_support
import pytest
import torch
from cases import Case

from flashmla_hf import attention
from flashmla_hf.fp8.quantization import BLOCK_ROWS, quantize, rotate

pytestmark = [gpu_support.needs_sm90, gpu_support.on_gpu]
RANDOM_CASES = int(os.environ.get("FLASHMLA_FP8_KERNEL_CASES", "1200"))
SEED = int(os.environ.get("FLASHMLA_FUZZ_SEED", "0"))
half = gpu_support.half


def normal(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def fp8(q, k, v, impl=None, **options):
    return attention(q, k, v, precision="fp8", return_lse=True, impl=impl, **options)


def rms(x):
    return x.double().pow(2).mean().sqrt().item()


# ---- The numbers that are multiplied ---------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda x: x, "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
}  # fmt: skip


@half
@pytest.mark.parametrize("dim", [8, 16, 24, 40, 56, 64, 72, 80, 96, 104, 120, 128, 136, 160, 192, 248, 256])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_quantising_is_that_of_quantization_py(dtype, dim, layout):
    """Bit for bit. Small whole numbers, so that no sum of a rotation is rounded, whatever its order."""
    generator = torch.Generator("cuda").manual_seed(dim)
    q, k, v = (
        LAYOUTS[layout](torch.randint(-8, 9, (2, 300, heads, dim), generator=generator, device="cuda").to(dtype))
        for heads in (4, 2, 2)
    )
    for x in (q, k, v):
        x[1, 130:140] *= 16  # scales of blocks differ
    got = torch.ops.flashmla.flash_attn_fp8_round(q, k, v, None, None)
    for name, x, like in zip("qkv", got, (rotate(q, False), rotate(k, True), v), strict=True):
        assert torch.equal(x, quantize(like).dequantize(torch.bfloat16)), name


@half
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_quantising_packed_sequences_is_that_of_quantization_py(dtype, dim):
    lengths = (70, 0, 1, 300, 128, 5, 129)
    bounds = gpu_support.cu(0, *torch.tensor(lengths).cumsum(0).tolist())
    q, k, v = (torch.randint(-8, 9, (sum(lengths) + 9, heads, dim), device="cuda").to(dtype) for heads in (4, 2, 2))
    for x in (q, k, v):
        x[::50] *= 8
    got = torch.ops.flashmla.flash_attn_fp8_round(q, k, v, bounds, bounds)
    for name, x, like in zip("qkv", got, (rotate(q, False), rotate(k, True), v), strict=True):
        assert torch.equal(x, quantize(like, bounds).dequantize(torch.bfloat16)), name


@half
def test_other_sums_of_a_rotation_move_few_numbers_by_one_step(dtype):
    q, k, v = (
        normal(1, 1000, 4, 128, dtype=dtype),
        normal(1, 1000, 2, 96, dtype=dtype),
        normal(1, 1000, 2, 96, dtype=dtype),
    )
    for x, is_key in ((q, False), (k, True)):
        got = torch.ops.flashmla.flash_attn_fp8_round(
            *((x, x, x) if is_key is False else (k, k, v)), None, None
        )[int(is_key)].double()  # fmt: skip
        want = quantize(rotate(x, is_key)).dequantize(torch.float64)
        moved = got != want
        assert moved.double().mean() < 1e-3
        assert ((got - want).abs() <= want.abs() / 7 + 2.0**-6)[moved].all()


# ---- Results ---------------------------------------------------------------------------------------------------------


def test_random_calls_keep_the_rule():
    """Output, lse and gradients, against float64: twice the error of what anybody would write first, plus a floor."""
    failures = []
    for dtype in gpu_support.HALF:
        for case, seed in fp8_cases.kernel_cases(RANDOM_CASES // 2, SEED):
            try:
                fp8_cases.check(fp8_cases.on_gpu, case, dtype, seed, gradients=torch.bfloat16)
            except (AssertionError, RuntimeError) as error:
                failures.append(f"{dtype} {seed} {str(error)[:600]}")
    assert not failures, f"{len(failures)} calls break the rule:\n" + "\n".join(failures[:12])


def shapes():
    """Longer than the CPU's: many blocks, windows that begin anywhere, warpgroups that see other blocks than each other."""
    source = random.Random(SEED)
    for n in range(120):
        window = source.choice([None, None, (source.randint(0, 700), source.choice([0, None, 50]))])
        shape = {
            "heads_q": source.choice([1, 2, 4, 6, 8, 12]), "head_dim_qk": 8 * source.randint(1, 32),
            "head_dim_v": 8 * source.randint(1, 32), "is_causal": source.random() < 0.5, "window": window,
            "softcap": source.choice([0.0, 0.0, 20.0]), "has_sinks": source.random() < 0.3,
            "scale": source.choice([None, None, None, -0.05, 0.0]),
        }  # fmt: skip
        shape["heads_kv"] = source.choice([h for h in (1, 2, 3, 4, 6) if shape["heads_q"] % h == 0])
        if n % 3 == 0:
            lengths = [tuple(source.choice([0, 1, source.randint(1, 700)]) for _ in range(4)) for _ in range(2)]
            yield Case(seqlens_q=lengths[0], seqlens_kv=lengths[source.randint(0, 1)], rest_q=3, rest_kv=2, **shape)
        else:
            yield Case(
                batch=source.choice([1, 3]),
                seqlen_q=source.randint(1, 1500),
                seqlen_kv=source.randint(1, 1500),
                **shape,
            )


@half
def test_the_kernel_computes_what_the_emulation_says(dtype):
    """The same roundings of the same numbers: it differs where a number lies beside a boundary, by far less than fp8 errs."""
    failures = []
    for n, case in enumerate(shapes()):
        inputs = case.inputs(dtype, device="cuda", seed=n)
        tensors = {name: getattr(inputs, name) for name in ("q", "k", "v", "sinks", "cu_seqlens_q", "cu_seqlens_kv")}
        (out, lse), (want, want_lse) = (fp8(**tensors, **case.options, impl=impl) for impl in (None, "reference"))
        exact = attention(**{name: x.double() if x is not None and x.is_floating_point() else x for name, x in tensors.items()},
                          **case.options, impl="reference")  # fmt: skip
        finite = want_lse.isfinite()
        off = rms(out.double() - want.double()), rms(want.double() - exact)
        lse_off = (lse - want_lse)[finite].abs().max().item() if finite.any() else 0.0
        if not (
            torch.equal(lse.isfinite(), finite)
            and off[0] <= 0.35 * off[1] + 4 * torch.finfo(dtype).eps * (rms(exact) + 1e-6)
            and lse_off <= 0.02
        ):
            failures.append(f"{n} {case}: {off[0]:.2e} beside fp8's {off[1]:.2e}, lse {lse_off:.2e}")
    assert not failures, f"{len(failures)} calls differ:\n" + "\n".join(failures[:12])


WINDOWS = [
    (0, 0),
    (1, 0),
    (63, 0),
    (64, 0),
    (127, 0),
    (128, 0),
    (129, 0),
    (300, 0),
    (300, 50),
    (50, 300),
    (5, None),
    (None, 70),
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_windows_of_every_alignment(window, dim):
    """Blocks before and behind a warpgroup's own are passed by: one too few, and the rings are out of step."""
    for seqlen_q, seqlen_kv, heads in (
        (1000, 1000, (4, 1)),
        (300, 1100, (2, 2)),
        (1100, 300, (3, 1)),
        (129, 640, (8, 1)),
    ):
        q, k, v = normal(2, seqlen_q, heads[0], dim), *(normal(2, seqlen_kv, heads[1], dim, seed=n) for n in (1, 2))
        (out, lse), (want, want_lse) = (fp8(q, k, v, impl, window=window) for impl in (None, "reference"))
        assert torch.equal(lse.isfinite(), want_lse.isfinite())
        assert (lse - want_lse)[lse.isfinite()].abs().max() < 0.01
        assert rms(out.double() - want.double()) < 0.01 * max(rms(want), 0.1)


@half
def test_zeros_are_zeros_and_hide_nothing(dtype):
    """The scales of zeros are so small that their product is 0; a hidden score must stay -inf."""
    for zero in ("q", "k", "qk", "v", "qkv"):
        q, k, v = (
            torch.zeros(1, 300, 2, 64, dtype=dtype, device="cuda")
            if name in zero
            else normal(1, 300, 2, 64, seed=n, dtype=dtype)
            for n, name in enumerate("qkv")
        )
        out, lse = fp8(q, k, v, is_causal=True)
        want, want_lse = fp8(q, k, v, "reference", is_causal=True)
        assert out.isfinite().all(), zero
        torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-3)
        assert rms(out.double() - want.double()) < 0.02 * max(rms(want), 0.01), zero


@pytest.mark.parametrize("seqlen", [1024, 4096])
def test_outliers_err_by_no_more_than_is_published(seqlen):
    """FlashAttention 3's test: 0.1 % of entries with a variance of 100; 9.1e-3, in two digits, with rotation and blocks."""
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, seqlen, 8, 128, generator=generator, device="cuda") for _ in range(3))
    for x in (q, k, v):
        is_outlier = torch.rand(x.shape, generator=generator, device="cuda") < 0.001
        x += 10.0 * torch.randn(x.shape, generator=generator, device="cuda") * is_outlier
    q, k, v = (x.bfloat16() for x in (q, k, v))
    exact, _ = attention(q.double(), k.double(), v.double(), impl="reference", return_lse=True)
    assert rms(fp8(q, k, v)[0].double() - exact) < 9.15e-3


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sums_of_many_keys_lose_little(dim, is_causal):
    """Products of fp8 have about 14 bits, and each that joins a sum costs it some: over 1,024 keys values of one sign lost
    0.5 %. Rounding P costs 0.06 %, and rounding to bf16 up to 0.2 % of a number."""
    q, k = normal(1, 16384, 2, dim), normal(1, 16384, 1, dim, seed=1)
    v = torch.ones(1, 16384, 1, dim, dtype=torch.bfloat16, device="cuda")
    out, _ = fp8(q, k, v, is_causal=is_causal)
    assert abs(out[0, 4096:].double().mean().item() - 1.0) < 4e-3


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("order", ["rising", "falling", "mixed"])
def test_blocks_of_values_of_any_size(order, is_causal, dim):
    """The unit of O is the largest scale so far: it grows while blocks are read, or blocks are smaller than it."""
    q, k, v = (normal(1, 3000, heads, dim, seed=n) for n, heads in enumerate((4, 2, 2)))
    block = torch.arange(3000, device="cuda") // BLOCK_ROWS
    exponent = {"rising": -3 * block, "falling": 3 * block, "mixed": block * 7 % 5 * 10 - 20}[order]
    v = (v * torch.exp2(exponent.clamp(-60, 60))[None, :, None, None]).bfloat16()
    (out, lse), (want, want_lse) = (fp8(q, k, v, impl, is_causal=is_causal) for impl in (None, "reference"))
    torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-2)
    size = want.double().pow(2).mean((0, 2, 3), keepdim=True).sqrt()  # of each row's outputs
    assert rms((out.double() - want.double()) / size) < 0.03


# ---- Tensors that are fp8 --------------------------------------------------------------------------------------------


def e4m3(*shape, seed=0):
    return normal(*shape, seed=seed).float().to(torch.float8_e4m3fn)


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (200, 0)}, {"softcap": 10.0}], ids=str)
@pytest.mark.parametrize("is_packed", [False, True])
def test_tensors_that_are_fp8(dim, options, is_packed):
    sequences = 3
    lead = (700,) if is_packed else (sequences, 700)
    tensors = [e4m3(*lead, heads, dim, seed=n) for n, heads in enumerate((6, 2, 2))]
    factors = {f"{x}_descale": normal(sequences, 2, seed=n + 7, dtype=torch.float32) for n, x in enumerate("qkv")}
    if is_packed:
        bounds = gpu_support.cu(0, 300, 301, 690)
        options = options | {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds}
    (out, lse), (want, want_lse) = (
        attention(*tensors, **factors, **options, impl=impl, return_lse=True) for impl in (None, "reference")
    )
    assert out.dtype == torch.bfloat16
    seen = want_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    torch.testing.assert_close(lse[seen], want_lse[seen], rtol=1e-2, atol=1e-2)
    assert rms(out.double() - want.double()) < 0.02 * rms(want)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_factors_that_are_not_finite_are_seen_in_their_head_alone(name):
    tensors = [e4m3(2, 300, heads, 64, seed=n) for n, heads in enumerate((4, 2, 2))]
    factors = {f"{x}_descale": torch.ones(2, 2, device="cuda") for x in "qkv"}
    good = attention(*tensors, **factors)
    factors[f"{name}_descale"][1, 0] = math.nan
    out = attention(*tensors, **factors)
    assert out[1, :, :2].isnan().all()
    assert torch.equal(out[0], good[0])
    assert torch.equal(out[1, :, 2:], good[1, :, 2:])


def test_strided_fp8_tensors_and_zero_factors():
    tensors = [e4m3(2, 2 * heads, 300, 64, seed=n)[:, ::2].transpose(1, 2) for n, heads in enumerate((4, 2, 2))]
    factors = {f"{x}_descale": torch.full((2, 2), 0.5, device="cuda") for x in "qkv"}
    out = attention(*tensors, **factors)
    assert torch.equal(out, attention(*(x.clone(memory_format=torch.contiguous_format) for x in tensors), **factors))
    factors["v_descale"][0] = 0.0
    assert not attention(*tensors, **factors)[0].any()


def test_large_values_saturate_and_never_become_nan():
    for magnitude in (1e-30, 1e-4, 1e4, 1e15):
        q, k, v = (
            normal(1, 300, 2, 64) / magnitude,
            normal(1, 300, 2, 64, seed=1) * magnitude,
            normal(1, 300, 2, 64, seed=2) * magnitude,
        )
        out, lse = fp8(q, k, v)
        want, want_lse = fp8(q, k, v, "reference")
        assert out.isfinite().all()
        torch.testing.assert_close(lse, want_lse, rtol=1e-2, atol=1e-2)
        assert rms(out.double() / magnitude - want.double() / magnitude) < 0.02 * rms(want.double() / magnitude)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_is_seen(value, name):
    """By the rows that see it, and of a value by no others than the 64 of a warpgroup that sees a key of its 128."""
    tensors = {"q": normal(1, 400, 2, 64), "k": normal(1, 400, 2, 64, seed=1), "v": normal(1, 400, 2, 64, seed=2)}
    tensors[name][0, 300, 1, 3] = value
    out, _ = fp8(**tensors, is_causal=True)
    poisoned = out.isnan().any(-1)[0]
    assert poisoned[300 if name == "q" else slice(300, None), 1].all()
    assert not poisoned[:, 0].any()
    hidden = {"q": slice(301, None), "k": slice(0, 300), "v": slice(0, 256 - 63)}[name]
    assert not poisoned[hidden, 1].any(), poisoned[:, 1].nonzero().flatten().tolist()


def test_sequences_do_not_see_each_other():
    q, k, v = (normal(210, 2, 64, seed=n) for n in range(3))
    bounds = gpu_support.cu(0, 100, 200)
    options = {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "is_causal": True}
    good, good_lse = fp8(q, k, v, **options)
    for x in (q, k, v):
        x[100:] = math.nan
    out, lse = fp8(q, k, v, **options)
    assert torch.equal(out[:100], good[:100])
    assert torch.equal(lse[:, :100], good_lse[:, :100])


@half
def test_packed_sequences_have_the_bits_of_each_alone(dtype):
    lengths = (70, 1, 300, 128, 5)
    bounds = gpu_support.cu(0, *torch.tensor(lengths).cumsum(0).tolist())
    q, k, v = (normal(sum(lengths), heads, 64, seed=n, dtype=dtype) for n, heads in enumerate((4, 2, 2)))
    out, _ = fp8(q, k, v, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, is_causal=True)
    for a, b in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        alone, _ = fp8(*(x[None, a:b] for x in (q, k, v)), is_causal=True)
        # Tiles of queries begin elsewhere; the numbers and their order are the same.
        torch.testing.assert_close(out[a:b], alone[0], rtol=1e-2, atol=1e-2)


# ---- Bits, graphs, streams -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_repeats_have_the_same_bits(dim):
    q, k, v = normal(2, 3000, 8, dim), normal(2, 3000, 2, dim, seed=1), normal(2, 3000, 2, dim, seed=2)
    for options in ({}, {"is_causal": True}, {"window": (500, 0)}):
        first, first_lse = fp8(q, k, v, **options)
        for _ in range(50):
            out, lse = fp8(q, k, v, **options)
            assert torch.equal(out, first)
            assert torch.equal(lse, first_lse)


def test_a_cuda_graph_follows_values_and_boundaries():
    q, k, v = (normal(600, heads, 64, seed=n) for n, heads in enumerate((4, 2, 2)))
    bounds = gpu_support.cu(0, 100, 600)
    graph, (out, lse) = gpu_support.captured(
        lambda: fp8(q, k, v, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, is_causal=True)
    )
    for seed, ends in ((5, (0, 300, 600)), (6, (0, 1, 599)), (7, (0, 0, 600))):
        q.copy_(normal(600, 4, 64, seed=seed))
        bounds.copy_(gpu_support.cu(*ends))
        graph.replay()
        want, want_lse = fp8(q, k, v, cu_seqlens_q=bounds, cu_seqlens_kv=bounds, is_causal=True)
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)


def test_a_call_waits_for_nothing_and_runs_on_the_current_stream():
    q, k, v = (normal(1, 500, 4, 64, seed=n) for n in range(3))
    expected, _ = fp8(q, k, v)
    later = torch.zeros_like(q)
    got, _ = gpu_support.run_behind_other_work(lambda: later.copy_(q), lambda: fp8(later, k, v))
    assert torch.equal(got, expected)


# ---- Gradients -------------------------------------------------------------------------------------------------------


@half
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"window": (200, 0)}, {"softcap": 10.0}], ids=str)
def test_gradients_are_those_that_calls_py_says(dtype, options):
    """The reference's: exact attention at the rounded values, in float64. The kernel's own sums are in bf16 and fp32."""
    case = Case(
        seqlen_q=700, seqlen_kv=900, heads_q=4, heads_kv=2, head_dim_qk=96, head_dim_v=64, has_sinks=True, **options
    )
    inputs = case.inputs(dtype, device="cuda")
    gradients = []
    for impl in (None, "reference"):
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.sinks)]
        out, lse = fp8(*leaves[:3], impl, sinks=leaves[3], **case.options)
        seen = lse.isfinite()
        loss = (out * inputs.dout).sum() + (lse[seen] * inputs.dlse[seen]).sum()
        gradients.append(torch.autograd.grad(loss, leaves))
    for name, got, want in zip(("q", "k", "v", "sinks"), *gradients, strict=True):
        assert got.dtype == want.dtype
        # Of sinks there are four numbers, sums of what cancels.
        assert rms(got.double() - want.double()) <= (0.06 if name == "sinks" else 0.03) * rms(want), name


def test_long_sequences():
    """16k tokens, a sample of rows against float64."""
    q, k, v = normal(1, 16384, 2, 128), normal(1, 16384, 1, 128, seed=1), normal(1, 16384, 1, 128, seed=2)
    out, lse = fp8(q, k, v)
    rows = torch.arange(0, 16384, 997, device="cuda")
    exact, exact_lse = gpu_support.exact(q[:, rows], k, v, 128**-0.5)
    assert rms(out[:, rows].double() - exact) < 0.06 * rms(exact)
    assert (lse[:, :, rows] - exact_lse).abs().max() < 0.02


def test_it_goes_through_torch_compile():
    leaves = [normal(1, 500, heads, 64, seed=n).requires_grad_() for n, heads in enumerate((4, 2, 2))]

    def loss(q, k, v):
        return attention(q, k, v, precision="fp8", is_causal=True).float().square().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves), leaves)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)  # dQ is summed in another order
