"""The Hopper forward refuses by name the arguments that it does not compute, and copies or refuses unaligned tensors."""

from __future__ import annotations

import re

import pytest
import torch
from counting import counted_calls
from gpu_support import DEVICE, IMPL, cu, needs_sm90, offset_by
from sm90_support import tensors

from flashmla_hf import attention


def operator(q, k, v, cu_seqlens_q=None, cu_seqlens_kv=None, **changes):
    """The operator itself, past dispatch."""
    options = {
        "sinks": None, "max_seqlen_q": q.shape[-3], "max_seqlen_kv": k.shape[-3], "scale": 0.125, "window_left": -1,
        "window_right": -1, "softcap": 0.0, "deterministic": False,
    }  # fmt: skip
    return torch.ops.flashmla.flash_attn_forward(
        q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv, **(options | changes)
    )


# ---- Refusals --------------------------------------------------------------------------------------------------------

# name -> (arguments of attention on this device, pattern of the reason)
REFUSED = {
    "float32": (lambda: tensors(dtype=torch.float32), r"dtype float32: expected float16 or bfloat16"),
    "float64": (lambda: tensors(dtype=torch.float64), r"dtype float64: expected float16 or bfloat16"),
    "attn_mask": (
        lambda: {**tensors(), "attn_mask": torch.ones(100, 100, dtype=torch.bool, device=DEVICE)},
        r"attn_mask is given: expected none \(impl='sdpa' and impl='reference' take one\)",
    ),
    "dropout": (
        lambda: {**tensors(), "dropout_p": 0.1},
        r"dropout_p=0\.1: expected 0 \(impl='torch_flash', 'sdpa' and 'reference' compute dropout\)",
    ),
    "a head dim beyond 512": (lambda: tensors(head_dim=520), r"520.*512|512.*520"),
    "a head dim beyond 512, and odd": (lambda: tensors(head_dim=516), r"516.*512|512.*516"),
    "a head dim that is no multiple of 8": (lambda: tensors(head_dim=44), r"44.*8|8.*44"),
    "a value head dim that is no multiple of 8": (
        lambda: {**tensors(), "v": tensors(head_dim=44)["v"]},
        r"44.*8|8.*44",
    ),
    "tensors on the CPU": (lambda: tensors(device="cpu"), r"the tensors are on cpu: expected a Hopper GPU"),
}


@needs_sm90
@pytest.mark.skipif(DEVICE == "cpu", reason="the words of sm90")
@pytest.mark.parametrize("name", REFUSED)
def test_sm90_refuses_calls_that_it_does_not_compute_with_the_reason(name):
    arguments, pattern = REFUSED[name]
    arguments = arguments()
    prefix = re.escape("flashmla attention: impl='sm90' cannot compute this call: ")
    with pytest.raises(RuntimeError, match=f"^{prefix}.*(?:{pattern})"):
        attention(**arguments, impl="sm90")


@needs_sm90
@pytest.mark.skipif(DEVICE == "cpu", reason="the choice on a GPU")
@pytest.mark.parametrize("name", [name for name in REFUSED if "no multiple of 8" in name or name == "float32"])
def test_the_automatic_choice_leaves_to_others_calls_that_sm90_does_not_compute(name):
    with counted_calls(stub=("flex", "torch_flash")) as chosen:
        attention(**REFUSED[name][0]())
        attention(**tensors())
    assert chosen == {"flex" if name == "float32" else "torch_flash": 1, "sm90": 1}


# ---- Alignment -------------------------------------------------------------------------------------------------------


def with_heads_apart(x, stride):
    """x with ``stride`` elements from one head to the next."""
    wide = x.new_zeros(*x.shape[:-1], stride)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


MISALIGNED = {
    "pointer": lambda x: offset_by(x, 1),
    "pointer by eight bytes": lambda x: offset_by(x, 4),
    "stride of heads": lambda x: with_heads_apart(x, 68),
    "stride of rows": lambda x: with_heads_apart(x.flatten(2), x[0, 0].numel() + 4).unflatten(2, x.shape[2:]),
    "stride of the batch": lambda x: with_heads_apart(x.flatten(1), x[0].numel() + 2).unflatten(1, x.shape[1:]),
}
by_tensor = pytest.mark.parametrize("name", ["q", "k", "v"])


@needs_sm90
@by_tensor
@pytest.mark.parametrize("kind", MISALIGNED)
def test_a_misaligned_tensor_is_copied_by_the_automatic_choice_and_refused_by_name_elsewhere(kind, name):
    arguments = tensors()
    expected = attention(**arguments, is_causal=True, impl=IMPL)
    aligned = arguments[name]
    arguments[name] = MISALIGNED[kind](aligned)
    assert torch.equal(arguments[name], aligned)
    with counted_calls() as chosen:
        assert torch.equal(attention(**arguments, is_causal=True), expected)
    assert chosen == {IMPL: 1}
    if DEVICE == "cuda":
        with pytest.raises(RuntimeError, match=rf"impl='sm90' cannot compute this call: .*\b{name}\b"):
            attention(**arguments, is_causal=True, impl="sm90")
        with pytest.raises(RuntimeError, match=rf"flash_attn_forward: {name}: expected .*, got "):
            operator(**arguments)


@needs_sm90
@by_tensor
def test_a_tensor_of_stride_zero_is_never_read_wrongly(name):
    """Expanded over the batch and over the heads: computed, or refused by name; copied by the automatic choice."""
    for dim in (0, 2):
        arguments = tensors()
        arguments[name] = arguments[name].narrow(dim, 0, 1).expand(arguments[name].shape)
        assert arguments[name].stride(dim) == 0
        written_out = {**arguments, name: arguments[name].contiguous()}
        expected = attention(**written_out, is_causal=True, impl=IMPL)
        assert torch.equal(attention(**arguments, is_causal=True), expected)
        try:
            got = attention(**arguments, is_causal=True, impl=IMPL)
        except RuntimeError as error:
            got, reason = None, str(error)
        if got is None:
            assert re.search(rf"cannot compute this call: .*\b{name}\b", reason)
        else:
            assert torch.equal(got, expected)


@needs_sm90
@by_tensor
def test_strides_of_dimensions_of_one_element_do_not_matter(name):
    arguments = tensors(batch=1, seqlen_q=1, seqlen_kv=1, heads=(1, 1))
    expected = attention(**arguments, impl=IMPL)
    for strides in ((3, 5, 7, 1), (0, 0, 0, 1), (1, 1, 1, 1), (2**40 + 1, 2**40 + 1, 2**40 + 1, 1)):
        view = torch.as_strided(arguments[name], arguments[name].shape, strides)
        assert torch.equal(attention(**{**arguments, name: view}, impl=IMPL), expected)


@needs_sm90
@pytest.mark.skipif(DEVICE == "cpu", reason="the words of sm90")
def test_the_operator_names_the_argument_it_does_not_take():
    good = tensors()
    wrong = {
        "q": ({"q": good["q"].float(), "k": good["k"].float(), "v": good["v"].float()}, "float16 or bfloat16.*float32"),
        "k": ({"k": good["k"].half()}, "dtype bfloat16.*float16"),
        "v": ({"v": good["v"][:, :50]}, "shape"),
        "cu_seqlens_kv": ({"cu_seqlens_q": cu(0, 5)}, "None"),
    }
    for name, (change, words) in wrong.items():
        with pytest.raises(RuntimeError, match=rf"flash_attn_forward: {name}: expected .*{words}"):
            operator(**{**good, **change})
    with pytest.raises(RuntimeError, match=r"flash_attn_forward: (q|head_dim).*: expected .*got.*520"):
        operator(**tensors(head_dim=520))
    on_cpu = {"k": good["k"].cpu()}
    with pytest.raises((RuntimeError, NotImplementedError), match="device"):
        operator(**{**good, **on_cpu})
