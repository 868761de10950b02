"""What a GPU kernel must bear: threads, values it may not see, scores and sinks of any size, no memory, many heads, nothing.

    python3 -m pytest tests/test_gpu_robust.py                                   # on a Hopper GPU
    FLASHMLA_SM90_TESTS_ON=cpu python3 -m pytest tests/test_gpu_robust.py        # the same promises of the CPU kernel

Float64 decides, on the rows that a test is about: the truth is computed without the values that must not be seen. What needs
a process of its own (autograd's thread starts once in a process) is a function here, called by ``in_subprocess``.
"""

from __future__ import annotations

import math
import threading
from dataclasses import replace

import numerics
import pytest
import torch
from cases import SM90_ROWS, Case
from gpu_support import DEVICE, HALF, IMPL, cu, half, in_subprocess, needs_memory, needs_sm90, rows

from flashmla_hf import attention

pytestmark = needs_sm90
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="is a GPU's")

MASKS = {"full": {}, "causal": {"is_causal": True}, "window": {"window": (40, 9)}}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
POISONS = (math.nan, math.inf, -math.inf)
ALL_NEEDED = (True, True, True, False)


def operator(inputs: dict, is_deterministic: bool = False):
    """forward() -> (out, lse) and backward(dout, dlse, out, lse) -> gradients by the operators, past dispatch and autograd."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    boundaries = inputs.get("cu_seqlens_q"), inputs.get("cu_seqlens_kv")
    numbers = (q.shape[-3], k.shape[-3], q.shape[-1] ** -0.5, -1, 0, 0.0, is_deterministic)

    def forward():
        return torch.ops.flashmla.flash_attn_forward(q, k, v, None, *boundaries, *numbers)

    def backward(dout, dlse, out, lse):
        return torch.ops.flashmla.flash_attn_backward(
            dout, dlse, q, k, v, out, lse, None, *boundaries, *numbers, *ALL_NEEDED
        )[:3]

    return forward, backward


# ---- Threads ---------------------------------------------------------------------------------------------------------


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


def call_of(row, *, is_packed: bool = False, device: str | torch.device = DEVICE, seed: int = 0) -> dict:
    """q, k, v, dout and the boundaries of one call."""
    shape = {"seqlens_q": (333, 1, 500), "rest_q": 7} if is_packed else {"batch": 2, "seqlen_q": 421}
    case = Case(heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], **shape)
    inputs = case.inputs(torch.bfloat16, device, seed)
    found = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    if is_packed:
        found |= {"cu_seqlens_q": inputs.cu_seqlens_q, "cu_seqlens_kv": inputs.cu_seqlens_kv}
    return found


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
        "test_gpu_robust", f"backward_first_on_autograds_thread({row}, {is_packed}, {options}, {is_compiled})"
    )
    assert float(printed.splitlines()[-1]) < 0.05


# ---- Values that a row may not see -----------------------------------------------------------------------------------


def poisoned(x: torch.Tensor, index, value: float) -> torch.Tensor:
    x = x.clone()
    x[index] = value
    return x


def results_of(impl, case: Case, inputs) -> dict[str, torch.Tensor]:
    """out, lse and the gradients of one call: what flows back is inputs.dout and inputs.dlse as they are, in dead rows too."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in "qkv"}
    if inputs.sinks is not None:
        leaves["sinks"] = inputs.sinks.detach().requires_grad_()
    arguments = {"cu_seqlens_q": inputs.cu_seqlens_q, "cu_seqlens_kv": inputs.cu_seqlens_kv, **case.options}
    if impl == "eager":
        out, lse = numerics.eager(**leaves, **arguments)
    else:
        out, lse = attention(**leaves, **arguments, return_lse=True, impl=impl)
    flowing = (inputs.dout.to(out.dtype), inputs.dlse.to(lse.dtype))
    if impl == "eager":  # logsumexp of nothing gives NaN to autograd
        flowing = (flowing[0], flowing[1].masked_fill(lse == -math.inf, 0.0))
    grads = torch.autograd.grad((out, lse), list(leaves.values()), flowing)
    named = {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def check_rows(case: Case, clean, dirty, seen: dict[str, tuple], dtype) -> dict[str, torch.Tensor]:
    """The results on ``dirty`` are, at the places ``seen`` (name -> index), those of ``clean`` by the rule of numerics."""
    got, eager = results_of(IMPL, case, dirty), results_of("eager", case, clean)
    truth = results_of("reference", case, clean.to(torch.float64))
    largest_lse = float(truth["lse"][truth["lse"].isfinite()].abs().max())
    for name, index in seen.items():
        ref, x, yardstick = truth[name][index], got[name][index], eager[name][index]
        precision = dtype if name == "dsinks" else x.dtype
        # The whole tensor's largest value and error: a place of few numbers says little about what rounding costs.
        floor = numerics.tolerance_floor(precision, truth[name], largest_lse if name.startswith("d") else 0.0)
        error = numerics.largest_error(eager[name].nan_to_num(0.0, 0.0, 0.0), truth[name].nan_to_num(0.0, 0.0, 0.0))
        numerics.assert_within(name, x, yardstick, ref, 3.0 * error + 2.0 * floor)
    return got


def cases_of_every_kernel(**shape):
    """(case, dtype) of every row of head dims and mask, the dtypes in turn."""
    found = []
    for n, row in enumerate(SM90_ROWS):
        for m, (name, mask) in enumerate(MASKS.items()):
            case = Case(f"{row[0]}/{row[1]} {name}", head_dim_qk=row[0], head_dim_v=row[1], **shape, **mask)
            found += [(case, dtype) for dtype in (HALF if name == "causal" else (HALF[(n + m) % 2],))]
    return found


def of_every_kernel(**shape):
    return pytest.mark.parametrize(
        ("case", "dtype"), cases_of_every_kernel(**shape), ids=lambda x: getattr(x, "name", None) or str(x)
    )


def rows_of(lengths, chosen) -> torch.Tensor:
    """Numbers of the rows of the sequences ``chosen``."""
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    found = [torch.arange(starts[n], starts[n] + lengths[n]) for n in chosen]
    return torch.cat(found).to(DEVICE)


# Edges of tiles of 64, 80, 128 and 176 rows, one row, none; what is hidden stands before and behind what is seen.
LENGTHS = (100, 37, 1, 64, 130, 0, 65, 3, 128, 90, 250, 77)
LENGTHS_KV = (60, 40, 9, 64, 200, 5, 65, 130, 1, 90, 180, 0)


def spoil(inputs, rows_q, rows_kv, value, names=("q", "k", "v", "dout", "dlse")):
    """``inputs`` of packed sequences with ``value`` in these rows."""
    changes = {name: poisoned(getattr(inputs, name), rows_q, value) for name in ("q", "dout") if name in names}
    changes |= {name: poisoned(getattr(inputs, name), rows_kv, value) for name in ("k", "v") if name in names}
    if "dlse" in names:
        changes["dlse"] = poisoned(inputs.dlse, (slice(None), rows_q), value)
    return replace(inputs, **changes)


@of_every_kernel(heads_q=4, heads_kv=2, seqlens_q=LENGTHS, seqlens_kv=LENGTHS_KV)
@pytest.mark.parametrize("odd", [0, 1])
def test_what_a_neighbouring_sequence_holds_reaches_no_other(case, dtype, odd):
    clean = case.inputs(dtype, DEVICE)
    hidden, seen = (range(first, len(LENGTHS), 2) for first in (odd, 1 - odd))
    (q, kv), (hidden_q, hidden_kv) = (
        [rows_of(lengths, chosen) for lengths in (LENGTHS, LENGTHS_KV)] for chosen in (seen, hidden)
    )
    for value in POISONS:
        dirty = spoil(clean, hidden_q, hidden_kv, value)
        check_rows(
            case, clean, dirty, {"out": (q,), "lse": (slice(None), q), "dq": (q,), "dk": (kv,), "dv": (kv,)}, dtype
        )


@of_every_kernel(heads_q=3, heads_kv=1, seqlens_q=LENGTHS)
@pytest.mark.parametrize("names", ["q", "k", "v", "dout", "dlse"])
def test_each_tensor_of_a_neighbouring_sequence_alone_reaches_no_other(case, dtype, names):
    clean = case.inputs(dtype, DEVICE)
    seen, hidden = (rows_of(LENGTHS, range(first, len(LENGTHS), 2)) for first in (0, 1))
    places = {"out": (seen,), "lse": (slice(None), seen), "dq": (seen,), "dk": (seen,), "dv": (seen,)}
    check_rows(case, clean, spoil(clean, hidden, hidden, math.nan, (names,)), places, dtype)


@of_every_kernel(heads_q=4, heads_kv=2, seqlens_q=(100, 0, 61), seqlens_kv=(90, 5, 77), rest_q=200, rest_kv=300)
def test_what_lies_past_the_last_boundary_reaches_no_sequence(case, dtype):
    for has_sinks in (False, True):
        case = replace(case, has_sinks=has_sinks)
        clean = case.inputs(dtype, DEVICE)
        q, kv = torch.arange(161, device=DEVICE), torch.arange(172, device=DEVICE)
        rest_q, rest_kv = (torch.arange(n, m, device=DEVICE) for n, m in ((161, 361), (172, 472)))
        places = {"out": (q,), "lse": (slice(None), q), "dq": (q,), "dk": (kv,), "dv": (kv,)}
        if has_sinks:
            places["dsinks"] = (slice(None),)
        for value in POISONS:
            got = check_rows(case, clean, spoil(clean, rest_q, rest_kv, value), places, dtype)
            assert (got["out"][rest_q] == 0).all()
            assert (got["lse"][:, rest_q] == -math.inf).all()
            for name, rest in (("dq", rest_q), ("dk", rest_kv), ("dv", rest_kv)):
                assert (got[name][rest] == 0).all(), name


@of_every_kernel(heads_q=4, heads_kv=2, batch=3, seqlen_q=165, seqlen_kv=141)
def test_what_another_batch_entry_or_head_holds_reaches_no_other(case, dtype):
    """Dense: the tiles end within an entry, 165 and 141 rows long."""
    clean = case.inputs(dtype, DEVICE)
    for value in POISONS:
        dirty = replace(
            clean, **{name: poisoned(getattr(clean, name), 1, value) for name in ("q", "k", "v", "dout", "dlse")}
        )
        entries = torch.tensor([0, 2], device=DEVICE)
        check_rows(case, clean, dirty, dict.fromkeys(("out", "lse", "dq", "dk", "dv"), (entries,)), dtype)
        # The first kv head, and with it query heads 0 and 1.
        dirty = replace(
            clean, **{name: poisoned(getattr(clean, name), (slice(None), slice(None), 0), value) for name in ("k", "v")}
        )
        heads = (slice(None), slice(None), slice(2, None))
        second = (slice(None), slice(None), 1)
        places = {"out": heads, "lse": (slice(None), slice(2, None)), "dq": heads, "dk": second, "dv": second}
        check_rows(case, clean, dirty, places, dtype)


@rows
@half
@pytest.mark.parametrize("tensor", ["dlse", "dout", "q"])
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_what_flows_into_a_row_that_sees_no_key_goes_nowhere(row, dtype, tensor, is_packed):
    """Causal, aligned at the end: the first rows of a sequence see nothing where queries outnumber keys."""
    dims = {"heads_q": 4, "heads_kv": 2, "head_dim_qk": row[0], "head_dim_v": row[1], "is_causal": True}
    if is_packed:
        case = Case(seqlens_q=(80, 100, 150), seqlens_kv=(60, 100, 9), **dims)
        rows_q = torch.tensor([*range(20), *range(180, 180 + 141)], device=DEVICE)
        q = torch.tensor([*range(20, 180), *range(321, 330)], device=DEVICE)
        dead, dead_lse, seen, seen_lse = rows_q, (slice(None), rows_q), (q,), (slice(None), q)
    else:
        case = Case(batch=2, seqlen_q=230, seqlen_kv=60, **dims)
        dead, dead_lse = (slice(None), slice(170)), (slice(None), slice(None), slice(170))
        seen, seen_lse = (slice(None), slice(170, None)), (slice(None), slice(None), slice(170, None))
    clean = case.inputs(dtype, DEVICE)
    everything = (slice(None),)
    for value in POISONS:
        index = dead_lse if tensor == "dlse" else dead
        dirty = replace(clean, **{tensor: poisoned(getattr(clean, tensor), index, value)})
        places = {"out": seen, "lse": seen_lse, "dq": seen, "dk": everything, "dv": everything}
        got = check_rows(case, clean, dirty, places, dtype)
        assert (got["out"][dead] == 0).all()
        assert (got["lse"][dead_lse] == -math.inf).all()
        assert (got["dq"][dead] == 0).all()


@half
def test_rows_that_a_window_leaves_without_keys_pass_nothing_on(dtype):
    for case in (
        Case(seqlen_q=300, seqlen_kv=100, heads_q=4, heads_kv=2, window=(None, 0)),
        Case(seqlen_q=300, seqlen_kv=100, heads_q=4, heads_kv=2, window=(30, 5)),
        Case(seqlens_q=(300, 40), seqlens_kv=(100, 90), heads_q=4, heads_kv=2, window=(20, 0)),
    ):
        clean = case.inputs(dtype, DEVICE)
        dead = results_of("reference", case, clean.to(torch.float64))["lse"] == -math.inf
        assert dead.any()
        everything = (slice(None),)
        dirty = replace(clean, dlse=clean.dlse.masked_fill(dead, math.nan))
        check_rows(case, clean, dirty, dict.fromkeys(("out", "lse", "dq", "dk", "dv"), everything), dtype)


def test_a_padded_batch_of_a_model_holds_what_it_likes_behind_its_padding():
    """Through the integration: the padding's hidden states are NaN in every layer's queries, keys and values."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="flashmla").to(
        DEVICE, torch.bfloat16
    )
    ids = torch.randint(3, 90, (3, 90), device=DEVICE)
    for side in ("left", "right"):
        mask = torch.ones_like(ids)
        for n, padding in enumerate((0, 20, 67)):
            mask[n, slice(padding) if side == "left" else slice(90 - padding, None)] = 0
        embedded = model.get_input_embeddings()(ids).detach()
        found = []
        for filling in (0.0, math.nan):
            given = embedded.masked_fill(mask[..., None] == 0, filling).requires_grad_()
            out = model.model(inputs_embeds=given, attention_mask=mask, use_cache=False).last_hidden_state
            seen = out[mask == 1]
            (grad,) = torch.autograd.grad(seen.float().square().sum(), given)
            found.append((seen.detach(), grad[mask == 1]))
        for x, y in zip(*found, strict=True):
            assert y.isfinite().all(), side
            torch.testing.assert_close(y, x, rtol=0.02, atol=0.02)


def test_the_check_of_hidden_values_notices_one_that_is_seen():
    case = Case(seqlens_q=(100, 60), heads_q=4, heads_kv=2, is_causal=True)
    clean = case.inputs(torch.bfloat16, DEVICE)
    first = torch.arange(100, device=DEVICE)
    for name in ("q", "k", "v", "dout"):
        rows = torch.tensor([50], device=DEVICE)  # within the first sequence
        dirty = spoil(clean, rows, rows, math.nan, (name,))
        with pytest.raises(AssertionError, match="infinities or NaNs at other places"):
            check_rows(case, clean, dirty, {"out": (first,), "dq": (first,), "dk": (first,), "dv": (first,)}, torch.bfloat16)  # fmt: skip


# ---- Scores and sinks of any size ------------------------------------------------------------------------------------


@rows
@half
@pytest.mark.parametrize("value", [1e4, 2e4, 40064.0, 6e4])
def test_one_visible_key_gives_its_value_however_large_the_score(row, dtype, value):
    """Scores of 1e9 to 6e10: exact in no dtype, but one key's weight is 1, and the row is alive."""
    q = torch.full((1, 70, 2, row[0]), value, device=DEVICE).to(dtype)
    k = q[:, :1].clone()
    v = torch.randn(1, 1, 2, row[1], device=DEVICE).to(dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, return_lse=True, impl=IMPL)
    assert torch.equal(out, v.expand_as(out))
    score = row[0] ** 0.5 * float(q.detach().flatten()[0]) ** 2
    torch.testing.assert_close(lse.double(), torch.full_like(lse, score, dtype=torch.float64), rtol=1e-5, atol=0)
    dout = torch.randn_like(out)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    expected = dout.double().sum(1, keepdim=True)
    torch.testing.assert_close(dv.double(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))
    assert all(x.isfinite().all() for x in (dq, dk))


@rows
@half
@masks
def test_the_largest_of_huge_scores_wins(row, dtype, mask):
    """Values of 2e4, scores of 1e9: where float64 gives one key all of the weight, the row is that key's value."""
    case = Case(seqlen_q=200, seqlen_kv=260, heads_q=4, heads_kv=2, head_dim_qk=row[0], head_dim_v=row[1], magnitude=2e4, **mask)  # fmt: skip
    inputs = case.inputs(dtype, DEVICE)
    leaves = [getattr(inputs, name).clamp(-6e4, 6e4).requires_grad_() for name in "qkv"]
    out, lse = attention(*leaves, return_lse=True, impl=IMPL, **case.options)
    wide = [x.detach().double() for x in leaves]
    exact, exact_lse = attention(*wide, return_lse=True, impl="reference", **case.options)
    scores = torch.einsum("bihd,bjhd->bhij", wide[0], wide[1].repeat_interleave(2, 2)) * row[0] ** -0.5
    visible = numerics.visible_keys(200, 260, *case_bounds(case), device=DEVICE)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    best = scores.topk(2, dim=-1).values
    decided = (best[..., 0] - best[..., 1] > 1e-4 * best[..., 0].abs() + 1e3).transpose(1, 2)
    assert decided.float().mean() > 0.9
    assert out.isfinite().all()
    torch.testing.assert_close(out[decided].double(), exact[decided], rtol=0, atol=0.05)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=0)
    grads = torch.autograd.grad(out, leaves, inputs.dout)
    assert all(grad.isfinite().all() for grad in grads)


def case_bounds(case: Case) -> tuple[int, int]:
    left, right = (-1 if bound is None else bound for bound in case.window or (None, None))
    return left, 0 if case.is_causal else right


SINKS = (math.nan, math.inf, -math.inf, 0.5)


@rows
@half
@pytest.mark.parametrize("is_packed", [False, True], ids=["dense", "packed"])
def test_sinks_of_nan_and_infinity_give_what_float64_gives(row, dtype, is_packed):
    """A head each; some rows see no key and some do. Whatever one head's sink is, the next head is untouched."""
    shape = (
        {"seqlens_q": (80, 33), "seqlens_kv": (60, 50), "rest_q": 5}
        if is_packed
        else {"batch": 2, "seqlen_q": 90, "seqlen_kv": 70}
    )
    case = Case(heads_q=4, head_dim_qk=row[0], head_dim_v=row[1], is_causal=True, has_sinks=True, **shape)
    inputs = case.inputs(dtype, DEVICE)
    inputs = replace(inputs, sinks=torch.tensor(SINKS, device=DEVICE), dlse=torch.zeros_like(inputs.dlse))
    got, exact = results_of(IMPL, case, inputs), results_of("reference", case, inputs.to(torch.float64))
    for name in ("out", "lse"):
        x, ref = got[name].double(), exact[name]
        same = torch.where(ref.isnan(), x.isnan(), torch.where(ref.isinf(), x == ref, x.isfinite()))
        heads = same.flatten(0, -3).all(0).all(-1) if name == "out" else same.movedim(-2, 0).flatten(1).all(1)
        assert heads.all(), f"{name}: sinks {[s for s, is_same in zip(SINKS, heads, strict=True) if not is_same]}"
        finite = ref.isfinite()
        torch.testing.assert_close(x[finite], ref[finite], rtol=0.02, atol=0.02)
    plain = slice(2, 4)  # -inf: no sink at all; 0.5
    for name in ("dq", "dk", "dv"):
        ref = exact[name][..., plain, :]
        torch.testing.assert_close(
            got[name][..., plain, :].double(), ref, rtol=0.03, atol=0.03 * float(ref.abs().max())
        )
    torch.testing.assert_close(got["dsinks"][plain].double(), exact["dsinks"][plain], rtol=0.03, atol=0.03)


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
def test_more_sequences_than_a_grid_is_high(row):
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
def test_more_heads_than_a_grid_is_high(row, group):
    if DEVICE == "cuda":
        needs_memory(12)
    dims = {"heads_q": MANY, "heads_kv": MANY // group, "head_dim_qk": row[0], "head_dim_v": row[1]}
    inputs = Case(batch=1, seqlen_q=3, **dims).inputs(torch.bfloat16, DEVICE)
    assert_many_are_right({"q": inputs.q, "k": inputs.k, "v": inputs.v}, lambda x: x)


# ---- Nothing ---------------------------------------------------------------------------------------------------------


@half
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 0), (2, 0, 7), (2, 7, 0)], ids=str)
@pytest.mark.parametrize("way", ["attention", "compiled"])
def test_a_sum_over_nothing_has_a_backward(shape, dtype, way):
    """The gradient of .sum() is expanded: strides of zero, also where there are no elements to be told apart."""
    torch._dynamo.reset()
    call = torch.compile(attention, fullgraph=True, backend="aot_eager") if way == "compiled" else attention
    batch, seqlen_q, seqlen_kv = shape
    q, k, v = (
        torch.randn(batch, n, 2, 64, device=DEVICE, dtype=dtype, requires_grad=True)
        for n in (seqlen_q, seqlen_kv, seqlen_kv)
    )
    for mask in MASKS.values():
        out = call(q, k, v, impl=IMPL, **mask)
        assert out.shape == q.shape
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        for x, grad in zip((q, k, v), grads, strict=True):
            assert grad.shape == x.shape
            assert (grad == 0).all()


@half
def test_packed_rows_of_nothing_have_a_backward(dtype):
    for boundaries, total in ((cu(0, 0, 0), 0), (cu(0), 0), (cu(0, 0), 5), (cu(0), 5)):
        q = torch.randn(total, 2, 64, device=DEVICE, dtype=dtype, requires_grad=True)
        out = attention(q, q, q, cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, is_causal=True, impl=IMPL)
        (grad,) = torch.autograd.grad(out.sum(), q)
        assert (out == 0).all()
        assert (grad == 0).all()


def test_a_compiled_call_takes_a_length_of_nothing_after_others():
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (70, 0, 33, 0):
        q, k, v = (
            torch.randn(2, seqlen, 2, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        out = compiled(q, k, v, is_causal=True, impl=IMPL)
        expected = attention(q, k, v, is_causal=True, impl=IMPL)
        assert torch.equal(out, expected)
        for x, y in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) for o in (out, expected)), strict=True):
            torch.testing.assert_close(x, y, rtol=0.02, atol=0.02)


# ---- Graphs that are kept, errors of others, shared GPUs -------------------------------------------------------------


@pytest.mark.parametrize("impl", [IMPL, "flex"])
def test_a_graph_that_is_kept_gives_its_gradients_twice(impl):
    """``flex`` may refuse, in our words; torch's own error about donated buffers is none."""
    if impl == "flex" and DEVICE == "cpu":
        pytest.skip("flex is a GPU's")
    q, k, v = (torch.randn(1, 256, 4, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    exact = attention(*(x.double() for x in (q, k, v)), is_causal=True, impl="reference")
    expected = torch.autograd.grad(exact.sum(), (q, k, v))
    out = attention(q, k, v, is_causal=True, impl=impl)
    for _ in range(2):
        refusal = None
        try:
            grads = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
        except RuntimeError as error:
            refusal = str(error)
        if refusal is not None:
            assert impl == "flex", refusal
            assert "flashmla" in refusal, refusal
            assert "retain_graph" in refusal, refusal
            return
        for x, y in zip(grads, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=0.05, atol=0.05)


def call_after_somebody_elses_error():
    """In a fresh process: an error of the CUDA runtime is pending, and is not ours."""
    inputs = call_of((128, 128))
    packed = call_of((128, 128), is_packed=True)
    leaves = [x.requires_grad_() for x in (inputs["q"], inputs["k"], inputs["v"])]
    for _ in range(2):
        error = torch.cuda.cudart().cudaHostRegister(0, 4096, 0)
        assert int(error) != 0, "expected an error"
        out = attention(*leaves, is_causal=True, impl=IMPL)
        torch.autograd.grad(out, leaves, out.detach())
        attention(**packed, is_causal=True, impl=IMPL)
    print("went on")


@on_gpu
def test_an_error_that_somebody_else_left_is_not_reported_as_ours():
    assert in_subprocess("test_gpu_robust", "call_after_somebody_elses_error()").endswith("went on")


def deterministic_backward_on_few_multiprocessors():
    """In a fresh process: a green context of some of the GPU's multiprocessors. Computed, or refused; never a hang."""
    from torch.cuda.green_contexts import GreenContext

    inputs = Case(batch=4, seqlen_q=3000, heads_q=8, heads_kv=2, head_dim_qk=128).inputs(torch.bfloat16, DEVICE)
    forward, backward = operator({"q": inputs.q, "k": inputs.k, "v": inputs.v}, is_deterministic=True)
    out, lse = forward()
    expected = backward(inputs.dout, None, out, lse)
    torch.cuda.synchronize()
    context = GreenContext.create(num_sms=16, device_id=0)
    context.set_context()
    try:
        got = backward(inputs.dout, None, out, lse)
        torch.cuda.current_stream().synchronize()
    except RuntimeError as error:
        if "flash_attn_backward" not in str(error):
            raise
        print("refused")
        return
    finally:
        context.pop_context()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    print("computed")


@on_gpu
def test_the_deterministic_backward_ends_where_it_has_few_multiprocessors():
    pytest.importorskip("torch.cuda.green_contexts")
    try:
        printed = in_subprocess("test_gpu_robust", "deterministic_backward_on_few_multiprocessors()", timeout=90)
    except AssertionError as error:
        if "not supported" in str(error) or "Green Context" in str(error):
            pytest.skip("this driver has no green contexts")
        raise
    assert printed.splitlines()[-1] in ("computed", "refused")
