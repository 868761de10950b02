"""Our kernels as torch's flash attention: SDPA's operators, varlen's, and torch's ring give the reference's numbers."""

from __future__ import annotations

import gloo_processes
import pytest
import ring_cases
import torch

import flashmla_hf
from flashmla_hf import torch_flash

pytestmark = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"),
    reason="this torch has no registry of flash attention",
)


@pytest.fixture
def installed():
    """On the CPU, where torch's operator has no kernel of its own."""
    handle = torch_flash.install("CPU")
    yield
    handle.remove()


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def expected(q, k, v, dout, **options):
    """Output and gradients of the float64 reference, for [batch, heads, seqlen, dim]."""
    q, k, v = (x.double().transpose(1, 2).requires_grad_() for x in (q, k, v))
    out = flashmla_hf.attention(q, k, v, impl="reference", **options)
    out.backward(dout.double().transpose(1, 2))
    return [x.transpose(1, 2).float() for x in (out.detach(), q.grad, k.grad, v.grad)]


def test_the_name_is_registered():
    assert "flashmla" in torch.nn.attention.list_flash_attention_impls()


@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpas_operator_computes_ours_with_gradients(is_causal, installed):
    *inputs, dout = ring_cases.tensors()
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    out.backward(dout)
    for got, want in zip(
        (out.detach(), q.grad, k.grad, v.grad), expected(*inputs, dout, is_causal=is_causal), strict=True
    ):
        close(got, want)


def test_the_packed_operator_knows_documents_and_windows(installed):
    *inputs, dout = (x[0].transpose(0, 1).contiguous() for x in ring_cases.tensors())  # [total, heads, dim]
    q, k, v = (x.clone().requires_grad_() for x in inputs)
    boundaries = torch.tensor([0, 11, 14, 32], dtype=torch.int32)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, boundaries, boundaries, 18, 18, 0.0, True, False, window_size_left=4, window_size_right=0
    )
    out.backward(dout)
    a, b, c = (x.double().requires_grad_() for x in inputs)
    packed = {"cu_seqlens_q": boundaries, "cu_seqlens_kv": boundaries, "max_seqlen_q": 18, "max_seqlen_kv": 18}
    want, want_lse = flashmla_hf.attention(
        a, b, c, is_causal=True, window=(4, 0), impl="reference", return_lse=True, **packed
    )
    want.backward(dout.double())
    for got, true in ((out, want), (lse, want_lse), (q.grad, a.grad), (k.grad, b.grad), (v.grad, c.grad)):
        close(got.detach(), true.detach().float())


@pytest.mark.parametrize(("is_causal", "is_balanced"), [(False, False), (True, False), (True, True)])
def test_torchs_ring_over_our_kernels_gives_the_whole_sequences_attention(is_causal, is_balanced):
    parts = gloo_processes.run(ring_cases.ring, is_causal, is_balanced)
    whole = expected(*ring_cases.tensors(), is_causal=is_causal)
    for i, (name, want) in enumerate(zip(("out", "dq", "dk", "dv"), whole, strict=True)):
        for rank, part in enumerate(parts):
            mine = torch.cat([want.chunk(4, dim=2)[j] for j in ring_cases.parts_of(rank, is_balanced)], dim=2)
            where = f"{name} of process {rank}"
            torch.testing.assert_close(
                torch.from_numpy(part[i]), mine, atol=5e-5, rtol=5e-5, msg=lambda m, where=where: f"{where}: {m}"
            )


def test_what_our_kernels_do_not_compute_is_refused_by_name(installed):
    q, k, v, _ = ring_cases.tensors()
    with pytest.raises(NotImplementedError, match=r"dropout_p: expected none, got 0\.1"):
        torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.1)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    with pytest.raises(NotImplementedError, match="alibi_slopes: expected none, got one"):
        torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, 32, 32, 0.0, True, False, alibi_slopes=torch.ones(4)
        )


def test_torchs_operators_come_back():
    torch_flash.install("CPU").remove()
    q, k, v, _ = ring_cases.tensors()
    with pytest.raises(NotImplementedError, match="CPU"):
        torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_activating_it_without_a_hopper_gpu_is_refused():
    with pytest.raises(RuntimeError, match="expected a Hopper GPU and the library for it"):
        torch.nn.attention.activate_flash_attention_impl("flashmla")


@pytest.mark.parametrize("processes", [2, 4])
def test_accelerates_cp_size_trains_an_sdpa_model_over_our_kernels(processes):
    (whole,) = gloo_processes.run(ring_cases.by_accelerate, "sdpa", 1, processes=1)
    parts = gloo_processes.run(ring_cases.by_accelerate, "sdpa", processes, processes=processes)
    assert parts[0] == pytest.approx(whole, rel=2e-5)
    assert parts == [parts[0]] * processes


def test_our_name_inside_accelerates_ring_is_refused():
    with pytest.raises(gloo_processes.ProcessError, match=r"context parallelism is active.*see one shard of the keys"):
        gloo_processes.run(ring_cases.by_accelerate, "flashmla", 2)
