"""Stand-ins for the implementations behind ``attention()`` and ``decode_attention()``, and a count of the calls of each."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from flashmla_hf import decode, direct, dispatch


@contextlib.contextmanager
def standing_in(around: Callable):
    """Inside the block ``around(name, call, run)`` computes every call of the implementation ``name``; ``run(call)`` is what
    that implementation computes."""
    saved, was_enabled = dict(dispatch.IMPLEMENTATIONS), direct.enabled
    saved_decode = dict(decode.IMPLEMENTATIONS)

    def stand_in(name, run):
        return lambda call: around(name, call, run)

    dispatch.IMPLEMENTATIONS.update({name: replace(item, run=stand_in(name, item.run)) for name, item in saved.items()})
    decode.IMPLEMENTATIONS.update({name: (reason, stand_in(name, run)) for name, (reason, run) in saved_decode.items()})
    direct.enabled = False  # the fast path calls the compiled kernels past the table
    try:
        yield
    finally:
        dispatch.IMPLEMENTATIONS.update(saved)
        decode.IMPLEMENTATIONS.update(saved_decode)
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
