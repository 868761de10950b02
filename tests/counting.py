"""How often each implementation behind ``attention()`` was called."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import replace

from flashmla_hf import dispatch


@contextlib.contextmanager
def counted_calls(stub: tuple[str, ...] = ()):
    """Counts, by implementation, the calls inside the block. Those of ``stub`` are not computed: zeros come back."""
    calls: Counter[str] = Counter()
    saved = dict(dispatch.IMPLEMENTATIONS)

    def counting(name, implementation):
        def run(call):
            calls[name] += 1
            if name in stub:
                return call.q.new_zeros((*call.q.shape[:-1], call.v.shape[-1])), None
            return implementation.run(call)

        return replace(implementation, run=run)

    dispatch.IMPLEMENTATIONS.update({name: counting(name, item) for name, item in saved.items()})
    try:
        yield calls
    finally:
        dispatch.IMPLEMENTATIONS.update(saved)
