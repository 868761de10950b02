"""Implementation ``torch_flash``: torch's operators give the reference's numbers, and what they do not compute is refused.

Their place is taken by flash_operator.py, which has their traps. The tests of a GPU at the end run the operators themselves.
"""

from __future__ import annotations

import dataclasses
import itertools
import types
import warnings

import flash_operator
import numerics
import pytest
import torch
from cases import CASES, Case, calls
from counting import counted_calls
from flash_operator import FlashOperator
from hypothesis import given, settings
from small_calls import cu, packed, qkv, x

from flashmla_hf import attention, dispatch, libraries, notices, reference
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


DROPPED = [
    Case("dense", batch=2, seqlen_q=70, seqlen_kv=150, heads_q=4, heads_kv=2, head_dim_qk=64, head_dim_v=64, is_causal=True),
    Case("window", seqlen_q=140, heads_q=2, head_dim_qk=64, head_dim_v=64, window=(50, 20)),
    Case("packed", seqlens_q=(60, 0, 33), seqlens_kv=(80, 9, 33), head_dim_qk=64, head_dim_v=64, is_causal=True, rest_q=3, rest_kv=2),
]  # fmt: skip


def check_dropout(case, dropout_p, device):
    """Output and gradients are those of weights with the mask that was drawn, each weight scaled by 1 / (1 - its probability).

    The mask depends on the generator's state and a weight's place alone. Values that are 1 for one key show it.
    """
    inputs = case.inputs(torch.bfloat16, device)
    options = {name: value for name, value in case.options.items() if name in ("is_causal", "window")}
    if case.is_packed:
        options |= {"cu_seqlens_q": inputs.cu_seqlens_q, "cu_seqlens_kv": inputs.cu_seqlens_kv}
    leaves = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]

    def run(q, k, v, p=dropout_p, impl=None):
        torch.manual_seed(5)
        return attention(q, k, v, dropout_p=p, impl=impl, **options)

    keys, dims = leaves[1].shape[-3], leaves[2].shape[-1]
    weights, dropped = [], []  # [..., rows, heads, keys] of all keys, head dim by head dim
    for first in range(0, keys, dims):
        ones = torch.zeros_like(leaves[2])
        for dim in range(min(dims, keys - first)):
            ones[..., first + dim, :, dim] = 1.0
        with torch.no_grad():
            shown = [
                run(*leaves[:2], ones, p, impl)[..., : keys - first]
                for p, impl in ((dropout_p, None), (0.0, "torch_flash"))
            ]
        dropped.append(shown[0].float())
        weights.append(shown[1].float())
    dropped, weights = torch.cat(dropped, -1), torch.cat(weights, -1)
    seen = weights > 1e-3  # of the rest bfloat16 shows too little
    kept = (dropped > 0) & seen
    rounded = round(256 * dropout_p) / 256
    count = int(seen.sum())
    assert abs(kept.sum().item() / count - (1 - rounded)) < 5 * (rounded * (1 - rounded) / count) ** 0.5
    factor = dropped[kept] / weights[kept]
    torch.testing.assert_close(factor, torch.full_like(factor, 1 / (1 - rounded)), rtol=0.02, atol=0)

    dout = torch.randn(leaves[0].shape, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    got_out = run(*leaves)
    got = torch.autograd.grad(got_out, leaves, dout)
    mask = (dropped > 0).double() / (1 - rounded)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    out = weighted(*exact, mask, case, inputs)
    wanted = torch.autograd.grad(out, exact, dout.double())
    for name, mine, theirs in zip(("out", "dq", "dk", "dv"), (got_out, *got), (out, *wanted), strict=True):
        assert (mine.double() - theirs).abs().max() < 0.03 * theirs.abs().max(), name


def weighted(q, k, v, mask, case, inputs):
    """Attention in float64 whose weights are multiplied by ``mask`` [batch, rows, heads, keys], or packed without the batch."""
    if inputs.cu_seqlens_q is None:
        ranges = [(slice(0, q.shape[1]), slice(0, k.shape[1]))]
    else:
        q, k, v, mask = q[None], k[None], v[None], mask[None]
        bounds = (inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_kv.tolist())
        ranges = [(slice(*rows), slice(*keys)) for rows, keys in zip(*map(itertools.pairwise, bounds), strict=True)]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype, device=q.device)
    group = q.shape[2] // k.shape[2]
    for rows, keys in ranges:
        if rows.start == rows.stop:
            continue
        query = q[:, rows].transpose(1, 2)
        key, value = (t[:, keys].transpose(1, 2).repeat_interleave(group, 1) for t in (k, v))
        scores = query @ key.transpose(2, 3) * q.shape[-1] ** -0.5
        left, right = case.window or (-1, -1)
        visible = reference.visible_keys(*scores.shape[2:], left, 0 if case.is_causal else right, q.device)
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1) * mask[:, rows, :, keys].transpose(1, 2)
        out[:, rows] = (weights @ value).transpose(1, 2)
    return out[0] if inputs.cu_seqlens_q is not None else out


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
@pytest.mark.parametrize("case", DROPPED, ids=lambda case: case.name)
def test_dropout_is_that_of_one_mask_forward_and_backward(case, dropout_p, operator):
    check_dropout(case, dropout_p, "cpu")
    assert operator.calls > 2


def test_the_check_of_dropout_can_fail(operator, monkeypatch):
    """A gradient through another mask, and a probability that is not the one drawn by."""
    kept = flash_operator._kept
    with monkeypatch.context() as patch:
        patch.setattr(FlashOperator, "_seed_of", staticmethod(lambda state: int(state[0]) + 1))
        with pytest.raises(AssertionError, match=r"d[qkv]"):
            check_dropout(DROPPED[0], 0.5, "cpu")
    monkeypatch.setattr(flash_operator, "_kept", lambda p, dropout_p, seed: kept(p, dropout_p / 2, seed))
    with pytest.raises(AssertionError):
        check_dropout(DROPPED[0], 0.5, "cpu")


def check_the_mean(device):
    """Equal weights and values of 1: the mean of the output is that of the factors, 1."""
    q = torch.zeros(4, 512, 4, 64, device=device, dtype=torch.bfloat16)
    torch.manual_seed(0)
    for dropout_p, most in ((0.1, 1.2e-3), (0.95, 1.5e-2)):  # five standard deviations
        out = attention(q, q, torch.ones_like(q), dropout_p=dropout_p).float()
        assert abs(out[..., 0].mean().item() - 1.0) < most


def test_dropout_keeps_the_mean(operator, monkeypatch):
    check_the_mean("cpu")
    monkeypatch.setattr(aten_flash, "_rounded_dropout", lambda dropout_p: dropout_p)
    with pytest.raises(AssertionError):
        check_the_mean("cpu")


def test_dropout_follows_the_generator(operator):
    arguments = {name: torch.randn(value.shape).bfloat16() for name, value in qkv().items()}
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(attention(**arguments, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    leaf = arguments["q"].requires_grad_()
    step = lambda q: attention(q, arguments["k"], arguments["v"], dropout_p=0.5)  # noqa: E731
    torch.manual_seed(1)
    (plain,) = torch.autograd.grad(step(leaf).sum(), leaf)
    torch.manual_seed(1)
    (again,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(step, leaf, use_reentrant=False).sum(), leaf)
    assert torch.equal(plain, again)


# ---- What is chosen --------------------------------------------------------------------------------------------------


REFUSED = [
    (qkv(), "dtype float32: expected float16 or bfloat16"),
    (half(qkv(attn_mask=x(5, 6))), "attn_mask is given"),
    (half(qkv(softcap=2.0)), "softcap is given: torch's FlashAttention has none"),
    (half(qkv(sinks=x(4))), "sinks is given: torch's FlashAttention has none"),
    (half(qkv(dropout_p=0.001)), r"dropout_p=0.001: torch's FlashAttention drops a multiple of 1/256 of the weights, here 0.0:"),
    (half(qkv(dropout_p=0.99)), r"dropout_p=0.99: torch's FlashAttention drops a multiple of 1/256 of the weights, here 0.98828125:"),
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


def test_a_setting_that_changes_before_backward_is_an_error(operator):
    q = x(1, 8, 2, 16, **HALF).requires_grad_()
    torch.use_deterministic_algorithms(True)
    try:
        out = attention(q, q, q, impl="torch_flash")
    finally:
        torch.use_deterministic_algorithms(False)
    with pytest.raises(RuntimeError, match="has changed between forward and backward"):
        out.sum().backward()
    attention(q, q, q, impl="torch_flash", deterministic=False).sum().backward()


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
    monkeypatch.setattr(aten_flash, "_IS_BUILT", True)
    monkeypatch.delitem(libraries.unavailable, "sm90", raising=False)
    monkeypatch.setattr(libraries, "sm90_limits", libraries.Sm90Limits(8, 256, 256, (576, 512), 128, 16, 256))
    monkeypatch.setattr(aten_flash.torch.version, "hip", None)
    monkeypatch.setattr("flashmla_hf.backends.flex._HAS_TRITON", True)
    return dispatch._choose(call_of(**on_gpu(arguments)))


# On a Hopper sm90 has the first word, and has no dropout.
ON_GPUS = [
    ((8, 0), {}, "torch_flash"), ((8, 6), {"window": (3, 0)}, "torch_flash"), ((12, 0), {"return_lse": True}, "torch_flash"),
    ((8, 0), {"softcap": 2.0}, "flex"), ((8, 9), {"sinks": x(4)}, "flex"), ((8, 0), {"scale": -1.0}, "flex"),
    ((7, 5), {}, "flex"), ((12, 2), {}, "flex"), ((8, 0), {"deterministic": True, "gradients": True}, "flex"),
    ((8, 0), {"return_lse": True, "gradients": True}, "flex"), ((8, 0), {"gradients": True}, "torch_flash"),
    ((9, 0), {}, "sm90"), ((9, 0), {"softcap": 2.0}, "sm90"), ((9, 0), {"head_dim": 44}, "torch_flash"),
    ((9, 0), {"head_dim": 44, "softcap": 2.0}, "flex"), ((8, 0), {"head_dim": 264}, "flex"),
    ((9, 0), {"dropout_p": 0.1}, "torch_flash"), ((8, 0), {"dropout_p": 0.1, "is_causal": True}, "torch_flash"),
    ((7, 5), {"dropout_p": 0.1}, "sdpa"), ((9, 0), {"dropout_p": 0.1, "softcap": 2.0}, "reference"),
    ((9, 0), {"dropout_p": 0.001}, "sdpa"), ((9, 0), {"dropout_p": 0.1, "attn_mask": x(5, 6)}, "sdpa"),
    ((8, 0), {"impl": "torch_flash"}, "torch_flash"), ((9, 0), {"impl": "torch_flash"}, "torch_flash"),
    ((8, 0), {"impl": "torch_flash", "window": (3, 0), "dropout_p": 0.1, "return_lse": True}, "torch_flash"),
]  # fmt: skip


@pytest.mark.parametrize(("capability", "options", "expected"), ON_GPUS)
@pytest.mark.filterwarnings("ignore:flashmla attention. (dropout_p|attn_mask) is computed by")
def test_dispatch_chooses_by_capability_and_call(capability, options, expected, monkeypatch):
    options, tensors = dict(options), half(qkv())
    if head_dim := options.pop("head_dim", None):
        tensors = {name: x(*tensor.shape[:-1], head_dim, **HALF) for name, tensor in tensors.items()}
    if options.pop("gradients", False):
        tensors["k"].requires_grad_()
    assert chosen(capability, monkeypatch, **tensors, **options) == expected


def test_dispatch_of_fp32_and_of_packs(monkeypatch):
    assert chosen((8, 0), monkeypatch, **qkv()) == "flex"
    assert chosen((9, 0), monkeypatch, **qkv()) == "flex"
    assert chosen((8, 0), monkeypatch, **half(packed())) == "torch_flash"
    assert chosen((9, 0), monkeypatch, **half(packed())) == "sm90"
    assert chosen((9, 0), monkeypatch, **half(packed()), dropout_p=0.2) == "torch_flash"
    assert chosen((8, 0), monkeypatch, **half(packed()), impl="torch_flash") == "torch_flash"


def test_without_our_library_a_hopper_runs_torchs(monkeypatch):
    chosen((9, 0), monkeypatch, **half(qkv()))
    monkeypatch.setitem(libraries.unavailable, "sm90", "libflashmla_sm90.so was not built")
    assert dispatch._choose(call_of(**on_gpu(half(qkv())))) == "torch_flash"


def test_the_reasons_against_torchs_operators_are_named_where_nothing_computes_a_call(monkeypatch):
    said = r"torch_flash: dtype float64: expected float16 or bfloat16; flex: dtype float64"
    with pytest.raises(RuntimeError, match=said):
        chosen((8, 0), monkeypatch, **{name: value.double() for name, value in qkv().items()})


def test_dropout_that_a_gpu_computes_in_a_fused_kernel_warns_of_nothing(operator, monkeypatch):
    monkeypatch.setattr(notices, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(**half(qkv()), dropout_p=0.1)
        attention(**half(packed()), dropout_p=0.1, window=(2, 0))
    assert operator.calls == 2


def test_dropout_that_a_gpu_does_not_compute_in_a_fused_kernel_says_why(monkeypatch):
    monkeypatch.setattr(notices, "_warned", set())
    with pytest.warns(
        UserWarning, match=r"Without dropout_p the fused kernel runs; torch_flash: dtype float32: expected"
    ):
        assert chosen((8, 0), monkeypatch, **qkv(), dropout_p=0.1) == "sdpa"


def test_on_a_cpu_dropout_warns_as_ever(monkeypatch):
    monkeypatch.setattr(notices, "_warned", set())
    with pytest.warns(UserWarning, match=r"dropout_p is computed by impl='sdpa'.*the fused kernel runs\.$"):
        attention(**half(qkv()), dropout_p=0.1)


def test_torchs_operators_are_those_that_this_module_calls(monkeypatch):
    assert aten_flash._has_signatures()
    for field, other in (("arguments", lambda arguments: arguments[1:]), ("returns", lambda returned: returned[:2])):
        schema = aten_flash._BACKWARD.default._schema
        parts = {name: getattr(schema, name) for name in ("arguments", "returns")}
        parts[field] = other(parts[field])
        changed = types.SimpleNamespace(default=types.SimpleNamespace(_schema=types.SimpleNamespace(**parts)))
        with monkeypatch.context() as patch:
            patch.setattr(aten_flash, "_BACKWARD", changed)
            assert not aten_flash._has_signatures()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hip": "6.3"}, "torch is built for ROCm"),
        ({"flash": False}, "this torch was built without FlashAttention"),
        ({"signatures": False}, "has other FlashAttention operators than torch 2.10 to "),
        ({"active": "FA4"}, "activate_flash_attention_impl('FA4') has replaced torch's operators"),
        ({"capability": (7, 5)}, "a GPU has 7.5: expected a compute capability from 8.0 to 12.1"),
    ],
    ids=["rocm", "no flash", "other operators", "replaced", "old"],
)
def test_devices_are_refused_in_words(change, said, monkeypatch):
    major, minor = change.get("capability", (8, 0))
    properties = types.SimpleNamespace(name="a GPU", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", change.get("hip"))
    monkeypatch.setattr(aten_flash, "_IS_BUILT", change.get("flash", True))
    monkeypatch.setattr(aten_flash, "_HAS_SIGNATURES", change.get("signatures", True))
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
def test_torch_compile_takes_a_tensor_twice(is_packed, operator):
    """torch.compile refuses an autograd.Function that gets one."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(*((9, 2, 8) if is_packed else (2, 9, 2, 8)), generator=generator).bfloat16().requires_grad_()
    bounds = {"cu_seqlens_q": (boundaries := cu(0, 4, 9)), "cu_seqlens_kv": boundaries} if is_packed else {}

    def step(q, bounds):
        return attention(q, q, q, is_causal=True, window=(20, None), impl="torch_flash", **bounds)

    outs = [f(q, bounds) for f in (step, torch.compile(step, fullgraph=True, backend="aot_eager"))]
    gradients = [torch.autograd.grad(out.float().square().sum(), q)[0] for out in outs]
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("is_packed", [False, True])
def test_torch_compile_makes_one_graph(is_packed, operator):
    arguments = half(packed() if is_packed else qkv())
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(arguments[name].shape, generator=generator).bfloat16().requires_grad_() for name in "qkv"]
    rest = {name: value for name, value in arguments.items() if name not in "qkv"}

    def step(q, k, v):
        return attention(q, k, v, is_causal=True, impl="torch_flash", **rest)

    eager = step(*leaves)
    assert eager.is_contiguous()
    wanted = torch.autograd.grad(eager.float().square().sum(), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    out = compiled(*leaves)
    gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    for got, want in zip((out, *gradients), (eager, *wanted), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_torch_compile_keeps_dropout_random_and_the_choice_the_same(is_deterministic, operator):
    leaves = [torch.randn(value.shape).bfloat16().requires_grad_() for value in qkv().values()]
    step = torch.compile(
        lambda q, k, v, p: attention(q, k, v, is_causal=True, dropout_p=p), fullgraph=True, backend="aot_eager"
    )
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        for dropout_p in (0.5, 0.25):  # the second as a symbolic number, perhaps
            before = operator.calls
            outs = [step(*leaves, dropout_p) for _ in range(2)]
            assert operator.calls == before + 2
            assert operator.arguments["dropout_p"] == dropout_p
            assert not torch.equal(*outs)
            torch.autograd.grad(outs[1].float().sum(), leaves)
    finally:
        torch.use_deterministic_algorithms(False)


def test_torch_compile_draws_the_same_mask_in_a_layer_that_runs_again(operator, monkeypatch):
    """Values of 1, and a gradient of v that is the sum of the weights: another mask in the second run would give another sum."""
    q = torch.zeros(1, 64, 2, 16, **HALF)
    v = torch.ones(1, 64, 2, 16, **HALF).requires_grad_()

    def layer(v):
        return attention(q, q, v * 1.0, dropout_p=0.5).float().square()

    def difference():
        torch.manual_seed(0)
        step = lambda v: torch.utils.checkpoint.checkpoint(layer, v, use_reentrant=False).sum()  # noqa: E731
        before = operator.calls
        out = torch.compile(step, fullgraph=True, backend="aot_eager")(v)
        (gradient,) = torch.autograd.grad(out, v)
        if operator.calls == before + 1:
            pytest.skip("this torch keeps what it was told to compute again")  # 2.11
        assert operator.calls == before + 2
        # The derivative of a sum of squares along v itself, of which the square is homogeneous.
        return abs((gradient.float() * v.detach().float()).sum().item() / (2 * out.item()) - 1.0)

    assert difference() < 2e-3
    torch._dynamo.reset()
    seeds = itertools.count()
    monkeypatch.setattr(
        flash_operator, "_kept", lambda p, rate, _, kept=flash_operator._kept: kept(p, rate, next(seeds))
    )
    assert difference() > 2e-3  # so the check sees another mask


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
@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
@pytest.mark.parametrize("case", DROPPED, ids=lambda case: case.name)
def test_dropout_of_the_operators_themselves_is_that_of_one_mask(case, dropout_p):
    check_dropout(case, dropout_p, "cuda")


@needs_gpu
def test_dropout_of_the_operators_themselves_keeps_the_mean():
    check_the_mean("cuda")


@needs_gpu
@pytest.mark.parametrize("is_compiled", [False, True])
def test_dropout_of_the_operators_themselves_follows_the_generator(is_compiled):
    q = torch.randn(2, 128, 4, 64, device="cuda", dtype=torch.bfloat16)
    step = lambda q: attention(q, q, q, is_causal=True, dropout_p=0.2)  # noqa: E731
    if is_compiled:
        step = torch.compile(step, fullgraph=True)
    step(q)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(step(q))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@needs_gpu
def test_dropout_of_the_operators_themselves_in_a_cuda_graph_draws_anew_at_every_replay():
    q = torch.randn(2, 128, 4, 64, device="cuda", dtype=torch.bfloat16)
    attention(q, q, q, dropout_p=0.2)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, q, q, dropout_p=0.2)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


@needs_gpu
def test_a_gpu_chooses_the_operators_themselves_for_dropout():
    q = torch.randn(1, 64, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with warnings.catch_warnings(), counted_calls() as calls:
        warnings.simplefilter("error")
        attention(q, q, q, dropout_p=0.1).sum().backward()
        attention(q, q, q, dropout_p=0.1, window=(9, 0))
    assert calls == {"torch_flash": 2}


@needs_gpu
def test_gradients_of_the_operators_themselves_are_deterministic_on_request():
    leaves = [torch.randn(1, 2048, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    torch.use_deterministic_algorithms(True)
    try:
        found = [torch.autograd.grad(attention(*leaves, impl="torch_flash").float().sum(), leaves) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, *found))


@needs_gpu
def test_the_operators_themselves_are_compiled():
    leaves = [torch.randn(2, 200, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    step = lambda q, k, v: attention(q, k, v, is_causal=True, impl="torch_flash")  # noqa: E731
    out = torch.compile(step, fullgraph=True)(*leaves)
    torch.testing.assert_close(out, step(*leaves))
    torch.autograd.grad(out.float().sum(), leaves)
