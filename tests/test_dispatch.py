"""The dispatch layer: every refusal by its exact words, the choice that is logged, the flash-attn signatures, and the error rule."""

import logging
import math
import re
import warnings

import numpy
import pytest
import torch
from cases import Case
from numerics import assert_close_to_reference, check
from small_calls import cu, packed, qkv, x

from flashmla_hf import attention, direct, dispatch, flash_attn_func, flash_attn_varlen_func, libraries, notices
from flashmla_hf.backend import Backend

P = "flashmla attention: "
# (arguments, exception, the whole message). One wrong thing each.
WRONG_CALLS = [
    (qkv(q=[1.0]), TypeError, P + "q: expected a torch.Tensor, got list"),
    (qkv(q=x(5, 4, 8)), ValueError, P + "q: expected [batch, seqlen, heads, dim] without cu_seqlens, got 3 dimensions [5, 4, 8]"),
    (packed(q=x(1, 9, 4, 8)), ValueError, P + "q: expected [total, heads, dim] with cu_seqlens, got 4 dimensions [1, 9, 4, 8]"),
    (qkv(k=x(2, 6, 2, 8, dtype=torch.float16)), TypeError, P + "k: expected dtype float32 (that of q), got float16"),
    (qkv(k=x(2, 6, 2, 8, device="meta")), ValueError, P + "k: expected device cpu (that of q), got meta"),
    (qkv(v=x(2, 6, 2, 0)), ValueError, P + "v: expected at least one head and one dimension, got shape [2, 6, 2, 0]"),
    (qkv(k=x(2, 6, 0, 8)), ValueError, P + "k: expected at least one head and one dimension, got shape [2, 6, 0, 8]"),
    (qkv(q=x(2, 5, 4, 16)[..., ::2]), ValueError, P + "q: expected a contiguous last dimension (call .contiguous()), got stride 2"),
    (qkv(k=x(2, 6, 8, 2).transpose(2, 3)), ValueError, P + "k: expected a contiguous last dimension (call .contiguous()), got stride 2"),
    ({name: x(2, 5, 4, 8, dtype=torch.int32) for name in "qkv"}, TypeError, P + "q: expected a floating dtype, got int32"),
    ({name: x(2, 5, 4, 8).to(torch.float8_e5m2) for name in "qkv"}, TypeError, P + "q: expected a floating dtype of 16 bits or more, or float8_e4m3fn, got float8_e5m2"),
    (qkv(attn_mask=x(5, 6).to(torch.float8_e4m3fn)), TypeError, P + "attn_mask: expected a floating dtype of 16 bits or more, got float8_e4m3fn"),
    (qkv(sinks=x(4).to(torch.float8_e5m2)), TypeError, P + "sinks: expected a floating dtype of 16 bits or more, got float8_e5m2"),
    (qkv(k=x(2, 6, 2, 16)), ValueError, P + "k: expected head_dim 8 (that of q), got 16"),
    (qkv(v=x(2, 7, 2, 8)), ValueError, P + "v: expected shape [2, 6, 2] before the last dimension (that of k), got [2, 7, 2]"),
    (qkv(k=x(3, 6, 2, 8), v=x(3, 6, 2, 8)), ValueError, P + "k: expected batch 2 (that of q), got 3"),
    (qkv(k=x(2, 6, 3, 8), v=x(2, 6, 3, 8)), ValueError, P + "k: expected a number of heads that divides q's 4, got 3"),
    (qkv(k=x(2, 6, 8, 8), v=x(2, 6, 8, 8)), ValueError, P + "k: expected a number of heads that divides q's 4, got 8"),
    (qkv(q=x(2, 5, 4, 8).to_sparse()), TypeError, P + "q: expected a dense strided tensor (pack ragged batches with cu_seqlens), got a sparse or nested tensor"),
    (qkv(scale="1"), TypeError, P + "scale: expected a number, got str"),
    (qkv(scale=math.nan), ValueError, P + "scale: expected a finite number, got nan"),
    (qkv(scale=1e300), ValueError, P + "scale: expected at most 3.4e+38 in magnitude (scores are float32), got 1e+300"),
    (qkv(softcap=1e-40), ValueError, P + "softcap: expected 0 (none) or from 1.2e-38 to 3.4e+38 (scores are float32), got 1e-40"),
    (qkv(softcap=1e39), ValueError, P + "softcap: expected 0 (none) or from 1.2e-38 to 3.4e+38 (scores are float32), got 1e+39"),
    (qkv(softcap=-1.0), ValueError, P + "softcap: expected 0 (none) or a positive number, got -1.0"),
    (qkv(softcap=math.inf), ValueError, P + "softcap: expected a finite number, got inf"),
    (qkv(dropout_p=1.0), ValueError, P + "dropout_p: expected a number in [0, 1), got 1.0"),
    (qkv(dropout_p=True), TypeError, P + "dropout_p: expected a number, got bool"),
    (qkv(is_causal="no"), TypeError, P + "is_causal: expected True or False, got 'no'"),
    (qkv(is_causal=None), TypeError, P + "is_causal: expected True or False, got None"),
    (qkv(is_causal=torch.ones(2, dtype=torch.bool)), TypeError, P + "is_causal: expected True or False, got a tensor [2] of bool"),
    (qkv(return_lse=2), TypeError, P + "return_lse: expected True or False, got 2"),
    (qkv(deterministic="warn"), TypeError, P + "deterministic: expected True or False, got 'warn'"),
    (qkv(impl=["cpu"]), TypeError, P + "impl: expected the name of an implementation or None, got ['cpu']"),
    (qkv(window=4), TypeError, P + "window: expected a pair (left, right), got 4"),
    (qkv(window=(-2, 0)), ValueError, P + "window left: expected a bound >= 0, or -1 or None for unbounded, got -2"),
    (qkv(window=(3, 1.5)), TypeError, P + "window right: expected an int or None, got 1.5"),
    (qkv(window=("a", 0)), TypeError, P + "window left: expected an int or None, got 'a'"),
    (qkv(window=(0, True)), TypeError, P + "window right: expected an int or None, got True"),
    (qkv(window=(torch.tensor(1.0), 0)), TypeError, P + "window left: expected an int or None, got a tensor [] of float32"),
    (qkv(window=(numpy.array([1, 2]), 0)), TypeError, P + "window left: expected an int or None, got array([1, 2])"),
    (qkv(precision=numpy.array([1, 2])), ValueError, P + "precision: expected None (that of the tensors) or 'fp8', got array([1, 2])"),
    (qkv(window=(torch.tensor([1, 2]), 0)), TypeError, P + "window left: expected an int or None, got a tensor [2] of int64"),
    (qkv(scale=10**400), ValueError, P + f"scale: expected a finite number, got {10**400}"),
    (qkv(scale=1j), TypeError, P + "scale: expected a number, got complex"),
    (qkv(scale=torch.ones(2)), TypeError, P + "scale: expected a number, got a tensor [2] of float32"),
    (qkv(scale=torch.tensor(0.5, requires_grad=True)), TypeError, P + "scale: expected a number, for which no gradient is computed (multiply q by it), got a tensor that requires one"),
    (packed(max_seqlen_q="8"), TypeError, P + "max_seqlen_q: expected an int, got '8'"),
    (packed(max_seqlen_kv=torch.tensor(-1)), ValueError, P + "max_seqlen_kv: expected a length >= 0, got -1"),
    (packed(max_seqlen_kv=torch.tensor([9, 9])), TypeError, P + "max_seqlen_kv: expected an int, got a tensor [2] of int64"),
    (qkv(attn_mask=x(1, 2, 1, 5, 6)), ValueError, P + "attn_mask: expected a shape that broadcasts to [2, 4, 5, 6], got [1, 2, 1, 5, 6]"),
    (qkv(attn_mask=x(5)), ValueError, P + "attn_mask: expected a shape that broadcasts to [2, 4, 5, 6], got [5]"),
    (qkv(sinks=x(2)), ValueError, P + "sinks: expected shape [4] (one logit per query head), got [2]"),
    (qkv(sinks=x(4, dtype=torch.int64)), TypeError, P + "sinks: expected a floating dtype, got int64"),
    (qkv(sinks=x(4, device="meta")), ValueError, P + "sinks: expected device cpu (that of q), got meta"),
    (qkv(attn_mask=x(2, 1, 5, 5)), ValueError, P + "attn_mask: expected a shape that broadcasts to [2, 4, 5, 6], got [2, 1, 5, 5]"),
    (qkv(attn_mask=x(2, 1, 5, 6, dtype=torch.int64)), TypeError, P + "attn_mask: expected dtype bool (true keeps) or a floating dtype (added), got int64"),
    (packed(attn_mask=x(1)), ValueError, P + "attn_mask: expected none with packed sequences (cu_seqlens already separate them), got a mask"),
    (packed(cu_seqlens_kv=None), ValueError, P + "cu_seqlens_kv: expected a tensor, since the other cu_seqlens is given (pass both or neither), got None"),
    (packed(cu_seqlens_q=None), ValueError, P + "cu_seqlens_q: expected a tensor, since the other cu_seqlens is given (pass both or neither), got None"),
    (packed(cu_seqlens_q=cu(0, 4, 9, dtype=torch.int64)), TypeError, P + "cu_seqlens_q: expected dtype int32, got int64"),
    (packed(cu_seqlens_q=cu(0, 0, 4, 0, 9)[::2]), ValueError, P + "cu_seqlens_q: expected a contiguous tensor [num_sequences + 1], got shape [3], stride (2,)"),
    (packed(cu_seqlens_q=cu(0, 9)), ValueError, P + "cu_seqlens_kv: expected 2 boundaries (as cu_seqlens_q), got 3"),
    (packed(max_seqlen_q=-1), ValueError, P + "max_seqlen_q: expected a length >= 0, got -1"),
    (packed(max_seqlen_kv=2.0), TypeError, P + "max_seqlen_kv: expected an int, got 2.0"),
    (qkv(max_seqlen_q=5), ValueError, P + "max_seqlen_q: expected none without cu_seqlens, got 5"),
    (qkv(impl="cuda"), ValueError, P + "impl: expected one of ['sm90', 'cpu', 'torch_flash', 'flex', 'sdpa', 'reference'] or None, got 'cuda'"),
    ({name: x(2, 5, 4, 8, dtype=torch.float64) for name in "qkv"}, RuntimeError, P + "no implementation computes this call. cpu: dtype float64: expected float32, float16 or bfloat16 (impl='reference' computes float64; in a model attn_implementation='eager')"),
    (qkv(impl="cpu", dropout_p=0.5), RuntimeError, P + "impl='cpu' cannot compute this call: dropout_p=0.5: expected 0 (impl='torch_flash', 'sdpa' and 'reference' compute dropout)"),
    (qkv(impl="cpu", attn_mask=x(5, 6)), RuntimeError, P + "impl='cpu' cannot compute this call: attn_mask is given: expected none (impl='sdpa' and impl='reference' take one)"),
    (qkv(impl="flex"), RuntimeError, P + "impl='flex' cannot compute this call: the tensors are on cpu: expected a GPU"),
    (qkv(impl="sdpa", softcap=2.0), RuntimeError, P + "impl='sdpa' cannot compute this call: softcap is given: torch's SDPA has none (impl='reference' computes it)"),
    (qkv(impl="sdpa", return_lse=True), RuntimeError, P + "impl='sdpa' cannot compute this call: return_lse=True: torch's SDPA returns none (impl='reference' does)"),
    (packed(impl="sdpa"), RuntimeError, P + "impl='sdpa' cannot compute this call: cu_seqlens are given: expected the dense layout"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG_CALLS, ids=lambda value: None)
def test_wrong_calls_raise_with_the_argument_the_expectation_and_the_value(arguments, error, message):
    with pytest.raises(error) as caught:
        attention(**arguments)
    assert str(caught.value) == message


WRONG_BOUNDARIES = {
    "does not begin at 0": cu(1, 4, 9),
    "falls": cu(0, 5, 4),
    "ends past the pack": cu(0, 4, 10),
    "negative": cu(0, -1, 9),
}


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("side", ["q", "kv"])
@pytest.mark.parametrize("values", WRONG_BOUNDARIES.values(), ids=WRONG_BOUNDARIES.keys())
def test_wrong_boundaries_raise_instead_of_reading_past_the_end(impl, side, values):
    expected = f"{P}cu_seqlens_{side}: expected boundaries that begin at 0, never fall and end at most at 9 (the packed length)"
    with pytest.raises(ValueError, match=re.escape(f"{expected}, got {values.tolist()}")):
        attention(**packed(**{f"cu_seqlens_{side}": values}, impl=impl))


@pytest.mark.parametrize("impl", [None, "cpu", "reference"])
@pytest.mark.parametrize("side", ["q", "kv"])
def test_too_small_a_bound_on_the_sequence_length_raises(impl, side):
    with pytest.raises(
        ValueError, match=rf"^{P}max_seqlen_{side}: expected at least 5 \(the longest sequence\), got 4$"
    ):
        attention(**packed(**{f"max_seqlen_{side}": 4}, impl=impl))


def test_numbers_beyond_float32_are_numbers_of_float64_tensors():
    q, k, v = (x(2, 5, 4, 8, dtype=torch.float64) for _ in "qkv")
    out = attention(q, k, v, scale=1e-300, softcap=1e300, impl="reference")
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out))


def test_a_missing_library_is_refused_with_the_reason_and_the_remedy(monkeypatch):
    monkeypatch.setitem(libraries.unavailable, "cpu", "libflashmla_cpu.so was not built")
    monkeypatch.setattr(direct, "enabled", False)  # which had found the library
    with pytest.raises(RuntimeError, match=re.escape("cpu: libflashmla_cpu.so was not built; reinstall flashmla_hf")):
        attention(**qkv())


def test_masks_and_dropout_warn_once_and_name_the_implementation(monkeypatch):
    monkeypatch.setattr(notices, "_warned", set())
    with pytest.warns(UserWarning, match="attn_mask is computed by impl='sdpa', exactly but not by the fused kernel"):
        attention(**qkv(attn_mask=x(5, 6)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(**qkv(attn_mask=x(5, 6)))
    with pytest.warns(UserWarning, match="attn_mask is computed by impl='reference'"):
        attention(**qkv(attn_mask=x(5, 6), softcap=1.0))


def test_choices_are_logged_once_with_the_reason(monkeypatch, caplog):
    monkeypatch.setattr(notices, "LOG_CHOICES", True)
    monkeypatch.setattr(notices, "_logged", set())
    with caplog.at_level(logging.WARNING, logger="flashmla_hf"):
        for _ in range(2):
            attention(**qkv())
        attention(**qkv(impl="reference"))
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "q[2, 5, 4, 8] k[2, 6, 2, 8] head_dim_v=8 float32 -> cpu (first choice on cpu)",
        "q[2, 5, 4, 8] k[2, 6, 2, 8] head_dim_v=8 float32 -> reference (explicit)",
    ]


def test_deterministic_follows_torch(monkeypatch):
    seen = []
    monkeypatch.setattr(direct, "enabled", False)
    monkeypatch.setitem(
        dispatch.IMPLEMENTATIONS,
        "cpu",
        Backend(lambda call: None, lambda call: (seen.append(call.deterministic), None)),
    )
    attention(**qkv())
    attention(**qkv(deterministic=True))
    torch.use_deterministic_algorithms(True)
    try:
        attention(**qkv())
        attention(**qkv(deterministic=False))
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [False, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flash_attn_signatures_are_thin_over_attention(dtype):
    case = Case(batch=2, seqlen_q=20, heads_q=4, heads_kv=2, head_dim_qk=16, has_sinks=True)
    t = case.inputs(dtype)
    out, lse, weights = flash_attn_func(
        t.q, t.k, t.v, 0.0, 0.3, True, window_size=(7, -1), softcap=5.0, return_attn_probs=True, s_aux=t.sinks
    )
    options = {"scale": 0.3, "is_causal": True, "window": (7, -1), "softcap": 5.0, "sinks": t.sinks}
    expected, expected_lse = attention(t.q, t.k, t.v, return_lse=True, **options)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert weights is None

    cu_seqlens = cu(0, 20, 40)
    flat = [tensor.reshape(40, *tensor.shape[2:]) for tensor in (t.q, t.k, t.v)]
    varlen = flash_attn_varlen_func(
        *flat, cu_seqlens, cu_seqlens, 20, 20, 0.0, 0.3, True, window_size=(7, -1), softcap=5.0, s_aux=t.sinks
    )
    torch.testing.assert_close(varlen.view(2, 20, 4, 16), expected)


def test_flash_attn_signatures_refuse_what_they_do_not_compute():
    q, k, v = qkv().values()
    with pytest.raises(ValueError, match="alibi_slopes: expected none"):
        flash_attn_func(q, k, v, alibi_slopes=x(4))
    with pytest.raises(ValueError, match="block_table: expected none"):
        flash_attn_varlen_func(q[0], k[0], v[0], cu(0, 5), cu(0, 6), 5, 6, block_table=x(1, 1))


def test_outliers_keep_the_error_rule():
    """Ten-fold queries: the softmax is peaked, and a kernel that skips or reorders rescaling shows it."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        check("cpu", Case(seqlen_q=200, heads_q=2, is_causal=True, magnitude=10.0), dtype)


def test_the_error_rule_itself_can_fail():
    """A wrong result must not pass: halved, zeroed, and one stray element."""
    ref = torch.randn(50, 8, dtype=torch.float64)
    eager = ref.to(torch.bfloat16)
    stray = eager.clone()
    stray[3, 3] += 0.1
    infinite = eager.clone()
    infinite[0, 0] = math.inf
    for wrong in (eager / 2, torch.zeros_like(eager), stray, infinite):
        with pytest.raises(AssertionError):
            assert_close_to_reference("wrong", wrong, eager, ref)


@pytest.mark.parametrize(
    "change", [{"window": (6, 0)}, {"softcap": 1.9}, {"scale": 0.26}], ids=lambda change: next(iter(change))
)
def test_the_check_of_a_whole_call_can_fail(change):
    """The suites decide by numerics.check: a slightly wrong window, softcap or scale must not pass it."""
    case = Case(seqlen_q=70, head_dim_qk=16, window=(5, 0), softcap=2.0, scale=0.25)
    check("cpu", case, torch.bfloat16)
    with pytest.raises(AssertionError):
        check(lambda **arguments: attention(**{**arguments, **change}), case, torch.bfloat16)
