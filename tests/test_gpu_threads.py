"""A GPU kernel may be called from any thread: as a thread's first work, by eight at once, on streams, by autograd's thread.

    python3 -m pytest tests/test_gpu_threads.py                                   # on a Hopper GPU
    FLASHMLA_SM90_TESTS_ON=cpu python3 -m pytest tests/test_gpu_threads.py        # the same promises of the CPU kernel

Autograd's thread starts once in a process, so its tests call functions of this module by ``in_subprocess``.
"""

from __future__ import annotations

import threading

import pytest
import torch
from fresh_python import in_subprocess
from gpu_robust_support import call_of, operator
from gpu_support import DEVICE, IMPL, needs_sm90, on_gpu, rows

from flashmla_hf import attention

pytestmark = needs_sm90


def fill_cache(gigabytes: int = 2) -> None:
    """Leaves memory in torch's cache: an allocation that is answered from there does not make a context current."""
    if DEVICE == "cuda":
        torch.empty(gigabytes * 2**30, dtype=torch.uint8, device=DEVICE)
        torch.cuda.synchronize()


def in_new_threads(*calls):
    """The results of ``calls``, each made in a Python thread of its own, all at once; raises what one of them raised."""
    results, errors = [None] * len(calls), []
    begin = threading.Barrier(len(calls))

    def work(n):
        try:
            begin.wait()
            results[n] = calls[n]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return results


@rows
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("way", ["attention", "operator"])
def test_the_first_work_of_a_new_thread_may_be_a_forward(row, is_packed, way):
    inputs = call_of(row, is_packed=is_packed)
    call = operator(inputs)[0]
    if way == "attention":

        def call():
            return attention(**inputs, is_causal=True, return_lse=True, impl=IMPL)

    expected = call()
    fill_cache()
    (got,) = in_new_threads(call)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


@rows
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("is_deterministic", [False, True], ids=["", "deterministic"])
def test_the_first_work_of_a_new_thread_may_be_a_backward(row, is_packed, is_deterministic):
    forward, backward = operator(call_of(row, is_packed=is_packed), is_deterministic)
    out, lse = forward()
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = backward(dout, dlse, out, lse)
    fill_cache()
    (got,) = in_new_threads(lambda: backward(dout, dlse, out, lse))
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y) if is_deterministic else torch.allclose(x, y, rtol=0.02, atol=0.02)


@rows
def test_eight_threads_at_once_get_what_one_after_the_other_gets(row):
    calls = []
    for seed in range(8):
        inputs = call_of(row, is_packed=seed % 2 == 1, seed=seed)
        leaves = [inputs[name].requires_grad_() for name in "qkv"]
        dout = torch.randn(*leaves[0].shape[:-1], row[1], device=DEVICE, dtype=torch.bfloat16)

        def call(inputs=inputs, leaves=leaves, dout=dout):
            out = attention(**inputs, is_causal=True, impl=IMPL, deterministic=True)
            return out.detach(), *torch.autograd.grad(out, leaves, dout)

        calls.append(call)
    expected = [call() for call in calls]
    fill_cache()
    for _ in range(3):
        for got, wanted in zip(in_new_threads(*calls), expected, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


@on_gpu
def test_new_threads_may_use_streams_of_their_own():
    inputs = call_of((128, 128))
    expected = attention(**inputs, is_causal=True, impl=IMPL)
    torch.cuda.synchronize()
    fill_cache()

    def call():
        with torch.cuda.stream(torch.cuda.Stream()):
            out = attention(**inputs, is_causal=True, impl=IMPL)
            torch.cuda.current_stream().synchronize()
            return out

    for got in in_new_threads(*[call] * 4):
        assert torch.equal(got, expected)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_first_work_of_a_new_thread_may_be_on_another_gpu():
    for device in reversed(range(torch.cuda.device_count())):
        inputs = call_of((128, 128), device=torch.device("cuda", device))
        forward, backward = operator(inputs, is_deterministic=True)
        out, lse = forward()
        dout = torch.randn_like(out)
        expected = (out, *backward(dout, None, out, lse))
        torch.cuda.synchronize(device)
        got = in_new_threads(lambda: forward()[0], lambda: backward(dout, None, out, lse))  # noqa: B023
        torch.cuda.synchronize(device)
        assert all(torch.equal(x, y) for x, y in zip((got[0], *got[1]), expected, strict=True))
        assert torch.cuda.current_device() == 0


def backward_first_on_autograds_thread(row, is_packed, options, is_compiled):
    """In a fresh process: prints the largest error of the gradients beside those of the operator, called from here."""
    inputs = call_of(row, is_packed=is_packed)
    leaves = [inputs[name].requires_grad_() for name in "qkv"]
    call = torch.compile(attention, fullgraph=True, backend="aot_eager") if is_compiled else attention
    fill_cache()
    out = call(**inputs, is_causal=True, impl=IMPL, **options)
    dout = torch.randn_like(out)
    fill_cache()
    grads = torch.autograd.grad(out, leaves, dout)  # nothing has run backward in this process
    forward, backward = operator({name: x.detach() for name, x in inputs.items()})
    expected = backward(dout, None, *forward())
    print(max(float((x - y).abs().max()) for x, y in zip(grads, expected, strict=True)))


@pytest.mark.parametrize(
    ("row", "is_packed", "options", "is_compiled"),
    [
        ((64, 64), False, {}, False),
        ((96, 96), True, {}, False),
        ((128, 128), False, {}, False),
        ((128, 128), True, {"deterministic": True}, False),
        ((192, 128), False, {}, True),
        ((192, 192), False, {"deterministic": True}, False),
        ((256, 256), True, {}, True),
    ],
    ids=str,
)
def test_the_first_work_of_autograds_thread_may_be_a_backward(row, is_packed, options, is_compiled):
    printed = in_subprocess(
        "test_gpu_threads", f"backward_first_on_autograds_thread({row}, {is_packed}, {options}, {is_compiled})"
    )
    assert float(printed.splitlines()[-1]) < 0.05
