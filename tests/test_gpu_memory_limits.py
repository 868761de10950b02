"""A GPU kernel without memory raises torch's own error; more heads and sequences than a grid is high are computed.

    python3 -m pytest tests/test_gpu_memory_limits.py                                   # on a Hopper GPU
    FLASHMLA_SM90_TESTS_ON=cpu python3 -m pytest tests/test_gpu_memory_limits.py        # the same promises of the CPU kernel

Each test wants the GPU's memory, or torch's allocator, to itself: one process.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case
from gpu_robust_support import operator
from gpu_support import DEVICE, IMPL, cu, needs_memory, needs_sm90, on_gpu, rows

from flashmla_hf import attention

pytestmark = needs_sm90


# ---- Out of memory ---------------------------------------------------------------------------------------------------


def memory_left(megabytes: int) -> None:
    """Lets torch's allocator take this much more from the GPU than it holds."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + megabytes * 2**20) / total)


def fill_what_is_held() -> list[torch.Tensor]:
    """Takes what torch's allocator holds without using it: a call would be answered from there."""
    memory_left(0)
    taken: list[torch.Tensor] = []
    size = 2**30
    while size >= 512:
        try:
            taken.append(torch.empty(size, dtype=torch.uint8, device=DEVICE))
        except torch.OutOfMemoryError:
            size //= 2
    return taken


def assert_out_of_memory_is_said(call, step: int = 12, most: int = 800) -> None:
    """Makes the call with more and more memory until it is enough: every allocation in it fails once, and says so."""
    from flashmla_hf.training import machine

    refused = []
    taken = fill_what_is_held()
    try:
        for megabytes in range(0, most, step):
            memory_left(megabytes)
            try:
                call()
                break
            except torch.OutOfMemoryError as error:
                refused.append(error)
        else:
            pytest.fail(f"{most} MiB were not enough")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        del taken
        torch.cuda.empty_cache()
    assert refused
    assert all("out of memory" in str(error) and machine.is_out_of_memory(error) for error in refused)


@on_gpu
@pytest.mark.parametrize("way", ["attention", "operator", "compiled"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_a_forward_without_memory_raises_torchs_own_error(way, is_packed):
    shape = {"seqlens_q": (4096,) * 4} if is_packed else {"batch": 4, "seqlen_q": 4096}
    inputs = Case(heads_q=16, heads_kv=4, head_dim_qk=128, **shape).inputs(torch.bfloat16, DEVICE)  # out: 64 MiB
    arguments = {name: getattr(inputs, name) for name in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_kv")}
    arguments = {name: x for name, x in arguments.items() if x is not None}
    call = torch.compile(attention, fullgraph=True, backend="aot_eager") if way == "compiled" else attention

    def run():
        if way == "operator":
            return operator(arguments)[0]()[0]
        return call(**arguments, is_causal=True, impl=IMPL)

    expected = run()
    torch.cuda.synchronize()
    assert_out_of_memory_is_said(run)
    assert torch.equal(run(), expected)


@on_gpu
@pytest.mark.parametrize("way", ["attention", "operator", "compiled"])
@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("is_deterministic", [False, True], ids=["", "deterministic"])
def test_a_backward_without_memory_raises_torchs_own_error(monkeypatch, way, head_dim, is_deterministic):
    """The gradients (64 and twice 16 MiB), sums in float32, delta: one allocation after the other."""
    shape = Case(
        batch=4, seqlen_q=4096, heads_q=16 * 128 // head_dim, heads_kv=4 * 128 // head_dim, head_dim_qk=head_dim
    )
    inputs = shape.inputs(torch.bfloat16, DEVICE)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    # torch's compiled backward gives what it saved away, and could not run twice.
    monkeypatch.setattr(torch._functorch.config, "donated_buffer", False)
    call = torch.compile(attention, fullgraph=True, backend="aot_eager") if way == "compiled" else attention
    if way == "operator":
        forward, backward = operator(dict(zip("qkv", (x.detach() for x in leaves), strict=True)), is_deterministic)
        out, lse = forward()

        def run():
            return backward(inputs.dout, None, out, lse)
    else:
        out = call(*leaves, is_causal=True, impl=IMPL, deterministic=is_deterministic)

        def run():
            return torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)

    expected = run()
    torch.cuda.synchronize()
    assert_out_of_memory_is_said(run)
    for x, y in zip(run(), expected, strict=True):
        assert torch.equal(x, y) if is_deterministic else torch.allclose(x, y, rtol=0.02, atol=0.02)


# ---- Many heads, many sequences --------------------------------------------------------------------------------------

MANY = 66_000  # beyond 65,535, the largest grid in y and z


def assert_many_are_right(arguments: dict, dense, dtype=torch.bfloat16) -> None:
    """out and gradients of attention(**arguments) beside float64 on ``dense`` (name -> view [sequences, rows, heads, dim])."""
    leaves = [arguments[name].requires_grad_() for name in "qkv"]
    options = {name: x for name, x in arguments.items() if name not in "qkv"}
    out = attention(*leaves, **options, is_causal=True, impl=IMPL)
    dout = torch.randn_like(out)
    got = (out.detach(), *torch.autograd.grad(out, leaves, dout))
    wide = [dense(x.detach()).double().requires_grad_() for x in leaves]
    exact = attention(*wide, is_causal=True, impl="reference")
    expected = (exact.detach(), *torch.autograd.grad(exact, wide, dense(dout).double()))
    for name, x, ref in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert float((dense(x).double() - ref).abs().max()) < 0.05 * max(1.0, float(ref.abs().max())), name


@rows
def test_more_sequences_than_a_grid_is_high_are_computed(row):
    if DEVICE == "cuda":
        needs_memory(12)
    dims = {"heads_q": 2, "heads_kv": 1, "head_dim_qk": row[0], "head_dim_v": row[1]}
    inputs = Case(batch=MANY, seqlen_q=3, **dims).inputs(torch.bfloat16, DEVICE)
    assert_many_are_right({"q": inputs.q, "k": inputs.k, "v": inputs.v}, lambda x: x)
    boundaries = cu(*range(0, 3 * MANY + 1, 3))
    packed = {name: getattr(inputs, name).flatten(0, 1).detach() for name in "qkv"}
    assert_many_are_right(
        {**packed, "cu_seqlens_q": boundaries, "cu_seqlens_kv": boundaries, "max_seqlen_q": 3, "max_seqlen_kv": 3},
        lambda x: x.view(MANY, 3, *x.shape[1:]),
    )


@rows
@pytest.mark.parametrize("group", [1, 2, MANY])
def test_more_heads_than_a_grid_is_high_are_computed(row, group):
    if DEVICE == "cuda":
        needs_memory(12)
    dims = {"heads_q": MANY, "heads_kv": MANY // group, "head_dim_qk": row[0], "head_dim_v": row[1]}
    inputs = Case(batch=1, seqlen_q=3, **dims).inputs(torch.bfloat16, DEVICE)
    assert_many_are_right({"q": inputs.q, "k": inputs.k, "v": inputs.v}, lambda x: x)
