"""The Python around the fp8 kernel, without a GPU: its operators are stood in for by the emulation, on the CPU.

tests/test_sm90_fp8.py holds the kernel itself.
"""

import math
import re

import fp8_cases
import pytest
import torch
from cases import Case
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmla_hf import attention, libraries
from flashmla_hf.backend import Backend
from flashmla_hf.fp8 import calls, emulation, kernel
from flashmla_hf.fp8.quantization import BLOCK_ROWS, quantize, rotate
from flashmla_hf.libraries import Sm90Limits
from flashmla_hf.ops import Arguments

HALF = (torch.bfloat16, torch.float16)
E4M3 = torch.float8_e4m3fn


def _quantized(q, k, v, cu_seqlens_q, cu_seqlens_kv):
    pairs = ((rotate(q, False), cu_seqlens_q), (rotate(k, True), cu_seqlens_kv), (v, cu_seqlens_kv))
    return [quantize(x, bounds, block_rows=BLOCK_ROWS) for x, bounds in pairs]


def _forward(*inputs):
    arguments = Arguments(*inputs)
    q, k, v, _, cu_seqlens_q, cu_seqlens_kv = inputs[:6]
    q8, k8, v8 = _quantized(q, k, v, cu_seqlens_q, cu_seqlens_kv)
    out = emulation.attention(q8, k8, v8, arguments)
    rounded = [x8.dequantize() for x8 in (q8, k8, v8)]
    _, lse = torch.ops.flashmla.flash_attn_forward(*rounded, *inputs[3:])
    return out.to(q.dtype), lse


def _round(q, k, v, cu_seqlens_q, cu_seqlens_kv):
    return tuple(x8.dequantize(torch.bfloat16) for x8 in _quantized(q, k, v, cu_seqlens_q, cu_seqlens_kv))


@pytest.fixture(scope="module", autouse=True)
def _operators():
    library = torch.library.Library("flashmla", "IMPL")
    library.impl(kernel.FORWARD, _forward, "CPU")
    library.impl(kernel.ROUND, _round, "CPU")
    yield
    library._destroy()


@pytest.fixture
def sm90(monkeypatch):
    """The implementation "sm90" of fp8, on the CPU, with the limits of head dims."""

    def refusal(call):
        wide = max(call.q.shape[-1], call.v.shape[-1]) > 256
        return "too wide" if wide else None

    monkeypatch.setitem(calls.IMPLEMENTATIONS, "sm90", Backend(refusal, kernel.run))


def test_random_calls_and_their_gradients_keep_the_rule(sm90):
    """Gradients by the bf16 backward, whose sums over keys come from an output that has rounded P."""
    for dtype in HALF:
        for case, seed in fp8_cases.kernel_cases(40, 3):
            fp8_cases.check("sm90", case, dtype, seed, gradients=torch.bfloat16)


def test_a_backward_of_wrong_values_is_found(sm90, monkeypatch):
    right = kernel.rotation
    monkeypatch.setattr(kernel, "rotation", lambda dim, is_key: right(dim, not is_key).roll(1, 0))
    case = Case(seqlen_q=150, heads_q=4, heads_kv=2, head_dim_qk=64, is_causal=True)
    with pytest.raises(AssertionError, match=r"d[qk]"):
        fp8_cases.check("sm90", case, torch.bfloat16, gradients=torch.bfloat16)


def _leaves(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 150, heads, 32, generator=generator).to(dtype).requires_grad_() for heads in (4, 2, 2)]


@pytest.mark.parametrize("wants", ["q", "k", "v", "qkv"])
def test_only_wanted_gradients_are_computed(sm90, wants):
    leaves = _leaves()
    for name, x in zip("qkv", leaves, strict=True):
        x.requires_grad_(name in wants)
    attention(*leaves, precision="fp8", impl="sm90").float().square().sum().backward()
    for name, x in zip("qkv", leaves, strict=True):
        assert (x.grad is not None) == (name in wants)
        assert x.grad is None or (x.grad.dtype == x.dtype and x.grad.isfinite().all())


def test_the_lse_alone_has_gradients(sm90):
    leaves = _leaves()
    _, lse = attention(*leaves, is_causal=True, precision="fp8", impl="sm90", return_lse=True)
    got = torch.autograd.grad(lse.sum(), leaves[:2], retain_graph=True)
    assert torch.autograd.grad(lse.sum(), leaves[2:])[0].abs().max() == 0
    twins = [x.detach().clone().requires_grad_() for x in leaves]
    _, lse = attention(*twins, is_causal=True, precision="fp8", impl="cpu", return_lse=True)
    for a, b in zip(got, torch.autograd.grad(lse.sum(), twins[:2]), strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_a_second_derivative_raises(sm90):
    leaves = _leaves()
    (gradient,) = torch.autograd.grad(
        attention(*leaves, precision="fp8", impl="sm90").float().square().sum(), leaves[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.float().sum().backward()


@pytest.mark.parametrize("operator", [kernel.FORWARD, kernel.ROUND])
def test_the_operators_refuse_gradients_by_name(operator):
    q, k, v = _leaves()
    options = (None, None, None, 150, 150, 0.2, -1, 0, 0.0, False) if operator == kernel.FORWARD else (None, None)
    with pytest.raises(RuntimeError, match=f"{operator}: q: expected a tensor that requires no gradient"):
        getattr(torch.ops.flashmla, operator)(q, k, v, *options)


def test_fake_calls_have_the_shapes_and_raise_for_wrong_ones():
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 150, heads, dim, dtype=torch.float16) for heads, dim in ((4, 32), (2, 32), (2, 40)))
        options = (None, None, None, 150, 150, 0.2, -1, 0, 0.0, False)
        out, lse = torch.ops.flashmla.flash_attn_fp8_forward(q, k, v, *options)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (
            (2, 150, 4, 40),
            torch.float16,
            (2, 4, 150),
            torch.float32,
        )
        rounded = torch.ops.flashmla.flash_attn_fp8_round(q, k, v, None, None)
        assert [(x.shape, x.dtype) for x in rounded] == [(x.shape, torch.bfloat16) for x in (q, k, v)]
        with pytest.raises(RuntimeError, match=re.escape(f"{kernel.FORWARD}: k: expected shape [2, 150, 2, 32]")):
            torch.ops.flashmla.flash_attn_fp8_forward(q, k[..., :24], v, *options)


def test_it_goes_through_torch_compile(sm90):
    def loss(q, k, v):
        return attention(q, k, v, precision="fp8", impl="sm90", is_causal=True).float().square().sum()

    leaves = _leaves()
    expected = torch.autograd.grad(loss(*leaves), leaves)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_changes_nothing(sm90):
    leaves = _leaves()

    def gradients():
        return torch.autograd.grad(attention(*leaves, precision="fp8", impl="sm90").float().sum(), leaves)

    expected = gradients()
    with torch.autocast("cpu", dtype=torch.float16):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


# ---- What is refused on a Hopper GPU ---------------------------------------------------------------------------------


class _Hopper:
    major, minor, name = 9, 0, "a Hopper GPU"


class _Other:
    major, minor, name = 8, 0, "another GPU"


def _tensors(dtype=torch.bfloat16, dim=64, dim_v=None):
    return [
        torch.empty(1, 256, heads, width, dtype=dtype, device="cuda")
        for heads, width in ((4, dim), (2, dim), (2, dim_v or dim))
    ]


REFUSED = {
    "another GPU": (_Other, {}, {}, "sm90: another GPU is not a Hopper GPU (compute capability 9.0): pass precision=None"),
    "float32": (_Hopper, {"dtype": torch.float32}, {}, "sm90: dtype float32: expected float16, bfloat16 or float8_e4m3fn: pass"),
    "too wide": (_Hopper, {"dim": 320, "dim_v": 128}, {}, "sm90: q and k: head_dim 320: expected a multiple of 8 up to 256"),
    "too wide values": (_Hopper, {"dim_v": 264}, {}, "sm90: v: head_dim 264: expected a multiple of 8 up to 256"),
    "no multiple of 8": (_Hopper, {"dim": 60}, {}, "sm90: q and k: head_dim 60: expected a multiple of 8 up to 256"),
    "dropout": (_Hopper, {}, {"dropout_p": 0.1}, "dropout_p=0.1: expected none in fp8; precision=None"),
    "flex": (_Hopper, {}, {"impl": "flex"}, "impl='flex' cannot compute this call in fp8: pass precision=None"),
    "narrow fp8 tensors": (
        _Hopper, {"dtype": E4M3, "dim": 40}, {"precision": None}, "sm90: q and k: head_dim 40: expected a multiple of 16 up to "
        "256: pass tensors of float16 or bfloat16 for the exact kernels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_cover_raises_by_name(name, monkeypatch):
    """Fake tensors: no GPU is needed to be refused."""
    properties, tensors, options, message = REFUSED[name]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(libraries, "sm90_limits", Sm90Limits(8, 256, 256, (576, 512), 256, 16, 256))
    monkeypatch.delitem(libraries.unavailable, "sm90", raising=False)
    with FakeTensorMode():
        if tensors.get("dtype") == E4M3:
            options = options | {f"{x}_descale": torch.empty(1, 2, device="cuda") for x in "qkv"}
        with pytest.raises(RuntimeError, match=re.escape(message)):
            attention(*_tensors(**tensors), **{"precision": "fp8"} | options)


def test_without_the_library_a_gpu_says_why(monkeypatch):
    monkeypatch.setitem(libraries.unavailable, "sm90", "libflashmla_sm90.so was not built")
    with (
        FakeTensorMode(),
        pytest.raises(RuntimeError, match=r"sm90: libflashmla_sm90.so was not built: pass precision=None"),
    ):
        attention(*_tensors(), precision="fp8")


def test_the_emulated_kernel_sees_what_is_not_finite(sm90):
    q, k, v = (x.detach().clone() for x in _leaves())
    k[0, 130, 1, 3] = math.nan
    out = attention(q, k, v, is_causal=True, precision="fp8", impl="sm90")
    assert out[0, 130:, 2:].isnan().all()
    assert out[0, :, :2].isfinite().all()
