"""Stand-ins for the implementations behind ``attention()`` and ``decode_attention()``, and a count of the calls of each."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from flashmla_hf import decode, direct, dispatch


@contextlib.contextmanager
def standing_in(around: Callable):
    """Inside the block ``around(name, call, run)`` computes every call of the implementation ``name``, "fp8 cpu" for example in
    fp8; ``run(call)`` is what that implementation computes."""
    was_enabled = direct.enabled
    backends = {"": dispatch.IMPLEMENTATIONS, "fp8 ": dispatch.FP8_IMPLEMENTATIONS}
    pairs = {"": decode.IMPLEMENTATIONS, "fp8 ": decode.FP8_IMPLEMENTATIONS}
    saved = [(table, dict(table)) for table in (*backends.values(), *pairs.values())]

    def stand_in(name, run):
        return lambda call: around(name, call, run)

    for kind, table in backends.items():
        for name, item in table.items():
            table[name] = replace(item, run=stand_in(kind + name, item.run))
    for kind, table in pairs.items():
        for name, (reason, run) in table.items():
            table[name] = (reason, stand_in(kind + name, run))
    direct.enabled = False  # the fast path calls the compiled kernels past the table
    try:
        yield
    finally:
        for table, contents in saved:
            table.update(contents)
        direct.enabled = was_enabled


@contextlib.contextmanager
def counted_calls(stub: tuple[str, ...] = (), wrong: Callable | None = None):
    """Counts the calls inside the block by implementation. Those of ``stub`` are not computed and give zeros.
    ``wrong(call, run)`` computes in place of every other, as a negative control."""
    calls: Counter[str] = Counter()

    def counting(name, call, run):
        calls[name] += 1
        if name in stub:
            return call.q.new_zeros((*call.q.shape[:-1], call.v.shape[-1])), None
        return run(call) if wrong is None else wrong(call, run)

    with standing_in(counting):
        yield calls
