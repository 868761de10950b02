"""Attention to latents with gradients: rows that are keys and, in their first columns, values.

    FLASHMLA_LATENT_CASES=20000 FLASHMLA_FUZZ_SEED=1 python3 -m pytest tests/test_latent.py -k random

Small blocks make small calls take every path of the stream. A GPU without the kernel skips the cases of ``sm90``.
"""

import dataclasses
import functools
import math
import os
import random

import cases
import gpu_support
import numerics
import pytest
import torch
from cases import Case
from latent_support import DEVICES, DIMS, DTYPES, check, ours
from peak_elements import LargestResult
from torch import func

from flashmla_hf import attention, latent, latent_attention, latent_stream, libraries
from flashmla_hf.libraries import Sm90Limits

SEED = int(os.environ.get("FLASHMLA_FUZZ_SEED", "0"))
RANDOM_CASES = {"sm90": 1200, "cpu": 300}
RANDOM_CASES = {name: int(os.environ.get("FLASHMLA_LATENT_CASES", count)) for name, count in RANDOM_CASES.items()}
FORWARD = torch.ops.flashmla.flash_attn_latent.default
BACKWARD = torch.ops.flashmla.flash_attn_latent_backward.default

sm90 = pytest.param("sm90", marks=pytest.mark.skipif(gpu_support.sm90_missing() is not None, reason="needs sm90"))
each_impl = pytest.mark.parametrize("impl", [sm90, "cpu"])


@pytest.fixture
def blocks(monkeypatch):
    """Sets the rows and keys of a block, and the rows of a chunk of the forward."""

    def set_sizes(rows, keys, chunk):
        monkeypatch.setattr(latent_stream, "BLOCKS", dict.fromkeys(latent_stream.BLOCKS, (rows, keys)))
        monkeypatch.setattr(latent_stream, "CHUNK_ROWS", chunk)

    return set_sizes


# ---- Right answers ---------------------------------------------------------------------------------------------------


def random_latent_case(source: random.Random, impl: str) -> Case:
    rows = {"sm90": [(576, 512), (576, 512), (96, 64), (192, 128)], "cpu": [(96, 64), (72, 64), (40, 40)]}[impl]
    case = cases.random_case(source.randint, source.choice, is_packed=False, rows=rows)
    dims = sorted((case.head_dim_qk, case.head_dim_v))
    # Values are as large as keys here: of 4 and more, every softmax has one key, for which eager makes no error.
    case = dataclasses.replace(case, magnitude=min(case.magnitude, 2.0))
    if impl == "cpu":
        case = dataclasses.replace(
            case, outliers=1.0
        )  # in fp32 they are large against the error of sums in another order
        dims = sorted(max(1, dim - source.choice([0, source.randint(0, 7)])) for dim in dims)
    heads_kv = source.choice([1, 1, 1, 2])
    case = dataclasses.replace(
        case, head_dim_qk=dims[1], head_dim_v=dims[0], heads_kv=heads_kv,
        heads_q=heads_kv * source.choice([1, 2, 3, 5, 16]), is_latent=True,
    )  # fmt: skip
    if source.randint(1, 20) == 1:
        case = dataclasses.replace(case, batch=1, heads_q=128, heads_kv=1)
    return case


@each_impl
def test_random_calls_keep_the_error_rule(impl, blocks):
    before, dtypes = dataclasses.replace(numerics.looks), DTYPES[impl]
    count, failures = RANDOM_CASES[impl] // len(dtypes), []
    for dtype in dtypes:
        source = random.Random(f"latents {impl} {dtype} {SEED}")
        for _ in range(count):
            case, seed = random_latent_case(source, impl), source.randint(0, 2**31)
            sizes = source.choice([1, 7, 40, 300]), source.choice([1, 5, 16, 300]), source.choice([1, 50, 300])
            wants = source.choice([("q", "k", "sinks")] * 3 + [("q",), ("k",), ("sinks",), ("q", "k")])
            blocks(*sizes)
            try:
                check(impl, case, dtype, seed, wants=wants, has_dlse=source.choice([True, False]))
            except (AssertionError, RuntimeError) as error:
                failures.append(f"{str(error).splitlines()[0]}\n  {case} {dtype} seed={seed} {sizes=} {wants=}")
    numerics.assert_rule_was_kept(failures, before, count * len(dtypes))


CASES = [
    Case("16 heads", batch=2, seqlen_q=37, heads_q=16, is_causal=True, **DIMS),
    Case("128 heads", seqlen_q=33, heads_q=128, is_causal=True, **DIMS),
    Case("full", seqlen_q=19, seqlen_kv=45, heads_q=3, **DIMS),
    Case("one key", seqlen_q=5, seqlen_kv=1, heads_q=2, **DIMS),
    Case("no keys, sinks", seqlen_q=5, seqlen_kv=0, heads_q=2, has_sinks=True, **DIMS),
    Case("no queries", seqlen_q=0, seqlen_kv=5, heads_q=2, **DIMS),
    Case("more queries than keys", seqlen_q=40, seqlen_kv=17, heads_q=4, is_causal=True, has_sinks=True, **DIMS),
    Case("window", seqlen_q=50, seqlen_kv=70, heads_q=4, window=(9, 3), **DIMS),
    Case("window, softcap, sinks", seqlen_q=50, heads_q=4, window=(9, 0), softcap=3.0, has_sinks=True, **DIMS),
    Case("transposed", batch=2, seqlen_q=40, heads_q=4, is_causal=True, layout="transposed", **DIMS),
    Case("sliced", batch=2, seqlen_q=40, heads_q=4, is_causal=True, layout="sliced", **DIMS),
    Case("every column is a value", seqlen_q=40, heads_q=4, heads_kv=2, head_dim_qk=64, head_dim_v=64, is_latent=True),
]


@each_impl
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_keep_the_error_rule(impl, case, blocks):
    for dtype in DTYPES[impl]:
        check(impl, case, dtype)
    blocks(64, 16, 100)
    check(impl, case, DTYPES[impl][-1])


@pytest.mark.parametrize(
    "lost", ["the row as a value", "the row as a key", "a block of keys", "the edge of a mask", "delta"]
)
def test_the_cases_find_what_is_lost(lost, monkeypatch, blocks):
    add_product, hide = latent_stream._add_product, latent_stream._hide

    def without(total, a, b, alpha=1.0):
        is_dk = a.stride(0) == 1 and total.shape[0] == 37
        if is_dk and total.shape[1] == (512 if lost == "the row as a value" else 576):
            return total
        return add_product(total, a, b, alpha)

    if lost.startswith("the row"):
        monkeypatch.setattr(latent_stream, "_add_product", without)
    elif lost == "a block of keys":
        blocks(64, 16, 10**6)
        keys = latent_stream._Visibility.keys
        monkeypatch.setattr(
            latent_stream._Visibility, "keys", lambda self, queries: range(keys(self, queries).start, 16)
        )
    elif lost == "delta":
        monkeypatch.setattr(latent_stream, "_row_products", lambda a, b: a.new_zeros(a.shape[0], dtype=torch.float32))
    else:
        monkeypatch.setattr(
            latent_stream, "_hide", lambda scores, diagonal, is_above: hide(scores, diagonal + 1, is_above)
        )
    with pytest.raises(AssertionError):
        check("cpu", CASES[0], torch.float32)


@each_impl
def test_gradients_of_huge_scores_are_finite(impl):
    """Scores of up to 1e7, rounded by more than P bears: P is at most 1, so no gradient is larger than that of one key a row."""
    for magnitude in (60.0, 600.0, 1900.0):
        case = Case(seqlen_q=64, heads_q=4, is_causal=True, magnitude=magnitude, **DIMS)
        found = numerics.run(ours(impl), case, case.inputs(DTYPES[impl][-1], DEVICES[impl]))
        dk = found.grads["k"].float()
        assert dk.isfinite().all()
        assert dk.abs().max() < 64 * 4 * 40 * magnitude


@each_impl
def test_rows_that_no_query_sees_reach_nothing(impl, blocks):
    """Before a window, and behind it; a NaN there is no NaN anywhere, and their gradient is 0."""
    device, dtype = DEVICES[impl], DTYPES[impl][-1]
    case = Case(seqlen_q=9, seqlen_kv=80, heads_q=4, window=(12, 0), **DIMS)
    inputs = case.inputs(dtype, device)
    blocks(8, 16, 20)
    results = []
    for value in (0.0, math.nan, math.inf):
        k = inputs.k.clone()
        k[:, : 80 - 9 - 12] = value
        leaves = [x.detach().requires_grad_() for x in (inputs.q, k)]
        out, lse = latent_attention(*leaves, head_dim_v=512, window=(12, 0), return_lse=True, impl=impl)
        results.append((out, lse, *torch.autograd.grad([out, lse], leaves, [inputs.dout, inputs.dlse])))
    assert not results[0][3][:, : 80 - 9 - 12].any()
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@each_impl
def test_a_repeated_call_gives_the_same_bits(impl):
    case = Case(batch=2, seqlen_q=300, heads_q=16, is_causal=True, has_sinks=True, **DIMS)
    inputs = case.inputs(torch.bfloat16, DEVICES[impl])
    first, *others = (numerics.run(ours(impl), case, inputs) for _ in range(4))
    for other in others:
        assert all(torch.equal(x, first.tensors[name]) for name, x in other.tensors.items())


def test_gradcheck_of_the_reference():
    case = Case(batch=2, seqlen_q=4, seqlen_kv=5, heads_q=4, head_dim_qk=6, head_dim_v=4, is_causal=True,
                heads_kv=2, has_sinks=True, softcap=2.0, is_latent=True)  # fmt: skip
    inputs = case.inputs(torch.float64)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.sinks)]

    def function(q, k, sinks):
        return latent_attention(
            q, k, head_dim_v=4, sinks=sinks, is_causal=True, softcap=2.0, return_lse=True, impl="reference"
        )

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_it_is_attention_with_a_view_of_the_rows():
    case = Case(batch=2, seqlen_q=40, heads_q=4, is_causal=True, **DIMS)
    inputs = case.inputs(torch.float32)
    mine = numerics.run(ours("cpu"), case, inputs)
    other = numerics.run(functools.partial(attention, impl="cpu"), case, inputs)
    for name, x in mine.tensors.items():
        torch.testing.assert_close(x, other.tensors[name], rtol=1e-4, atol=1e-4)


# ---- Memory ----------------------------------------------------------------------------------------------------------


def largest_of_both_passes(inputs):
    options = latent_stream.Options(head_dim_v=16, scale=0.2, window_left=-1, window_right=0, softcap=2.0)
    with LargestResult() as largest:
        out, lse = latent_stream.forward(inputs.q, inputs.k, None, options)
        needs = (True, True, False)
        latent_stream.backward(inputs.dout, inputs.dlse, inputs.q, inputs.k, out, lse, None, options, needs)
    return largest.elements


def test_no_tensor_grows_with_the_square_of_the_length(blocks):
    case = Case(seqlen_q=700, heads_q=4, head_dim_qk=24, head_dim_v=16, heads_kv=1, is_latent=True)
    inputs = case.inputs(torch.bfloat16)
    blocks(64, 32, 256)
    assert largest_of_both_passes(inputs) == inputs.q.numel()
    blocks(10**6, 10**6, 256)  # what the measure finds
    assert largest_of_both_passes(inputs) >= 4 * 700 * 700


# ---- Refusals --------------------------------------------------------------------------------------------------------

Q, K = torch.ones(2, 8, 4, 96), torch.ones(2, 8, 1, 96)
REFUSED = [
    ({"head_dim_v": 97}, ValueError, "head_dim_v: expected from 1 to 96 (the columns of k), got 97"),
    ({"head_dim_v": 0}, ValueError, "head_dim_v: expected from 1 to 96 (the columns of k), got 0"),
    ({"head_dim_v": 64.0}, TypeError, "head_dim_v: expected an int, got 64.0"),
    ({"k": [1]}, TypeError, "k: expected a torch.Tensor, got list"),
    ({"q": None}, TypeError, "q: expected a torch.Tensor, got NoneType"),
    ({"k": K[0]}, ValueError, "k: expected [batch, seqlen, heads, dim] without cu_seqlens, got 3 dimensions [8, 1, 96]"),
    ({"k": K[..., :80]}, ValueError, "k: expected head_dim 96 (that of q), got 80"),
    ({"k": K[:1]}, ValueError, "k: expected batch 2 (that of q), got 1"),
    ({"k": K.repeat(1, 1, 3, 1)}, ValueError, "k: expected a number of heads that divides q's 4, got 3"),
    ({"k": K.half()}, TypeError, "k: expected dtype float32 (that of q), got float16"),
    ({"k": K.to(torch.float8_e4m3fn)}, TypeError,
     "k: expected 16 or 32 bits with head_dim_v (fp8 has no attention to latents), got float8_e4m3fn"),
    ({"softcap": -1.0}, ValueError, "softcap: expected 0 (none) or a positive number, got -1.0"),
    ({"is_causal": "no"}, TypeError, "is_causal: expected True or False, got 'no'"),
    ({"sinks": torch.ones(3)}, ValueError, "sinks: expected shape [4] (one logit per query head), got [3]"),
    ({"impl": "flex"}, ValueError, "impl: expected one of ['sm90', 'cpu', 'reference'] or None, got 'flex'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED, ids=[message[:60] for _, _, message in REFUSED])
def test_arguments_are_refused_by_name(changes, kind, message):
    with pytest.raises(kind) as error:
        latent_attention(**{"q": Q, "k": K, "head_dim_v": 64, **changes})
    assert str(error.value) == f"flashmla attention: {message}"


def test_what_no_kernel_computes_is_refused_and_never_given_to_another():
    with pytest.raises(RuntimeError, match=r"no kernel computes.*cpu: dtype float64.*pass impl='reference'"):
        latent_attention(Q.double(), K.double(), head_dim_v=64)
    with pytest.raises(RuntimeError, match=r"impl='cpu' cannot compute this call: dtype float64"):
        latent_attention(Q.double(), K.double(), head_dim_v=64, impl="cpu")
    with pytest.raises(RuntimeError, match=r"impl='sm90' cannot compute this call: "):
        latent_attention(Q, K, head_dim_v=64, impl="sm90")


class _OnGpu:
    """The few answers of a tensor on a Hopper GPU that refusals ask for."""

    def __init__(self, width, offset=0):
        x = torch.ones(1, 16, 1, width + 8, dtype=torch.bfloat16)[..., offset : offset + width]
        self.device, self.dtype, self.shape = torch.device("cuda"), torch.bfloat16, x.shape
        for name in ("stride", "storage_offset", "numel", "element_size"):
            setattr(self, name, getattr(x, name))


@pytest.mark.parametrize(("width", "values", "expected"), [
    (576, 512, None), (288, 256, None), (96, 64, None), (128, 128, None),
    (584, 512, "q and k: head_dim 584: expected a multiple of 8 up to 576"),
    (576, 520, "v: head_dim 520: expected a multiple of 8 up to 512"),
    (573, 512, "q and k: head_dim 573: expected a multiple of 8 up to 576"),
])  # fmt: skip
def test_a_hopper_gpu_has_a_kernel_up_to_its_width(width, values, expected, monkeypatch):
    class Properties:
        major, minor, name = 9, 0, "a Hopper GPU"

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(libraries, "sm90_limits", Sm90Limits(8, 256, 256, (576, 512), 128, 16, 256))
    monkeypatch.delitem(libraries.unavailable, "sm90", raising=False)
    call = latent.validate(
        torch.ones(1, 4, 2, 8), torch.ones(1, 4, 1, 8), torch.ones(1, 4, 1, 8), None, False, None, 0.0, None, 0.0, None, None,
        None, None, True, None, False, None,
    )  # fmt: skip
    call = dataclasses.replace(call, q=_OnGpu(width), k=_OnGpu(width), v=_OnGpu(values))
    assert latent._sm90_refusal(call) == expected
    # A row that TMA cannot read is copied, unless the implementation is asked for by name.
    call = dataclasses.replace(call, k=_OnGpu(width, offset=1), v=_OnGpu(values, offset=1))
    assert latent._sm90_refusal(call) == expected
    message = latent._sm90_refusal(dataclasses.replace(call, impl="sm90"))
    assert message == (
        expected or "k: expected an address and strides in multiples of 16 bytes; pass a contiguous copy (.clone())"
    )


def test_wrong_tensors_of_the_operators_raise():
    q, k = torch.ones(1, 4, 2, 8), torch.ones(1, 4, 1, 8)
    out, lse = FORWARD(q, k, None, 4, 1.0, -1, -1, 0.0)
    needs = (True, True, False)
    with pytest.raises(RuntimeError, match=r"flash_attn_latent: head_dim_v: expected from 1 to 8"):
        FORWARD(q, k, None, 9, 1.0, -1, -1, 0.0)
    with pytest.raises(RuntimeError, match=r"flash_attn_latent_backward: dout: expected float32 \[1, 4, 2, 4\]"):
        BACKWARD(out[..., :3], None, q, k, out, lse, None, 4, 1.0, -1, -1, 0.0, *needs)
    with pytest.raises(RuntimeError, match=r"flash_attn_latent_backward: lse: expected"):
        BACKWARD(out, None, q, k, out, lse[..., :1], None, 4, 1.0, -1, -1, 0.0, *needs)


# ---- Derivatives and compilers ---------------------------------------------------------------------------------------


def small(**options):
    case = Case(
        batch=2,
        seqlen_q=7,
        heads_q=4,
        head_dim_qk=12,
        head_dim_v=8,
        heads_kv=1,
        is_causal=True,
        is_latent=True,
        **options,
    )
    return case, case.inputs(torch.float32)


@pytest.mark.parametrize("has_sinks", [False, True])
def test_opcheck_accepts_the_operators(has_sinks):
    _, inputs = small(has_sinks=has_sinks)
    q, k, sinks = inputs.q, inputs.k, inputs.sinks
    options = (8, 0.3, 5, 0, 2.0)
    leaves = (x if x is None else x.detach().requires_grad_() for x in (q, k, sinks))
    torch.library.opcheck(FORWARD, (*leaves, *options))
    out, lse = FORWARD(q, k, sinks, *options)
    for needs in ((True, True, has_sinks), (True, False, False), (False, True, False)):
        torch.library.opcheck(
            BACKWARD,
            (inputs.dout, inputs.dlse, q, k, out, lse, sinks, *options, *needs),
            # There is no second derivative, and saying so is autograd's default.
            test_utils=("test_schema", "test_faketensor"),
        )


def loss(q, k, sinks=None, impl="cpu"):
    out, lse = latent_attention(q, k, head_dim_v=8, is_causal=True, sinks=sinks, return_lse=True, impl=impl)
    return out.square().sum() + lse.sin().sum()


def gradients(function, *tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    return torch.autograd.grad(function(*leaves), leaves)


def test_torch_compile_has_no_graph_breaks_and_the_same_gradients():
    _, inputs = small(has_sinks=True)
    tensors = (inputs.q, inputs.k, inputs.sinks)
    expected = gradients(loss, *tensors)
    for dynamic in (False, True):
        got = gradients(torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager"), *tensors)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_autocast_changes_nothing():
    case, inputs = small()
    expected = numerics.run(ours("cpu"), case, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = numerics.run(ours("cpu"), case, inputs)
    assert all(torch.equal(x, expected.tensors[name]) for name, x in got.tensors.items())


def test_second_and_forward_mode_derivatives_raise_by_name():
    _, inputs = small()
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k)]
    first = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"flash_attn_latent_backward: has no derivative.*impl='reference'"):
        first[0].sum().backward()
    with pytest.raises(RuntimeError, match=r"flash_attn_latent: k: expected no tangent.*impl='reference'"):
        func.jvp(lambda k: loss(inputs.q, k), (inputs.k,), (inputs.k,))


def test_torch_func_gives_the_same_gradients():
    _, inputs = small()
    expected = gradients(loss, inputs.q, inputs.k)
    for function in (func.grad(loss, argnums=(0, 1)), func.jacrev(loss, argnums=(0, 1))):
        for got, wanted in zip(function(inputs.q, inputs.k), expected, strict=True):
            torch.testing.assert_close(got, wanted)


def test_gradients_that_lie_as_they_like():
    """Expanded, transposed, and of the lse alone."""
    _, inputs = small()
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k)]
    out, lse = latent_attention(*leaves, head_dim_v=8, is_causal=True, return_lse=True, impl="cpu")
    for output, grad in (
        (out, torch.ones(()).expand_as(out)),
        (out, inputs.dout.transpose(1, 3).contiguous().transpose(1, 3)),
        (lse, torch.ones(()).expand_as(lse)),
    ):
        got, expected = (
            torch.autograd.grad(output, leaves, x, retain_graph=True)
            for x in (grad, grad.clone(memory_format=torch.contiguous_format))
        )
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
        assert all(x.abs().max() > 0 for x in got)
