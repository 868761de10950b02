"""Implementation ``torch_flash``: torch's operators give the reference's numbers, and what they do not compute is refused.

Their place is taken by flash_operator.py, which has their traps. The tests of a GPU at the end run the operators themselves.
"""

from __future__ import annotations

import dataclasses
import types

import numerics
import pytest
import torch
from cases import CASES, Case, calls
from flash_operator import FlashOperator
from hypothesis import given, settings
from small_calls import cu, packed, qkv, x

from flashmla_hf import attention, dispatch, libraries, notices
from flashmla_hf.backends import aten_flash
from flashmla_hf.validation import validate

HALF = {"dtype": torch.bfloat16}


@pytest.fixture
def operator(monkeypatch):
    """The stand-in in the place of torch's operators, and a CPU that passes for a GPU."""
    monkeypatch.setattr(aten_flash, "device_refusal", lambda device: None)
    stand_in = FlashOperator()
    library = stand_in.install()
    yield stand_in
    library._destroy()


def call_of(**arguments):
    names = [
        "q",
        "k",
        "v",
        "scale",
        "is_causal",
        "window",
        "softcap",
        "sinks",
        "dropout_p",
        "cu_seqlens_q",
        "cu_seqlens_kv",
        "max_seqlen_q",
        "max_seqlen_kv",
        "deterministic",
        "impl",
        "return_lse",
        "attn_mask",
    ]
    defaults = {"is_causal": False, "softcap": 0.0, "dropout_p": 0.0, "deterministic": False, "return_lse": False}
    return validate(*(arguments.get(name, defaults.get(name)) for name in names))


def half(arguments):
    is_floating = lambda value: isinstance(value, torch.Tensor) and value.is_floating_point()  # noqa: E731
    return {name: value.bfloat16() if is_floating(value) else value for name, value in arguments.items()}


# ---- What is computed ------------------------------------------------------------------------------------------------


def through_two_calls(**arguments):
    """``attention`` with gradients and with the lse, which one call does not give."""
    arguments = {name: value for name, value in arguments.items() if name != "return_lse"}
    with torch.no_grad():
        _, lse = attention(**arguments, impl="torch_flash", return_lse=True)
    return attention(**arguments, impl="torch_flash"), lse


def check(case, dtype, device="cpu"):
    """The rule of numerics.py; of a call that is refused, that the refusal is one of those documented."""
    inputs = case.inputs(dtype, device)
    call = call_of(
        q=inputs.q, k=inputs.k, v=inputs.v, sinks=inputs.sinks, cu_seqlens_q=inputs.cu_seqlens_q,
        cu_seqlens_kv=inputs.cu_seqlens_kv, **case.options,
    )  # fmt: skip
    reason = aten_flash.call_refusal(call)
    if reason is not None:
        expected = {
            "softcap is given": case.softcap > 0.0,
            "sinks is given": case.has_sinks,
            "no queries or no keys": 0 in (inputs.q.numel(), inputs.k.numel()),
            "no sequence": case.is_packed and len(case.seqlens_q) == 0,
            "expected a positive one": case.scale is not None and case.scale <= 0.0,
            "would move its right edge": case.window is not None,
            "head_dim": max(case.head_dim_qk, case.head_dim_v) > 256,
        }
        assert any(words in reason for words, holds in expected.items() if holds), reason
        return False
    numerics.check(through_two_calls, case, dtype, device, wants=("q", "k", "v"), has_dlse=False)
    return True


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_exact_or_refused(case, operator):
    check(case, torch.bfloat16)


@given(case=calls())
@settings(max_examples=60, deadline=None)
def test_random_calls_are_exact_or_refused(case):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aten_flash, "device_refusal", lambda device: None)
        library = FlashOperator().install()
        try:
            check(case, torch.bfloat16)
        finally:
            library._destroy()


TRAPS = [
    Case("left edge beyond the keys", seqlen_q=90, seqlen_kv=37, window=(40, None)),
    Case("right edge beyond the keys", seqlen_q=90, seqlen_kv=17, window=(None, 16)),
    Case("an edge of 62 bits", seqlen_q=40, seqlen_kv=40, window=(2**62, 2**62)),
    Case("one query, grouped heads, empty sequences", seqlens_q=(1, 0, 1), seqlens_kv=(9, 4, 0), heads_q=4, heads_kv=2, rest_q=1),
    Case("other head dims", seqlen_q=33, head_dim_qk=44, head_dim_v=20, is_causal=True),
    Case("packed, more queries than keys", seqlens_q=(50, 9), seqlens_kv=(8, 60), window=(5, None), rest_q=3, rest_kv=2),
]  # fmt: skip


@pytest.mark.parametrize("case", TRAPS, ids=lambda case: case.name)
def test_the_operators_traps_are_avoided(case, operator):
    assert check(case, torch.float16)


@pytest.mark.parametrize(
    ("window", "said"),
    [((None, 20), r"window \(-1, 20\) with up to 90 queries"), ((3, None), r"window \(3, -1\) with up to 90 queries")],
)
def test_a_window_edge_that_the_operator_would_move_is_refused(window, said, operator):
    inputs = Case(seqlen_q=90, seqlen_kv=17).inputs(torch.bfloat16)
    with pytest.raises(RuntimeError, match=said + " and 17 keys in a sequence: torch's FlashAttention would move its"):
        attention(inputs.q, inputs.k, inputs.v, window=window, impl="torch_flash")


@pytest.mark.parametrize("layout", ["transposed", "sliced"])
def test_other_memory_layouts_and_gradients(layout, operator):
    assert check(Case(batch=2, seqlen_q=40, heads_q=4, heads_kv=2, is_causal=True, layout=layout), torch.bfloat16)


def test_what_is_not_aligned_is_copied(operator):
    wide = torch.randn(2, 30, 4, 72).bfloat16()
    q = wide[..., 4:68]
    out = attention(q, q, q, impl="torch_flash", is_causal=True)
    torch.testing.assert_close(out, attention(*[q.contiguous()] * 3, impl="torch_flash", is_causal=True))
    leaf = q.detach().clone().requires_grad_()
    attention(leaf, leaf, leaf, impl="torch_flash").sum().backward()  # its dout is expanded
    odd = torch.randn(leaf.numel() + 4).bfloat16()[4:].view(leaf.shape)
    attention(leaf, leaf, leaf, impl="torch_flash").backward(odd)
    assert leaf.grad.isfinite().all()


def test_dropout_drops_and_scales_and_its_gradients_agree(operator):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 64, 2, 16, generator=generator).bfloat16().requires_grad_() for _ in range(2))
    v = torch.ones(1, 64, 2, 16).bfloat16().requires_grad_()
    torch.manual_seed(3)
    out = attention(q, k, v, dropout_p=0.5, impl="torch_flash")
    assert out.float().std() > 0.05  # a row's weights no longer sum to 1
    assert abs(out.float().mean() - 1.0) < 0.05
    out.sum().backward()
    assert v.grad.float().sum().item() == pytest.approx(out.float().sum().item(), rel=0.01)
    assert operator.arguments["dropout_p"] == 0.5


# ---- What is chosen --------------------------------------------------------------------------------------------------


REFUSED = [
    (qkv(), "dtype float32: expected float16 or bfloat16"),
    (half(qkv(attn_mask=x(5, 6))), "attn_mask is given"),
    (half(qkv(softcap=2.0)), "softcap is given: torch's FlashAttention has none"),
    (half(qkv(sinks=x(4))), "sinks is given: torch's FlashAttention has none"),
    (half(qkv(scale=-0.5)), "scale -0.5: expected a positive one"),
    (half(qkv(scale=0.0)), "scale 0.0: expected a positive one"),
    ({name: x(1, 4, 1, 264, **HALF) for name in "qkv"}, "head_dim 264: expected at most 256"),
    (half(qkv(q=x(2, 0, 4, 8))), "there are no queries or no keys"),
    (half(packed(cu_seqlens_q=cu(0), cu_seqlens_kv=cu(0))), "cu_seqlens hold no sequence"),
    ({name: x(65536, 1, 1, 8, **HALF) for name in "qkv"}, "65536 sequences: expected at most 65535"),
    (half(qkv(q=x(2, 5, 4, 8).requires_grad_(), return_lse=True)), "return_lse=True with gradients"),
    (half(qkv(q=x(2, 5, 4, 8).requires_grad_(), deterministic=True)), "deterministic=True: torch's FlashAttention follows"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_it_does_not_compute_is_refused_in_words(arguments, said, operator):
    with pytest.raises(RuntimeError, match="impl='torch_flash' cannot compute this call: " + said):
        attention(**arguments, impl="torch_flash")
    assert operator.calls == 0


def test_without_a_gpu_it_is_refused():
    with pytest.raises(
        RuntimeError, match="torch_flash' cannot compute this call: the tensors are on cpu: expected a GPU"
    ):
        attention(**half(qkv()), impl="torch_flash")


def test_transforms_of_torch_func_are_refused(operator):
    arguments = half(qkv())
    with pytest.raises(RuntimeError, match=r"a transform of torch.func is active"):
        torch.func.vmap(lambda q: attention(q, arguments["k"], arguments["v"], impl="torch_flash"))(
            arguments["q"][None]
        )


def test_deterministic_gradients_follow_torchs_setting(operator):
    q = x(1, 8, 2, 16, **HALF).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        attention(q, q, q, impl="torch_flash")
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.raises(RuntimeError, match="without warn_only"):
            attention(q, q, q, impl="torch_flash")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("capability", "head_dim", "dropout_p", "has_gradients", "is_refused"),
    [
        ((8, 6), 224, 0.0, True, True), ((8, 6), 224, 0.0, False, False), ((8, 0), 224, 0.0, True, False),
        ((8, 9), 256, 0.1, True, True), ((12, 0), 256, 0.0, True, False), ((12, 1), 200, 0.0, True, True),
        ((9, 0), 256, 0.1, True, False), ((8, 6), 192, 0.1, True, False),
    ],
)  # fmt: skip
def test_head_dims_above_192_need_the_shared_memory(
    capability, head_dim, dropout_p, has_gradients, is_refused, monkeypatch
):
    monkeypatch.setattr(aten_flash, "_is_small_gpu", lambda device: capability in aten_flash._SMALL_CAPABILITIES)
    q = x(1, 4, 1, head_dim, **HALF).requires_grad_(has_gradients)
    reason = aten_flash.call_refusal(call_of(q=q, k=q, v=q, dropout_p=dropout_p))
    assert (reason is not None) == is_refused, reason
    assert not is_refused or f"head_dim {head_dim} with gradients" in reason


class OnGpu(torch.Tensor):
    """A tensor of the CPU that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda", 0)


def on_gpu(arguments):
    return {
        name: value.as_subclass(OnGpu) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def chosen(capability, monkeypatch, **arguments):
    """What automatic dispatch chooses on a GPU of this capability."""
    properties = types.SimpleNamespace(
        name="a GPU", major=capability[0], minor=capability[1], shared_memory_per_block_optin=2**17, total_memory=2**34
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.delitem(libraries.unavailable, "sm90", raising=False)
    monkeypatch.setattr(libraries, "sm90_limits", libraries.Sm90Limits(8, 256, 256, (576, 512), 128))
    monkeypatch.setattr(aten_flash.torch.version, "hip", None)
    monkeypatch.setattr("flashmla_hf.backends.flex._HAS_TRITON", True)
    return dispatch._choose(call_of(**on_gpu(arguments)))


# torch_flash runs by its name alone.
ON_GPUS = [
    ((8, 0), {}, "flex"), ((12, 0), {}, "flex"), ((9, 0), {}, "sm90"), ((9, 0), {"softcap": 2.0}, "sm90"),
    ((8, 0), {"impl": "torch_flash"}, "torch_flash"), ((9, 0), {"impl": "torch_flash"}, "torch_flash"),
    ((8, 0), {"impl": "torch_flash", "window": (3, 0), "dropout_p": 0.1, "return_lse": True}, "torch_flash"),
]  # fmt: skip


@pytest.mark.parametrize(("capability", "options", "expected"), ON_GPUS)
def test_dispatch_chooses_by_capability_and_call(capability, options, expected, monkeypatch):
    assert chosen(capability, monkeypatch, **half(qkv()), **options) == expected


def test_dispatch_of_fp32_and_of_packs(monkeypatch):
    assert chosen((8, 0), monkeypatch, **qkv()) == "flex"
    assert chosen((8, 0), monkeypatch, **half(packed())) == "flex"
    assert chosen((8, 0), monkeypatch, **half(packed()), impl="torch_flash") == "torch_flash"


def test_dropout_without_the_operator_still_warns(monkeypatch):
    monkeypatch.setattr(notices, "_warned", set())
    with pytest.warns(UserWarning, match="dropout_p is computed by impl='sdpa'"):
        attention(**half(qkv()), dropout_p=0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hip": "6.3"}, "torch is built for ROCm"),
        ({"flash": False}, "this torch was built without FlashAttention"),
        ({"active": "FA4"}, "activate_flash_attention_impl('FA4') has replaced torch's operators"),
        ({"capability": (7, 5)}, "a GPU has 7.5: expected a compute capability from 8.0 to 12.1"),
    ],
    ids=["rocm", "no flash", "replaced", "old"],
)
def test_devices_are_refused_in_words(change, said, monkeypatch):
    major, minor = change.get("capability", (8, 0))
    properties = types.SimpleNamespace(name="a GPU", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", change.get("hip"))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: change.get("flash", True))
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: change.get("active"), raising=False)
    assert said in aten_flash.device_refusal(torch.device("cuda", 0))


# ---- How it is called ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"is_causal": False, "left": None, "right": None}),
        ({"is_causal": True}, {"is_causal": True, "left": None, "right": None}),
        ({"is_causal": True, "window": (3, 7)}, {"is_causal": False, "left": 3, "right": 0}),
        ({"window": (3, None)}, {"is_causal": False, "left": 3, "right": 4}),
        ({"window": (None, 2)}, {"is_causal": False, "left": None, "right": 2}),
        ({"window": (5, 4)}, {"is_causal": False, "left": None, "right": None}),
        ({"scale": 0.5}, {"scale": 0.5, "max_q": 5, "max_k": 6}),
    ],
)
def test_arguments_are_the_operators(options, expected, operator):
    attention(**half(qkv()), **options, impl="torch_flash")
    assert operator.arguments.items() >= expected.items()


def test_the_bounds_of_packs_are_never_those_the_operator_reads_otherwise(operator):
    attention(**half(packed(cu_seqlens_q=cu(0, 1, 2))), max_seqlen_q=1, max_seqlen_kv=5, impl="torch_flash")
    assert (operator.arguments["max_q"], operator.arguments["max_k"]) == (2, 5)


def test_the_arguments_of_a_call_are_not_changed_by_reading_them():
    arguments = aten_flash._arguments(call_of(**half(qkv())))
    with pytest.raises(dataclasses.FrozenInstanceError):
        arguments.left = 3


@pytest.mark.parametrize("is_packed", [False, True])
def test_torch_compile_makes_one_graph(is_packed, operator):
    arguments = half(packed() if is_packed else qkv())
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(arguments[name].shape, generator=generator).bfloat16().requires_grad_() for name in "qkv"]
    rest = {name: value for name, value in arguments.items() if name not in "qkv"}

    def step(q, k, v):
        return attention(q, k, v, is_causal=True, impl="torch_flash", **rest)

    eager = step(*leaves)
    wanted = torch.autograd.grad(eager.float().square().sum(), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    out = compiled(*leaves)
    gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    for got, want in zip((out, *gradients), (eager, *wanted), strict=True):
        torch.testing.assert_close(got, want)


def test_second_derivatives_raise(operator):
    q = torch.randn(1, 8, 1, 8).bfloat16().requires_grad_()
    out = attention(q, q, q, impl="torch_flash")
    (gradient,) = torch.autograd.grad(out.float().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="_flash_attention_backward"):
        gradient.float().sum().backward()


def test_the_check_can_fail(monkeypatch, operator):
    """The stand-in and the rule find a mask that is one key too wide."""
    arguments = aten_flash._arguments
    monkeypatch.setattr(
        aten_flash, "_arguments", lambda call: dataclasses.replace(arguments(call), is_causal=False, right=1)
    )
    with pytest.raises(AssertionError):
        check(Case(seqlen_q=70, is_causal=True), torch.bfloat16)


# ---- torch's own operators -------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or aten_flash.device_refusal(torch.device("cuda", 0)) is not None,
    reason="no GPU that runs torch's FlashAttention",
)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *TRAPS], ids=lambda case: case.name)
def test_the_operators_themselves_are_exact(case, dtype):
    check(case, dtype, "cuda")


@needs_gpu
@given(case=calls())
@settings(max_examples=100, deadline=None)
def test_random_calls_of_the_operators_themselves_are_exact_or_refused(case):
    check(case, torch.bfloat16, "cuda")


@needs_gpu
def test_the_operators_themselves_drop_and_scale():
    q, k = (torch.randn(2, 512, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    v = torch.ones(2, 512, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = attention(q, k[:, :, :2], v, dropout_p=0.25, is_causal=True)
    assert out.float().std() > 0.02
    assert abs(out.float().mean() - 1.0) < 0.02
    out.sum().backward()
    assert v.grad.float().sum().item() == pytest.approx(out.float().sum().item(), rel=0.01)


@needs_gpu
def test_the_operators_themselves_are_compiled():
    leaves = [torch.randn(2, 200, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    step = lambda q, k, v: attention(q, k, v, is_causal=True, impl="torch_flash")  # noqa: E731
    out = torch.compile(step, fullgraph=True)(*leaves)
    torch.testing.assert_close(out, step(*leaves))
    torch.autograd.grad(out.float().sum(), leaves)
