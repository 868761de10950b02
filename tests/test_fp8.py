"""Numbers in fp8: rotation, scales, saturation, what is not finite; the emulation of the kernel; the error rule.

FLASHMLA_FP8_CASES=20000 FLASHMLA_FUZZ_SEED=1 python3 -m pytest tests/test_fp8.py -k random
"""

import math
import os
from dataclasses import replace

import forked_python
import fp8_cases
import pytest
import torch
from cases import CASES, Case, without_pairs
from cpu_support import DTYPES

from flashmla_hf import attention, reference
from flashmla_hf.fp8 import calls, quantization
from flashmla_hf.fp8.quantization import Quantized, quantize, quantize_tokens, rotate, rotation, round_to_e4m3, scale_of

RANDOM_CASES = int(os.environ.get("FLASHMLA_FP8_CASES", "400"))
SEED = int(os.environ.get("FLASHMLA_FUZZ_SEED", "0"))
IMPLEMENTATIONS = ("cpu", "reference")
each_impl = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def double(x: Quantized) -> torch.Tensor:
    return x.data.double() * x.row_scales().double()[..., None]


# ---- Rotation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8, 40, 64, 72, 80, 96, 128, 192, 256, 300])
def test_rotation_leaves_scores_unchanged(dim):
    a, b = rotation(dim, False), rotation(dim, True)
    assert torch.equal(a @ b.T, torch.eye(dim, dtype=torch.float64))
    assert set(a[a != 0].abs().frexp().mantissa.tolist()) == {0.5}  # powers of two alone
    q, k = normal(7, dim, dtype=torch.float64), normal(9, dim, seed=1, dtype=torch.float64)
    torch.testing.assert_close(rotate(q, False) @ rotate(k, True).T, q @ k.T, rtol=1e-12, atol=1e-12)


def test_rotation_is_the_same_everywhere_and_its_signs_are_mixed():
    """A kernel is to hold the same signs: the first 16 of π."""
    signs = rotation(16, False)[:, 0].sign()
    bits = [1.0 if c == "1" else -1.0 for c in f"{0x243F:016b}"]
    assert signs.tolist() == bits
    assert abs(rotation(128, False)[:, 0].sign().sum()) < 40


FIRST_CALLS = {
    "with fake tensors": "with FakeTensorMode() as mode: attention(*[mode.from_tensor(q)] * 3, precision='fp8')",
    "under the default device meta": "with torch.device('meta'): attention(q, q, q, precision='fp8')",
    "in inference mode": "with torch.inference_mode(): attention(q, q, q, precision='fp8')",
    "compiled": "torch.compile(lambda q: attention(q, q, q, precision='fp8'), fullgraph=True, backend='aot_eager')(q)",
    "exported": "torch.export.export(Fp8(), (q,), strict=False)",
}


@pytest.mark.parametrize("name", FIRST_CALLS)
def test_a_first_call_leaves_nothing_that_a_later_one_cannot_use(name):
    forked_python.run_program(f"""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from flashmla_hf import attention
class Fp8(torch.nn.Module):
    def forward(self, q):
        return attention(q, q, q, precision='fp8')
q = torch.randn(1, 9, 2, 16)
{FIRST_CALLS[name]}
weight = torch.nn.Parameter(q.clone())
for impl in ("cpu", "reference"):
    out = attention(weight, q, q, precision="fp8", impl=impl)
    out.sum().backward()
    assert (out - attention(q, q, q)).abs().max() < 0.3
with FakeTensorMode() as mode:
    assert attention(*[mode.from_tensor(q)] * 3, precision="fp8").shape == q.shape
""")


def test_rotation_spreads_an_outlier():
    x = torch.zeros(1, 128)
    x[0, 5] = 100.0
    assert set(rotate(x, False).abs().flatten().tolist()) == {100.0 / 16}
    assert set(rotate(x, True).abs().flatten().tolist()) == {100.0 / 8}


# ---- Scales ----------------------------------------------------------------------------------------------------------


def test_a_scale_is_the_smallest_power_of_two_that_fits():
    amax = torch.cat(
        [torch.logspace(-37, 38, 5001, dtype=torch.float64), torch.tensor([448.0, 449.0, 224.0, 1.75 * 2.0**-100])]
    )
    for dtype in (torch.float64, torch.float32):
        x = amax.to(dtype)
        scale = scale_of(x).double()
        assert (scale.frexp().mantissa == 0.5).all()
        assert (x.double() <= 448.0 * scale).all()
        assert (x.double() > 224.0 * scale)[scale > 2.0**-126].all()
    assert scale_of(torch.zeros(1)).item() == 2.0**-126
    assert scale_of(torch.tensor([448.0])).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_quantising_is_exact_in_bf16_and_a_second_time(dtype):
    x = normal(2, 300, 3, 40, dtype=dtype)
    x8 = quantize(x)
    assert x8.data.dtype == torch.float8_e4m3fn
    assert x8.scales.shape == (2, 3, 3)
    assert x8.scales.dtype == torch.float32
    values = x8.dequantize()
    assert torch.equal(values.bfloat16().float(), values)
    assert torch.equal(values.double(), double(x8))
    assert torch.equal(quantize(values).dequantize(), values)
    relative = ((values - x.float()) / x.float()).abs()
    assert relative[x.float().abs() > x8.row_scales()[..., None] * 2**-6].max() <= 1 / 16
    assert 0.02 < relative.pow(2).mean().sqrt() < 0.035


def test_a_block_is_128_rows_of_one_head():
    x = normal(2, 300, 3, 16)
    x[1, 130, 2] *= 1000.0
    plain, large = quantize(normal(2, 300, 3, 16)), quantize(x)
    changed = (plain.scales != large.scales).nonzero().tolist()
    assert changed == [[1, 2, 1]]
    assert quantize(x, block_rows=None).scales.shape == (2, 3, 1)
    exact = quantize(x, power_of_two=False)
    assert torch.equal(exact.scales[0, 0, 0], x[0, :128, 0].abs().max() / 448.0)


def test_packed_blocks_begin_with_their_sequence():
    lengths = (70, 0, 1, 300, 128, 5)
    bounds = torch.tensor([sum(lengths[:n]) for n in range(len(lengths) + 1)], dtype=torch.int32)
    x = normal(sum(lengths) + 9, 2, 24)
    packed = quantize(x, bounds)
    values = packed.dequantize()
    for a, b in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        if a < b:
            assert torch.equal(values[a:b], quantize(x[None, a:b]).dequantize()[0])
    # A number is of one block: it never falls, and a sequence's first row begins one.
    assert (packed.block.diff() >= 0).all()
    for b, start in enumerate(bounds.tolist()):
        if b == len(lengths) or lengths[b]:
            assert packed.block[start].item() == start // 128 + b
            assert start == 0 or packed.block[start] != packed.block[start - 1]
    assert packed.block.max() < packed.scales.shape[-1] == x.shape[0] // 128 + len(lengths) + 1


def test_a_finite_value_never_becomes_nan():
    x = torch.cat([torch.logspace(-45, 38, 4000, dtype=torch.float64).float(), torch.tensor([3.3e38, 1e-45, 0.0])])
    x = torch.cat([x, -x])[torch.randperm(2 * x.numel(), generator=torch.Generator().manual_seed(0))][
        None, :, None, None
    ]
    assert x.isfinite().all()
    for x8 in (quantize(x), quantize(x, block_rows=None), quantize(x, power_of_two=False)):
        assert not x8.data.float().isnan().any()
        assert x8.scales.isfinite().all()
    assert round_to_e4m3(torch.tensor([449.0, 1e30, -500.0]), 1.0).tolist() == [448.0, 448.0, -448.0]
    assert not quantize_tokens(x)[0].float().isnan().any()


def test_what_is_not_finite_becomes_nan_alone():
    x = normal(1, 200, 1, 8)
    bad = x.clone()
    for row, value in ((3, math.nan), (77, math.inf), (150, -math.inf)):
        bad[0, row, 0, 5] = value
    good, got = quantize(x.masked_fill(~bad.isfinite(), 0.0)), quantize(bad)
    assert torch.equal(got.scales, good.scales)
    assert torch.equal(got.data.float().isnan(), ~bad.isfinite())
    where = bad.isfinite()
    assert torch.equal(got.dequantize()[where], good.dequantize()[where])
    data, scale = quantize_tokens(bad)
    assert torch.equal(data.float().isnan(), ~bad.isfinite())
    assert scale.isfinite().all()


# ---- The emulation ---------------------------------------------------------------------------------------------------


def kernel_row(q8, q_scale, k8, k_scale, v8, v_scale, seen, scale, softcap, sink):
    """One row as the kernel computes it, one number at a time: q8 [dim], k8 [keys, dim], v8 [keys, dim_v], scales of rows."""
    log2_e, m, total, out = math.log2(math.e), -math.inf, 0.0, [0.0] * v8.shape[1]
    for start in reversed(range(0, k8.shape[0], 128)):
        tile = range(start, min(start + 128, k8.shape[0]))
        t = []
        for j in tile:
            s = sum(a * b for a, b in zip(q8.tolist(), k8[j].tolist(), strict=True)) * q_scale * k_scale[start] * scale
            s = softcap * math.tanh(s / softcap) if softcap else s
            t.append(s * log2_e if seen[j] else -math.inf)
        new_m = max(m, *t)
        if new_m == -math.inf:
            continue
        a = 2.0 ** (m - new_m) if m > -math.inf else 0.0
        p = [2.0 ** (x - new_m + 8) if x > -math.inf else 0.0 for x in t]
        p8 = torch.tensor(p).to(torch.float8_e4m3fn).tolist()
        total = a * total + sum(p)
        for c in range(v8.shape[1]):
            product = sum(x * v8[j, c].item() for x, j in zip(p8, tile, strict=True))
            out[c] = a * out[c] + v_scale[start] * product
        m = new_m
    if sink is not None:
        total += 2.0 ** (sink * log2_e - m + 8)
    return [x / total for x in out]


@pytest.mark.parametrize("has_all", [False, True])
def test_the_emulation_is_the_kernel_s_loop(has_all):
    """Tiles of 128 keys from the last, against the running maximum, written once more without a tensor operation."""
    q, k, v = normal(1, 4, 2, 8, seed=1) * 2, normal(1, 300, 1, 8, seed=2) * 2, normal(1, 300, 1, 6, seed=3)
    v[:, 128:256] *= 50.0  # scales of tiles differ
    sinks = normal(2, seed=4) if has_all else None
    softcap, window, scale = (3.0, (200, 0), -0.4) if has_all else (0.0, None, 8**-0.5)
    got = attention(
        q, k, v, precision="fp8", impl="reference", scale=scale, softcap=softcap, window=window, sinks=sinks, is_causal=has_all
    )  # fmt: skip
    q8, k8, v8 = quantize(rotate(q, False)), quantize(rotate(k, True)), quantize(v)
    visible = reference.visible_keys(4, 300, 200, 0) if has_all else torch.ones(4, 300, dtype=torch.bool)
    for head in range(2):
        for row in range(4):
            expected = kernel_row(
                q8.data[0, row, head].float(), q8.row_scales()[0, row, head].item(), k8.data[0, :, 0].float(),
                k8.row_scales()[0, :, 0].tolist(), v8.data[0, :, 0].float(), v8.row_scales()[0, :, 0].tolist(),
                visible[row].tolist(), scale, softcap, None if sinks is None else sinks[head].item(),
            )  # fmt: skip
            torch.testing.assert_close(got[0, row, head], torch.tensor(expected), rtol=1e-6, atol=1e-6)
    exact = attention(
        q, k, v, precision="fp8", scale=scale, softcap=softcap, window=window, sinks=sinks, is_causal=has_all
    )
    assert 1e-5 < (got - exact).abs().max() < 0.1 * exact.abs().max()  # P is rounded in one of them


# ---- The rule --------------------------------------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("case", CASES + without_pairs(), ids=lambda case: case.name or "without pairs")
def test_named_calls_keep_the_error_rule(impl, case):
    fp8_cases.check(impl, case, torch.bfloat16)


def test_random_calls_keep_the_error_rule():
    failures, before = [], replace(fp8_cases.looks)
    for n, (case, seed) in enumerate(fp8_cases.random_cases(RANDOM_CASES, SEED)):
        impl, dtype = IMPLEMENTATIONS[n % 2], DTYPES[n % len(DTYPES)]
        try:
            fp8_cases.check(impl, case, dtype, seed)
        except (AssertionError, RuntimeError) as error:
            failures.append(f"fp8_cases.check({impl!r}, {case!r}, {dtype}, {seed}): {str(error).splitlines()[0]}")
    assert not failures, f"{len(failures)} calls of {RANDOM_CASES} break the rule:\n" + "\n".join(failures[:12])
    assert fp8_cases.looks.calls - before.calls == RANDOM_CASES
    assert fp8_cases.looks.second - before.second <= 0.25 * RANDOM_CASES


def _one_scale_for_k(**arguments):
    """K quantised with one scale that is far too large: its small values vanish."""
    k = arguments.pop("k")
    return attention(k=(k * 2**-9).to(torch.float8_e4m3fn).to(k.dtype) * 2**9, **arguments)


WRONG = {
    "k without its low bits": _one_scale_for_k,
    "q rotated, k not": lambda **a: attention(**a | {"q": rotate(a["q"], False).to(a["q"].dtype)}),
    "the window one key too wide": lambda *, window=None, **a: attention(window=(8, None), **a),
    "gradient of v forgotten": lambda **a: attention(**a | {"v": a["v"].detach() + 0 * a["v"]}),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_rule_finds_what_is_wrong(name):
    case = Case(seqlen_q=150, heads_q=4, heads_kv=2, window=(7, None) if "window" in name else None)
    with pytest.raises(AssertionError, match="error"):
        fp8_cases.check(WRONG[name], case, torch.float32)


@each_impl
def test_outliers_are_what_rotation_and_blocks_are_for(impl):
    """0.1 % of entries with a variance of 100: at most 0.6 of the error of fp8 without rotation (docs/fp8.md has the table)."""
    q, k, v = (normal(1, 1024, 4, 128, seed=n) for n in range(3))
    for n, x in enumerate((q, k, v)):
        generator = torch.Generator().manual_seed(10 + n)
        x += 10.0 * torch.randn(x.shape, generator=generator) * (torch.rand(x.shape, generator=generator) < 0.001)
    truth = attention(q.double(), k.double(), v.double(), impl="reference")
    ours = attention(q, k, v, precision="fp8", impl=impl).double()
    plain, _ = fp8_cases.straightforward(q, k, v)
    error, plain_error = ((x - truth).pow(2).mean().sqrt().item() for x in (ours, plain.double()))
    assert error <= 9.1e-3
    assert error <= 0.75 * plain_error


# ---- What is not finite ----------------------------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_is_seen_by_the_rows_that_see_it_alone(impl, value, name):
    tensors = {"q": normal(1, 200, 2, 16), "k": normal(1, 200, 2, 16, seed=1), "v": normal(1, 200, 2, 16, seed=2)}
    good = attention(**tensors, is_causal=True, precision="fp8", impl=impl)
    tensors[name][0, 130, 1, 3] = value
    bad = attention(**tensors, is_causal=True, precision="fp8", impl=impl)
    rows = torch.zeros(200, dtype=torch.bool)
    rows[130 if name == "q" else slice(130, None)] = True
    if name == "q":
        rows[131:] = False
    poisoned = bad.isnan().any(-1)[0]  # [seqlen, heads]
    assert torch.equal(poisoned[:, 1], rows)
    assert not poisoned[:, 0].any()
    assert torch.equal(bad[0, :, 0], good[0, :, 0])
    # The scale of the block may have changed by the entry that is gone, no more.
    assert (bad[0, :130, 1] - good[0, :130, 1]).abs().max() < 0.2


@each_impl
def test_sequences_do_not_see_each_other(impl):
    bounds = torch.tensor([0, 100, 200], dtype=torch.int32)
    q, k, v = (normal(210, 2, 32, seed=n) for n in range(3))
    options = {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds, "precision": "fp8", "impl": impl}
    good = attention(q, k, v, **options)
    for x in (q, k, v):
        x[100:] = math.nan
        x[150:] = 1e30
    assert torch.equal(attention(q, k, v, **options)[:100], good[:100])


# ---- Gradients -------------------------------------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("case", [
    Case(seqlen_q=140, seqlen_kv=150, heads_q=4, heads_kv=2, head_dim_qk=12, head_dim_v=8, is_causal=True, has_sinks=True),
    Case(seqlens_q=(5, 130, 0, 9), seqlens_kv=(7, 140, 3, 9), rest_q=2, heads_q=2, head_dim_qk=8, window=(40, 3), softcap=2.0),
], ids=["dense", "packed"])  # fmt: skip
def test_gradients_are_the_finite_differences_of_what_calls_py_says(impl, case):
    """attention(r(q) + e_q, r(k) + e_k, v + e_v) with constant errors e, in float64, by central differences along random directions."""
    inputs = case.inputs(torch.float32)
    dout, dlse = inputs.dout.double(), inputs.dlse.double()
    names = [name for name in ("q", "k", "v", "sinks") if getattr(inputs, name) is not None]
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in names}
    bounds = {"cu_seqlens_q": inputs.cu_seqlens_q, "cu_seqlens_kv": inputs.cu_seqlens_kv}
    out, lse = attention(**leaves, **bounds, **case.options, return_lse=True, precision="fp8", impl=impl)
    seen = lse > -math.inf
    loss = (out * inputs.dout).sum() + (lse[seen] * inputs.dlse[seen]).sum()
    gradients = dict(zip(names, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    rotations = {"q": lambda x: rotate(x, False), "k": lambda x: rotate(x, True), "v": lambda x: x}
    values = {name: getattr(inputs, name) for name in names}
    errors = {
        name: double(quantize(r(values[name]), bounds["cu_seqlens_q" if name == "q" else "cu_seqlens_kv"]))
        - r(values[name].double())
        for name, r in rotations.items()
    }

    def surrogate(**moved):
        tensors = {name: r(moved[name]) + errors[name] for name, r in rotations.items()}
        out, lse = attention(
            **tensors, sinks=moved.get("sinks"), **bounds, **case.options, return_lse=True, impl="reference"
        )
        return ((out * dout).sum() + (lse[seen] * dlse[seen]).sum()).item()

    wide = {name: x.detach().double() for name, x in values.items()}
    step = 1e-4
    for name in names:
        direction = normal(*wide[name].shape, seed=5, dtype=torch.float64)
        ahead, behind = (surrogate(**wide | {name: wide[name] + s * step * direction}) for s in (1, -1))
        expected = (ahead - behind) / (2 * step)
        got = (gradients[name].double() * direction).sum().item()
        assert got == pytest.approx(expected, rel=2e-4, abs=2e-4), name
        assert gradients[name].dtype == values[name].dtype


def test_gradients_have_the_dtype_of_the_inputs_and_a_fixed_value():
    q, k, v = (normal(1, 70, 2, 32, seed=n, dtype=torch.bfloat16).requires_grad_() for n in range(3))
    first, second = (
        torch.autograd.grad(attention(q, k, v, precision="fp8", is_causal=True).float().square().sum(), (q, k, v)) for _ in range(2)
    )  # fmt: skip
    for a, b in zip(first, second, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


def test_the_whole_goes_through_torch_compile():
    q, k, v = (normal(1, 150, 2, 32, seed=n).requires_grad_() for n in range(3))

    def loss(q, k, v):
        return attention(q, k, v, precision="fp8", is_causal=True).square().sum()

    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(q, k, v), (q, k, v))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_autocast_changes_nothing():
    q, k, v = (normal(1, 150, 2, 32, seed=n) for n in range(3))
    for impl in IMPLEMENTATIONS:
        expected = attention(q, k, v, precision="fp8", impl=impl)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(attention(q, k, v, precision="fp8", impl=impl), expected)


def test_the_tile_of_the_emulation_is_a_block():
    assert quantization.BLOCK_ROWS == 128
    assert set(calls.IMPLEMENTATIONS) == {"sm90", *IMPLEMENTATIONS}
