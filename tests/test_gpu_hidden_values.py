"""Values that a row may not see change nothing in it: neighbouring sequences, padding, other heads, rows without keys.

    python3 -m pytest tests/test_gpu_hidden_values.py                                   # on a Hopper GPU
    FLASHMLA_SM90_TESTS_ON=cpu python3 -m pytest tests/test_gpu_hidden_values.py        # the same promises of the CPU kernel

Float64 decides, on the rows that a test is about: the truth is computed without the values that must not be seen.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numerics
import pytest
import torch
from cases import SM90_ROWS, Case
from gpu_robust_support import MASKS, results_of
from gpu_support import DEVICE, HALF, IMPL, half, needs_sm90, rows

pytestmark = needs_sm90

POISONS = (math.nan, math.inf, -math.inf)


def poisoned(x: torch.Tensor, index, value: float) -> torch.Tensor:
    x = x.clone()
    x[index] = value
    return x


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
def test_values_of_a_neighbouring_sequence_reach_no_other(case, dtype, odd):
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
def test_values_past_the_last_boundary_reach_no_sequence(case, dtype):
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
def test_values_of_another_batch_entry_or_head_reach_no_other(case, dtype):
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
def test_gradients_into_a_row_that_sees_no_key_reach_no_input(row, dtype, tensor, is_packed):
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
def test_rows_that_a_window_leaves_without_keys_pass_no_gradient_on(dtype):
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


def test_a_model_gives_the_same_whatever_its_padding_holds():
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
