"""The compiled CPU kernel names the argument that it cannot take, and never ends the process."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_support import make_inputs, needs_cpu_library

pytestmark = needs_cpu_library


def call_with(**changes):
    q, k, v, dout, _dlse, _sinks = make_inputs(2, 8, 8, 4, 2, 16, 16, torch.float32)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "sinks": None,
        "cu_seqlens_q": None,
        "cu_seqlens_kv": None,
        "max_seqlen_q": 8,
        "max_seqlen_kv": 8,
        "scale": 0.25,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
        "deterministic": False,
    }
    backward = {"dout": dout, "dlse": None, "out": torch.zeros_like(dout), "lse": torch.zeros(2, 4, 8)}
    needs = {"needs_dq": True, "needs_dk": True, "needs_dv": True, "needs_dsinks": False}
    if changes.keys() & (backward.keys() | needs.keys()):
        return torch.ops.flashmla.flash_attn_backward(**(arguments | backward | needs | changes))
    return torch.ops.flashmla.flash_attn_forward(**(arguments | changes))


def cu(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def packed(**changes):
    q, k = torch.zeros(8, 4, 16), torch.zeros(8, 2, 16)
    return {"q": q, "k": k, "v": k, "cu_seqlens_q": cu(0, 3, 8), "cu_seqlens_kv": cu(0, 3, 8)} | changes


def without_storage():
    x = torch.zeros(2, 8, 2, 16)
    x.untyped_storage().resize_(64)
    return x


ERRORS = {
    "q: expected dtype float32, float16 or bfloat16, got float64": lambda: {"q": torch.zeros(2, 8, 4, 16).double()},
    "k: expected dtype float32 (that of q), got bfloat16": lambda: {"k": torch.zeros(2, 8, 2, 16).bfloat16()},
    "q: expected 4 dimensions, [batch, seqlen, heads, dim], without cu_seqlens, got shape [8, 4, 16]": lambda: {
        "q": torch.zeros(8, 4, 16)
    },
    "k: expected a contiguous last dimension (stride 1), got stride 2": lambda: {
        "k": torch.zeros(2, 8, 2, 32)[..., ::2]
    },
    "k: expected shape [2, 8, 2, 16] (batch and head dimension of q), got shape [3, 8, 2, 16]": lambda: {
        "k": torch.zeros(3, 8, 2, 16)
    },
    "k: expected shape [2, 8, 2, 16] (batch and head dimension of q), got shape [2, 8, 2, 12]": lambda: {
        "k": torch.zeros(2, 8, 2, 12)
    },
    "v: expected shape [2, 8, 2, 16] (that of k but for the head dimension), got shape [2, 9, 2, 16]": lambda: {
        "v": torch.zeros(2, 9, 2, 16)
    },
    "q: expected a multiple of the 3 kv heads, got 4 heads": lambda: {
        "k": torch.zeros(2, 8, 3, 16),
        "v": torch.zeros(2, 8, 3, 16),
    },
    "k: expected at least 1 head, got 0": lambda: {"k": torch.zeros(2, 8, 0, 16)},
    "v: expected a head dimension of at least 1, got 0": lambda: {"v": torch.zeros(2, 8, 2, 0)},
    "v: expected a storage that holds all of [2, 8, 2, 16], got a storage of 64 bytes": lambda: {
        "v": without_storage()
    },
    "sinks: expected dtype float32, got float16": lambda: {"sinks": torch.zeros(4).half()},
    "sinks: expected shape [4] (heads of q), got shape [2]": lambda: {"sinks": torch.zeros(2)},
    "sinks: expected a contiguous tensor, got stride 2": lambda: {"sinks": torch.zeros(8)[::2]},
    "scale: expected a finite number, got nan": lambda: {"scale": math.nan},
    "scale: expected a finite number, got 1e+300": lambda: {"scale": 1e300},
    "softcap: expected 0 (none) or a finite positive number, got -1": lambda: {"softcap": -1.0},
    "softcap: expected 0 (none) or a finite positive number, got inf": lambda: {"softcap": math.inf},
    "window_left: expected at least -1, got -2": lambda: {"window_left": -2},
    "window_right: expected at least -1, got -9223372036854775808": lambda: {"window_right": -(2**63)},
    "cu_seqlens_kv: expected a tensor, since the other cu_seqlens is one, got None": lambda: packed(cu_seqlens_kv=None),
    "cu_seqlens_q: expected dtype int32, got int64": lambda: packed(cu_seqlens_q=cu(0, 3, 8, dtype=torch.int64)),
    "cu_seqlens_q: expected 1 dimension, [num_sequences + 1], got shape [0]": lambda: packed(cu_seqlens_q=cu()),
    "cu_seqlens_q: expected a contiguous tensor, got stride 2": lambda: packed(cu_seqlens_q=cu(0, 0, 3, 3, 8, 8)[::2]),
    "cu_seqlens_kv: expected shape [3] (that of cu_seqlens_q), got shape [2]": lambda: packed(cu_seqlens_kv=cu(0, 8)),
    "cu_seqlens_q: expected to start at 0, got 1": lambda: packed(cu_seqlens_q=cu(1, 3, 8)),
    "cu_seqlens_q: expected non-decreasing values, got 5 then 3 at 2": lambda: packed(cu_seqlens_q=cu(0, 5, 3)),
    "cu_seqlens_kv: expected to end within the 8 packed rows, got 9": lambda: packed(cu_seqlens_kv=cu(0, 3, 9)),
    "max_seqlen_q: expected at least the longest sequence, 5, got 4": lambda: packed(max_seqlen_q=4),
    "q: expected 3 dimensions, [total, heads, dim], with cu_seqlens, got shape [1, 8, 4, 16]": lambda: packed(
        q=torch.zeros(1, 8, 4, 16)
    ),
    "dout: expected shape [2, 8, 4, 16] (that of the forward's out), got shape [2, 8, 4, 8]": lambda: {
        "dout": torch.zeros(2, 8, 4, 8)
    },
    "dout: expected dtype float32 (that of q), got float16": lambda: {"dout": torch.zeros(2, 8, 4, 16).half()},
    "lse: expected shape [2, 4, 8] (that of the forward's lse), got shape [2, 8, 4]": lambda: {
        "lse": torch.zeros(2, 8, 4)
    },
    "dlse: expected dtype float32, got bfloat16": lambda: {"dlse": torch.zeros(2, 4, 8).bfloat16()},
    "needs_dsinks: expected False, since sinks is None, got True": lambda: {"needs_dsinks": True},
}


@pytest.mark.parametrize("message", ERRORS)
def test_bad_input_is_named_and_never_crashes(message):
    changes = ERRORS[message]()
    is_backward = changes.keys() & {"dout", "dlse", "lse", "needs_dsinks"}
    operator = "flash_attn_backward" if is_backward else "flash_attn_forward"
    with pytest.raises(RuntimeError) as error:
        call_with(**changes)
    assert str(error.value).splitlines()[0] == f"{operator}: {message}"
