"""What the compiled host code does before and around a kernel: sizes that overflow, hostile tensors, memory that is not
there. Calls that could end the interpreter run in a child process."""

from __future__ import annotations

import forked_python
import gpu_support
import pytest
import torch
from cpu_support import needs_cpu_library
from fresh_python import run_program

from flashmla_hf import attention, direct, libraries

pytestmark = needs_cpu_library

FORWARD = torch.ops.flashmla.flash_attn_forward
BACKWARD = torch.ops.flashmla.flash_attn_backward
needs_gpu = pytest.mark.skipif(gpu_support.sm90_missing() is not None, reason=str(gpu_support.sm90_missing()))
OPTIONS = (0.3, -1, -1, 0.0, False)


@pytest.fixture(params=["direct", "operator"])
def way(request, monkeypatch):
    """Both ways into the library."""
    if request.param == "operator":
        monkeypatch.setattr(direct, "enabled", False)
    elif not direct.enabled:
        pytest.skip(str(libraries.unavailable.get("direct")))
    return request.param


# ---- Sizes and strides -----------------------------------------------------------------------------------------------


def test_sizes_whose_products_overflow_are_refused_by_name():
    n = 1518500250
    q, k = torch.zeros(1).expand(n, 1, n, 1), torch.empty(0).as_strided((n, 0, n, 1), (0, 0, 0, 1))
    lse = torch.zeros(1).expand(n, n, 1)
    message = r"q, k and v: expected fewer than 2\^53 numbers .* got shapes \[1518500250, 1, 1518500250, 1\], "
    with pytest.raises(RuntimeError, match="flash_attn_forward: " + message):
        FORWARD(q, k, k, None, None, None, 0, 0, *OPTIONS)
    with pytest.raises(RuntimeError, match="flash_attn_backward: " + message):
        BACKWARD(q, None, q, k, k, q, lse, None, None, None, 0, 0, *OPTIONS, False, False, True, False)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True)])
@pytest.mark.parametrize("has_queries", [False, True])
def test_batches_of_billions_without_keys_or_queries_end_at_once(needs, has_queries):
    n = 2**31 - 1
    nothing, expanded = torch.empty(0).as_strided((n, 0, 1, 1), (0, 0, 0, 1)), torch.zeros(1).expand(n, 1, 1, 1)
    q, k = (expanded, nothing) if has_queries else (nothing, expanded)
    wanted = q if needs[0] else k
    if wanted.numel() > 0:
        return  # its gradient is 8 GiB
    lse = torch.zeros(1).expand(n, 1, q.shape[1])
    grads = BACKWARD(q, None, q, k, k, q, lse, None, None, None, 0, 0, *OPTIONS, *needs, False)
    assert [x.shape for x, need in zip(grads, needs, strict=False) if need] == [wanted.shape] * sum(needs)


def check_hostile_calls(num_calls, seed):
    """Random sizes, strides and boundaries: an answer or a RuntimeError, and the interpreter lives."""
    import random

    torch.set_num_threads(1)
    generator = random.Random(seed)
    sizes = (0, 1, 1, 2, 3, 17, 64, 2**16, 2**20, 2**30, 2**31 - 1, 2**31, 2**33)
    answers = 0

    def tensor(shape, dtype=torch.float32):
        kind = generator.randrange(4)
        real = [min(size, 5) for size in shape]
        if kind == 0 and torch.Size(shape).numel() <= 2**16:
            return torch.randn(shape).to(dtype)
        if kind == 1:  # overlapping rows
            strides = [generator.choice((0, 1, 2, 7)) for _ in shape]
            strides[-1] = generator.choice((1, 1, 1, 2, 0))
            storage = torch.randn(4096).to(dtype)
            last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            if all(shape) and last < 4096:
                return storage.as_strided(shape, strides)
        if kind == 2 and 0 in shape:
            return torch.empty(0, dtype=dtype).as_strided(shape, [generator.choice((0, 1, 2**40)) for _ in shape])
        x = torch.randn(real).to(dtype)
        x = x[tuple(slice(0, min(1, size)) for size in real[:-1])]
        return x[..., : real[-1]].expand(*shape[:-1], x.shape[-1])

    for _ in range(num_calls):
        # Most sizes small, so that some calls are right and others wrong in one place.
        def size(candidates=sizes):
            return generator.choice(candidates) if generator.random() < 0.15 else generator.choice((1, 2, 3, 4))

        batch, nq, nk, heads, d, dv = size(), size(), size(), size(), generator.randint(1, 5), generator.randint(1, 5)
        if batch * nq * heads > 2**22 and generator.random() < 0.5:
            nq = 0
        heads_kv = heads if generator.random() < 0.8 else size()
        is_packed = generator.random() < 0.4
        lead_q, lead_k = ((nq,), (nk,)) if is_packed else ((batch, nq), (batch, nk))
        try:
            q = tensor((*lead_q, heads, d))
            k, v = tensor((*lead_k, heads_kv, d)), tensor((*lead_k, heads_kv, dv))
            out = tensor((*lead_q, heads, dv)) if generator.random() < 0.9 else q
            lse = tensor((heads, nq) if is_packed else (batch, heads, nq))
            cu = None
            if is_packed:
                count = generator.choice((1, 2, 3, 4))
                cu = [sorted(generator.choice((0, 0, 1, nq, nk, -1, 2**31 - 1)) for _ in range(count)) for _ in "qk"]
                if generator.random() < 0.8:
                    cu = [[0, *sorted(generator.randint(0, min(n, 99)) for _ in range(count - 1))] for n in (nq, nk)]
                cu = [torch.tensor(x, dtype=torch.int64).clamp(-(2**31), 2**31 - 1).int() for x in cu]
            window = [generator.choice((-1, 0, 1, 2**31, 2**62, 2**63 - 1, -5)) for _ in range(2)]
            lengths = [generator.choice((0, 3, 2**40, 2**63 - 1, -1, n)) for n in (nq, nk)]
            options = (*(cu or (None, None)), *lengths, generator.choice((0.3, -1.0, 0.0, 1e30)), *window, 0.0, False)
            sinks = tensor((heads,)) if generator.random() < 0.2 else None
            needs = tuple(generator.random() < 0.5 for _ in range(4))
            # Not what is right and takes long, or takes much memory: small calls, and those that nothing could hold.
            work = (1 if is_packed else batch) * max(1, nq) * max(1, nk) * max(heads, heads_kv)
            is_small = work <= 2**20 and max(x.numel() for x in (q, k, v, out)) <= 2**24
            if is_small or out.numel() > 2**42:
                FORWARD(q, k, v, sinks, *options)
                answers += 1
            if is_small or any(need and x.numel() > 2**42 for need, x in zip(needs, (q, k, v), strict=False)):
                BACKWARD(out, lse if generator.random() < 0.3 else None, q, k, v, out, lse, sinks, *options, *needs)
                answers += 1
        except (RuntimeError, OverflowError):
            continue
    print(answers)


@pytest.mark.parametrize("seed", range(3))
def test_hostile_sizes_and_strides_never_end_the_interpreter(seed):
    answers = int(forked_python.run_program(f"import test_host as t; t.check_hostile_calls(1500, {seed})"))
    assert answers > 100


@pytest.mark.parametrize("layout", ["heads", "batch", "sequences"])
def test_more_than_65535_heads_or_sequences_are_computed(layout):
    n = 70_001
    shape = {"heads": (1, 2, n, 8), "batch": (n, 2, 1, 8), "sequences": (2 * n, 1, 8)}[layout]
    q, k, v, dout = (torch.randn(shape) for _ in range(4))
    packing, lengths = (None, None), (2, 2)
    if layout == "sequences":
        packing = (torch.arange(0, 2 * n + 1, 2, dtype=torch.int32),) * 2
    options = (*packing, *lengths, 0.3, -1, 0, 0.0, False)
    out, lse = FORWARD(q, k, v, None, *options)
    dq, dk, dv, _ = BACKWARD(dout, None, q, k, v, out, lse, None, *options, True, True, True, False)

    def pairs(x):  # [sequences and heads, 2, 8]
        return x.view(n, 2, 8) if layout != "heads" else x[0].transpose(0, 1)

    leaves = [pairs(x).double().requires_grad_() for x in (q, k, v)]
    scores = (leaves[0] @ leaves[1].mT * 0.3).masked_fill(torch.ones(2, 2).triu(1).bool(), float("-inf"))
    expected = torch.softmax(scores, -1) @ leaves[2]
    grads = torch.autograd.grad(expected, leaves, pairs(dout).double())
    for mine, truth in zip((out, dq, dk, dv), (expected, *grads), strict=True):
        torch.testing.assert_close(pairs(mine).double(), truth, rtol=1e-4, atol=1e-5)


def test_ragged_sequences_take_memory_by_their_rows_and_not_by_the_longest():
    """20,000 short sequences and a long one: gradients' workspace is not sequences times the longest."""
    lengths = torch.ones(20_001, dtype=torch.int32)
    lengths[7] = 20_000
    cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    q = torch.randn(int(cu[-1]), 4, 8)
    program = (
        "import resource, torch, test_host as t\n"
        "resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "lengths = torch.ones(20_001, dtype=torch.int32); lengths[7] = 20_000\n"
        "cu = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()\n"
        "q = torch.randn(int(cu[-1]), 8, 8); sinks = torch.zeros(8)\n"
        "options = (cu, cu, 20_000, 20_000, 0.3, 64, 0, 0.0, False)\n"
        "out, lse = t.FORWARD(q, q, q, sinks, *options)\n"
        "t.BACKWARD(q, None, q, q, q, out, lse, sinks, *options, True, True, True, True)\n"
    )
    assert q.shape[0] == 40_000
    run_program(program)


# ---- No elements -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (0, 2, 8)], ids=str)
@pytest.mark.parametrize("strides", ["expanded", "wide", "transposed"])
def test_strides_of_inputs_and_gradients_without_elements_are_ignored(shape, strides, way):
    def with_strides(shape):
        if strides == "expanded":
            return torch.ones(()).expand(shape)
        if strides == "wide":
            return torch.empty(*shape[:-1], 2 * shape[-1])[..., ::2]
        return torch.empty(shape).mT.contiguous().mT

    is_packed = len(shape) == 3
    cu = torch.zeros(3, dtype=torch.int32) if is_packed else None
    q, dout = with_strides(shape), with_strides(shape)
    keys = shape if is_packed else (shape[0], 5, *shape[2:])
    k = torch.randn(keys)
    options = (None, cu, cu, 5, 5, *OPTIONS)
    out, lse = FORWARD(q, k, k, *options)
    assert out.shape == shape
    dq, dk, dv, _ = BACKWARD(dout, None, q, k, k, with_strides(shape), lse, *options, True, True, True, False)
    assert (dq.shape, dk.shape, dv.shape) == (shape, keys, keys)
    assert (dk == 0).all()
    assert (dv == 0).all()


# ---- Out of memory ---------------------------------------------------------------------------------------------------


def memory_error(call, kind=RuntimeError):
    with pytest.raises(kind) as error:
        call()
    assert type(error.value) is kind
    return str(error.value)


def torch_message():
    """As torch says it on a CPU."""
    return memory_error(lambda: torch.empty(2**46, dtype=torch.uint8)).split("you tried to allocate")[0]


def test_a_workspace_that_does_not_fit_is_torchs_error(way):
    x = torch.zeros(1, 1, 1, 20_000_000)  # 36 GiB of tiles
    program = (
        "import resource, torch, test_host as t\n"
        f"if {way == 'operator'}: t.direct.enabled = False\n"
        "resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))\n"
        "x = torch.zeros(1, 1, 1, 20_000_000, requires_grad=True)\n"
        "print(t.memory_error(lambda: t.attention(x.detach(), x.detach(), x.detach())))\n"
        "out = torch.zeros(1, 1, 1, 20_000_000)\n"
        "print(t.memory_error(lambda: t.BACKWARD(out, None, x, x, x, out, torch.zeros(1, 1, 1), None, None, None, 1, 1,\n"
        "    *t.OPTIONS, True, True, True, False)))\n"
        "print(t.memory_error(lambda: t.backward_directly(out, x)))\n"
        "print(t.torch_message())\n"
    )
    lines = run_program(program).splitlines()
    said = [line for line in lines if "not enough memory" in line or "can't allocate memory" in line]
    assert len(said) == 4, lines
    assert all(line.startswith(said[-1]) for line in said)
    assert x.numel() == 20_000_000


def backward_directly(out, x):
    inputs = (x, x, x, None, None, None, 1, 1, *OPTIONS)
    if not direct.enabled:
        return BACKWARD(out, None, *inputs[:3], out, torch.zeros(1, 1, 1), *inputs[3:], True, True, True, False)
    return direct.module.backward(out, None, out, torch.zeros(1, 1, 1), True, True, True, False, *inputs)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", None])
def test_outputs_that_do_not_fit_are_torchs_error_compiled_or_not(backend, way):
    y = torch.zeros(8).expand(2**20, 2**10, 2**10, 8)
    call = attention if backend is None else torch.compile(attention, fullgraph=True, backend=backend)
    assert memory_error(lambda: call(y, y, y)).startswith(torch_message())


def test_gradients_that_do_not_fit_are_torchs_error():
    y, lse = torch.zeros(8).expand(2**20, 2**10, 2**10, 8), torch.zeros(1).expand(2**20, 2**10, 2**10)
    for needs in ((True, False, False, False), (False, True, False, False), (False, False, True, False)):
        call = lambda needs=needs: BACKWARD(y, None, y, y, y, y, lse, None, None, None, 1, 1, *OPTIONS, *needs)  # noqa: E731
        assert memory_error(call).startswith(torch_message())


def test_memory_errors_keep_no_memory_and_the_next_call_computes(way):
    """The next call computes, and a loop of failures does not keep memory."""
    x = torch.randn(1, 3, 1, 8)
    expected = attention(x, x, x)
    y = torch.zeros(8).expand(2**20, 2**10, 2**10, 8)
    for _ in range(20):
        memory_error(lambda: attention(y, y, y))
    assert torch.equal(attention(x, x, x), expected)


@needs_gpu
@pytest.mark.parametrize("step", ["forward", "outputs", "backward", "copy"])
def test_a_gpu_without_memory_raises_torchs_out_of_memory_error(step, way):
    """A fraction of the memory is all there is; what the library allocates does not fit, by both ways."""
    torch.cuda.empty_cache()
    try:
        n = 1 << 16
        q = torch.randn(1, n, 8, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)  # 128 MiB
        out = attention(q, q, q, is_causal=True, impl="sm90") if step in ("backward", "copy") else None
        dout = torch.ones((), device="cuda", dtype=q.dtype).expand(out.shape) if step == "copy" else out
        filler = torch.empty(0, device="cuda")
        reserved = torch.cuda.memory_reserved()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((reserved + (32 << 20)) / total)
        if step == "forward":
            wide = torch.zeros(8, device="cuda", dtype=q.dtype).expand(1 << 14, 1 << 10, 16, 8)
            call = lambda: FORWARD(wide, wide, wide, None, None, None, 1 << 10, 1 << 10, *OPTIONS)  # noqa: E731
        elif step == "outputs":
            wide = torch.zeros(8, device="cuda", dtype=q.dtype).expand(1 << 14, 1 << 10, 16, 8)
            call = lambda: attention(wide.contiguous(), wide, wide)  # noqa: E731
        else:
            call = lambda: torch.autograd.grad(out, q, dout)  # noqa: E731
        message = memory_error(call, torch.OutOfMemoryError)
        assert "out of memory" in message
        assert "Tried to allocate" in message
        del filler
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@needs_gpu
def test_a_gpu_without_memory_raises_torchs_out_of_memory_error_compiled():
    wide = torch.zeros(8, device="cuda", dtype=torch.bfloat16).expand(1 << 16, 1 << 10, 64, 8)  # 2^32 rows of 8
    compiled = torch.compile(lambda x: attention(x, x, x), fullgraph=True)
    assert "Tried to allocate" in memory_error(lambda: compiled(wide), torch.OutOfMemoryError)
