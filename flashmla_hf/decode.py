"""The public function :func:`decode_attention`: attention to keys and values that lie in caches, for inference.

Which implementation runs when ``impl`` is ``None``:

=====================================================  ===========================================================
the call has                                           implementation
=====================================================  ===========================================================
fp16 or bf16 tensors on a Hopper GPU, head dims of     ``sm90``, if its library is built; it copies q if TMA cannot
multiples of 8 up to 256 (if the values are columns    read its strides or address, never a cache
of the keys, 576 and 512), aligned caches
fp32, fp16 or bf16 tensors on the CPU                  ``cpu``
e4m3 caches with descales, on the CPU                  ``cpu``, which dequantises a block of keys at a time
e4m3 caches and fp16 or bf16 queries on a Hopper GPU,  ``sm90``, if its library is built, and copies q as above; other
head dims of multiples of 16 up to 256, aligned        calls of e4m3 caches on a GPU raise (:mod:`flashmla_hf.fp8.cached`)
caches
anything else                                          ``reference``; one warning, since it copies K and V and waits
                                                       for the device
=====================================================  ===========================================================

An explicit ``impl`` never falls back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashmla_hf import decode_ops, direct, notices, reference
from flashmla_hf.backend import dtype_refusal
from flashmla_hf.backends import cpu, sm90
from flashmla_hf.fp8 import cached
from flashmla_hf.fp8.quantization import quantize_tokens
from flashmla_hf.notices import log_choice, warn_once
from flashmla_hf.ops import dtype_name
from flashmla_hf.scalars import fail, flag
from flashmla_hf.torch_state import has_transforms, is_transformed_eagerly, values_are_readable
from flashmla_hf.validation import DecodeCall, check_tensor, validate_decode, values_in_keys


# Longer than 80 lines: the docstring is the contract.
def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    *,
    head_dim_v: int | None = None,
    cache_seqlens: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    kv_start: torch.Tensor | None = None,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    num_splits: int = 0,
    return_lse: bool = False,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    impl: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention of the last queries of sequences to their keys and values in a cache, dense or paged, without a copy.

    Sequence b has ``L = cache_seqlens[b]`` keys (after the new ones are appended). Its query i stands at key position
    ``p = L - seqlen_q + i``. Key j is row j of ``k_cache[b]``, or with ``block_table`` row ``j % page_size`` of the page
    ``block_table[b, j // page_size]``. For one to a few dozen queries a sequence: decoding, assisted decoding, chunked
    prefill. There is no gradient: a tensor that requires one raises, except under ``torch.no_grad()``.

    Args:
        q: [batch, seqlen_q, heads_q, head_dim_qk].
        k_cache: [batch, capacity, heads_kv, head_dim_qk]; with ``block_table`` [num_pages, page_size, heads_kv, head_dim_qk],
            page_size a multiple of 16. ``heads_q`` is a multiple of ``heads_kv``.
        v_cache: as k_cache, with head_dim_v. q and the caches share one dtype (or the caches are float8_e4m3fn) and device;
            any strides, the last dimension contiguous. ``None`` with ``head_dim_v``: the values are the first ``head_dim_v``
            columns of k_cache's rows, as in a cache of latents (512 of 576 columns and one kv head in DeepSeek-V2).
        head_dim_v: the width of values that are columns of k_cache, from 1 to head_dim_qk; only with ``v_cache=None``.
        cache_seqlens: int32 [batch] keys of each sequence, before the new ones; ``None`` means all rows: capacity, or
            pages of a sequence * page_size. May be 0, and less than seqlen_q: the first queries then see nothing.
        block_table: int32 [batch, pages of a sequence], its rows contiguous. Entries behind those needed may be anything.
        kv_start: int32 [batch] first key of each sequence, as left padding leaves it: keys before it are hidden, and
            positions do not move. ``None`` means 0.
        k, v: [batch, seqlen_new, heads_kv, head_dim], both or neither, or k alone with ``head_dim_v``: written into the caches
            at positions ``cache_seqlens[b]`` and following, before attention; the sequence then has
            ``cache_seqlens[b] + seqlen_new`` keys. cache_seqlens itself does not change. No two sequences may append to the
            same row of a page.
        scale: factor on Q Kᵀ; ``None`` means ``head_dim_qk ** -0.5``.
        is_causal: key j is visible to query i if ``j <= p``.
        window: ``(left, right)``: query i sees keys ``p - left ... p + right``, both included; -1 or ``None`` is unbounded.
            ``is_causal`` makes right 0. Pages before the window are not read.
        softcap: if positive, scores become ``softcap * tanh(scores / softcap)`` before masking.
        sinks: [heads_q] logits, each one more key without a value in its head's softmax.
        num_splits: 0: the keys of a sequence may be shared among parts of a GPU; a repeated call gives the same bits. 1:
            they are not, and a sequence's result has the same bits whatever else is in the batch. Others raise. A CPU's
            results have both properties always.
        return_lse: also return the natural logarithm of each softmax denominator, sink included.
        k_descale, v_descale: fp32 [batch, capacity, heads_kv], or with ``block_table`` [num_pages, page_size, heads_kv]: the
            factors of the rows of e4m3 caches; both with such caches, neither with others. New k and v, in q's dtype, are
            quantised, and their factors written here.
        impl: ``"sm90"``, ``"cpu"`` or ``"reference"``; ``None`` follows the module's table.

    Returns:
        out [batch, seqlen_q, heads_q, head_dim_v] in q's dtype; with ``return_lse`` also lse fp32 [batch, heads_q, seqlen_q].
        A query that sees no key has out 0 and lse -inf (with sinks: the sink's logit).

    The values of cache_seqlens, kv_start and block_table: on the CPU and with ``"reference"``, lengths and starts that are
    negative or beyond the capacity, pages outside the cache where keys are read or appended, and new keys that do not fit
    raise ValueError, before anything is written into the caches (under torch.compile the operator raises RuntimeError, after
    it). On a GPU a kernel's call does not read them back, so that it waits for nothing and may be captured in a CUDA graph:
    lengths are clamped to the capacity, pages outside the cache hold zeros, and new keys beyond the capacity or in such pages
    are not written. What rows and pages hold that no query sees does not matter, even NaN.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: it has a wrong shape or value. RuntimeError: the
        implementation cannot compute this call, or a tensor requires a gradient; the message names the reason and a fix.

    Source: Dao, Haziza, Massa and Sizov 2023, "Flash-Decoding" (keys split among blocks); Kwon et al., arXiv 2309.06180
    (pages); DeepSeek-AI, arXiv 2405.04434, section 2.1 (latents).
    """
    if is_causal is not False and is_causal is not True:
        is_causal = flag("is_causal", is_causal)
    if return_lse is not False and return_lse is not True:
        return_lse = flag("return_lse", return_lse)
    is_latent = v_cache is None or head_dim_v is not None
    if is_latent:
        v_cache = values_in_keys(k_cache, v_cache, head_dim_v)
    is_plain = k is None and v is None and k_descale is None and v_descale is None
    if is_plain and not torch.compiler.is_compiling() and not notices.LOG_CHOICES:
        # As in attention: the checks in C++ find the same errors. In the order of csrc/direct/direct.cpp.
        try:
            output = direct.decode((
                q, k_cache, v_cache, cache_seqlens, block_table, kv_start, scale, is_causal, window, softcap, sinks, num_splits,
                impl, return_lse,
            ))  # fmt: skip
        except RuntimeError:
            if not isinstance(q, torch.Tensor) or q.device.type != "cpu":
                raise
            output = None  # the operator's error about a value: found below as the ValueError of this function
        if output is not None:
            return output
    cached.check_descales(k_cache, v_cache, k_descale, v_descale)
    call = validate_decode(
        q, k_cache, v_cache, cache_seqlens, block_table, kv_start, scale, is_causal, window, softcap, sinks, num_splits, impl,
        is_latent, k_descale, v_descale,
    )  # fmt: skip
    decode_ops.refuse_gradients(
        "flashmla attention",
        (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("k", k), ("v", v), ("sinks", sinks),
         ("k_descale", k_descale), ("v_descale", v_descale)),
    )  # fmt: skip
    run = _choose(call)
    has_new = k is not None or v is not None
    if has_new:
        _check_appended(call, k, v)
    reads_values = run in (_run_reference, cached.run_reference)
    if _values_are_checked(call) or (reads_values and _values_are_readable(call)):
        _check_values(call, k.shape[1] if has_new else 0)  # type: ignore[union-attr]
    if has_new:
        has_kernel_of_append = run in (_run_sm90, cached.run_sm90) and not is_transformed_eagerly()
        call.cache_seqlens = (_append_by_kernel if has_kernel_of_append else append)(call, k, v)  # type: ignore[arg-type]
    out, lse = run(call)
    return (out, lse) if return_lse else out


def has_kernel(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, is_latent: bool = False) -> bool:
    """Whether a kernel computes :func:`decode_attention` of these tensors (its first table), so that no cache is copied."""
    return kernel_refusal(q, k_cache, v_cache, is_latent) is None


def kernel_refusal(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, is_latent: bool = False
) -> str | None:
    """The reason why no kernel computes :func:`decode_attention` of these tensors; ``None`` if one does.

    ``is_latent``: v_cache is a view of columns of k_cache.
    """
    name = _KERNELS.get(q.device.type)
    if name is None:
        return f"no kernel runs on {q.device.type}"
    # Not validated: every layer asks at every step, and decode_attention validates what it is called with.
    call = DecodeCall(
        q=q, k=k_cache, v=v_cache, sinks=None, cache_seqlens=None, kv_start=None, block_table=None, scale=1.0, window_left=-1,
        window_right=-1, softcap=0.0, can_split=True, impl=None, is_latent=is_latent,
    )  # fmt: skip
    return IMPLEMENTATIONS[name][0](call)


def append(call: DecodeCall, k: torch.Tensor, v: torch.Tensor | None) -> torch.Tensor:
    """Writes k and v into the caches at the positions ``cache_seqlens[b] ...``, with torch's operators, and returns the new
    lengths. Without v, the values are columns of k.

    The caller has checked the values that can be read. Nothing waits for a GPU: what does not fit is not known here. Such an
    entry repeats the first that fits, or a row of the cache if none does, so that what is written twice is the same.
    """
    batch, seqlen_new = k.shape[:2]
    begin: torch.Tensor = call.cache_seqlens  # type: ignore[assignment]
    lengths = begin + seqlen_new
    if batch * seqlen_new == 0:
        return lengths
    device, page_size = call.q.device, call.k.shape[1]
    position = begin.long()[:, None] + torch.arange(seqlen_new, device=device)
    fits = (position >= 0) & (position < call.capacity)
    position = position.clamp(0, call.capacity - 1)
    if call.block_table is None:
        page, row = torch.arange(batch, device=device)[:, None].expand_as(position), position
    else:
        page, row = call.block_table.gather(1, position // page_size).long(), position % page_size
        exists = (page >= 0) & (page < call.k.shape[0])
        page, fits = page.clamp(0, call.k.shape[0] - 1), fits & exists
    page, row, fits = page.flatten(), row.flatten(), fits.flatten()
    writes = [(call.k, k)] if v is None else [(call.k, k), (call.v, v)]
    if call.k_descale is not None and call.v_descale is not None and v is not None:
        (k, k_scale), (v, v_scale) = quantize_tokens(k), quantize_tokens(v)
        writes = [(call.k, k), (call.v, v), (call.k_descale, k_scale), (call.v_descale, v_scale)]
    if _values_are_checked(call):  # then all fit
        caches = [cache for cache, _ in writes]
        news = [_in_other_memory(new, caches) for _, new in writes]  # all of them before the first write
        for cache, new in zip(caches, news, strict=True):
            cache.index_put_((page, row), new.flatten(0, 1))
        return lengths
    entry = torch.where(fits, torch.arange(batch * seqlen_new, device=device), fits.int().argmax())
    any_fits, page, row = fits.any(), page[entry], row[entry]
    for cache, new in writes:
        cache.index_put_((page, row), torch.where(any_fits, new.flatten(0, 1)[entry], cache[page, row]))
    return lengths


def _append_by_kernel(call: DecodeCall, k: torch.Tensor, v: torch.Tensor | None) -> torch.Tensor:
    """:func:`append` in one launch, on a Hopper GPU. An entry that does not fit is not written."""
    v_cache = None if v is None else call.v
    caches = [x for x in (call.k, v_cache) if x is not None]
    if torch.compiler.is_compiling():
        # A graph does not know whose memory the new rows are. Inductor drops a clone of them, not what depends on data: no
        # row of a sequence that begins at this number has a place.
        has_rows = (call.cache_seqlens != -(2**31))[:, None, None, None]  # type: ignore[index]
        new_k, new_v = (None if x is None else torch.where(has_rows, x, 0) for x in (k, v))
    else:
        new_k, new_v = (None if x is None else _in_other_memory(x, caches) for x in (k, v))
    new_k, new_v = (None if x is None else _with_contiguous_rows(x) for x in (new_k, new_v))
    return torch.ops.flashmla.append_to_cache(
        call.k, v_cache, new_k, new_v, call.cache_seqlens, call.block_table, call.k_descale, call.v_descale
    )


def _with_contiguous_rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _in_other_memory(new: torch.Tensor, caches: list[torch.Tensor]) -> torch.Tensor:
    """New rows, as a copy if they may be rows of a cache, which a write would change under the others."""
    storage = new.untyped_storage()._cdata
    return new.clone() if any(storage == cache.untyped_storage()._cdata for cache in caches) else new


# ---- New keys and values ---------------------------------------------------------------------------------------------


def _check_appended(call: DecodeCall, k: Any, v: Any) -> None:
    """The new keys and values of a call: both or neither (latents: k alone), like the caches, no more than fit, and somewhere
    to begin."""
    if call.is_latent and v is not None:
        check_tensor("v", v)
        fail(ValueError, "v", "none, since head_dim_v is given (the values are columns of k)", f"shape {[*v.shape]}")
    for name, x, cache in (("k", k, call.k), ("v", v, call.v)):
        if call.is_latent and name == "v":
            continue
        if x is None:
            fail(
                ValueError, name, f"a tensor, since {'v' if name == 'k' else 'k'} is given (pass both or neither)", None
            )
        check_tensor(name, x)
        like, whose = (call.q, "q, they are quantised here") if call.is_fp8 else (cache, "the cache")
        if x.dtype != like.dtype:
            fail(TypeError, name, f"dtype {dtype_name(like.dtype)} (that of {whose})", dtype_name(x.dtype))
        if x.device != cache.device:
            fail(ValueError, name, f"device {cache.device} (that of the cache)", x.device)
        rows = x.shape[1] if x.dim() == 4 else "seqlen_new"
        expected = [call.q.shape[0], rows if name == "k" else k.shape[1], *cache.shape[2:]]
        if [*x.shape] != expected:
            fail(ValueError, name, f"shape {expected}".replace("'", ""), [*x.shape])
    given = "k is" if call.is_latent else "k and v are"
    if call.cache_seqlens is None:
        fail(ValueError, "cache_seqlens", f"a tensor, since {given} given (they begin there)", None)
    if k.shape[1] > call.capacity:
        fail(ValueError, "k", f"at most {call.capacity} new keys (the rows a sequence may have)", k.shape[1])
    _check_written(call)
    if call.k.shape[0] == 0 and k.shape[0] * k.shape[1] > 0:
        fail(ValueError, "k_cache", f"at least one page, since {given} given", "0")


def _check_written(call: DecodeCall) -> None:
    """Caches of which an append writes every element once: no row is another row, and no key is a value."""
    if has_transforms():
        return  # strides are not those of memory
    caches = [("k_cache", call.k)] if call.is_latent else [("k_cache", call.k), ("v_cache", call.v)]
    factors = [("k_descale", call.k_descale), ("v_descale", call.v_descale)] if call.is_fp8 else []
    descales = [(name, x) for name, x in factors if x is not None]
    for name, x in (*caches, *descales):
        if x.numel() > 0 and any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            expected = (
                "rows of their own, since new ones are written there (call .contiguous() before the first append)"
            )
            fail(ValueError, name, expected, f"an expanded tensor of strides {x.stride()}")
    if not call.is_latent and _share_memory(call.k, call.v):
        way_out = "values that are columns of k_cache: v_cache=None with head_dim_v"
        expected = "other memory than k_cache's, since new values would be written over new keys"
        fail(ValueError, "v_cache", expected, f"the same ({way_out})")
    if len(descales) == 2 and _share_memory(*(x[..., None] for _, x in descales)):
        fail(ValueError, "v_descale", "other memory than k_descale's, since factors are written to both", "the same")


def _share_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether rows [..., dim] of the same strides lie on one another: the same rows, or columns of both in one row."""
    if torch.compiler.is_compiling() or x.untyped_storage()._cdata != y.untyped_storage()._cdata:
        return x is y
    ahead = y.storage_offset() - x.storage_offset()
    return x.stride()[:-1] == y.stride()[:-1] and x.numel() > 0 and -y.shape[-1] < ahead < x.shape[-1]


# ---- Values of cache_seqlens, kv_start and block_table ---------------------------------------------------------------


def _values_are_readable(call: DecodeCall) -> bool:
    tensors = (call.q, call.cache_seqlens, call.kv_start, call.block_table)
    return all(x is None or values_are_readable(x) for x in tensors) and not has_transforms()


def _values_are_checked(call: DecodeCall) -> bool:
    """Whether reading the values costs no wait for a device, so that every implementation raises for wrong ones."""
    return call.q.device.type == "cpu" and _values_are_readable(call)


def _check_values(call: DecodeCall, seqlen_new: int) -> None:
    """Raises for a value that names no row, before ``seqlen_new`` keys a sequence are appended; nothing is written here.

    The operator of the CPU and the reference refuse the same values, but they run after the append.
    """
    batch, capacity, page_size = call.q.shape[0], call.capacity, call.k.shape[1]
    rows = "the rows a sequence may have" + (f", less the {seqlen_new} of k" if seqlen_new else "")
    lengths = _numbers("cache_seqlens", call.cache_seqlens, batch, capacity, capacity - seqlen_new, rows)
    starts = _numbers("kv_start", call.kv_start, batch, 0, capacity, "the rows a sequence may have")
    if call.block_table is None:
        return
    written: dict[int, list[tuple[int, int, int]]] = {}  # page: (first row, end, sequence) of each append
    for b, pages in enumerate(call.block_table.tolist()):
        end = lengths[b] + seqlen_new
        begin = starts[b] if call.window_left < 0 else max(starts[b], end - call.q.shape[1] - call.window_left)
        if call.q.shape[1] == 0:
            begin = end  # no query reads a key
        for first, what in (
            (lengths[b], f"{'k is' if call.is_latent else 'k and v are'} appended"),
            (begin, "keys are read"),
        ):
            for n in range(first // page_size, -(-end // page_size) if first < end else 0):
                if not 0 <= pages[n] < call.k.shape[0]:
                    expected = f"pages from 0 to {call.k.shape[0] - 1} where {what}"
                    fail(ValueError, "block_table", expected, f"{pages[n]} at [{b}, {n}]")
        for n in range(lengths[b] // page_size, -(-end // page_size) if seqlen_new else 0):
            first, last = max(lengths[b] - n * page_size, 0), min(end - n * page_size, page_size)
            appends = written.setdefault(pages[n], [])
            rows_of_both = [
                (max(first, x), other) for x, y, other in appends if other != b and max(first, x) < min(last, y)
            ]
            if rows_of_both:
                row, other = min(rows_of_both)
                expected = "no row of a page to which two sequences append"
                fail(ValueError, "block_table", expected, f"row {row} of page {pages[n]} for sequences {other} and {b}")
            appends.append((first, last, b))


def _numbers(name: str, x: torch.Tensor | None, batch: int, default: int, most: int, rows: str) -> list[int]:
    values: list[int] = [default] * batch if x is None else x.tolist()
    for b, value in enumerate(values):
        if not 0 <= value <= most:
            fail(ValueError, name, f"numbers from 0 to {most} ({rows})", f"{value} for sequence {b}")
    return values


# ---- Implementations -------------------------------------------------------------------------------------------------


def _sm90_refusal(call: DecodeCall) -> str | None:
    are_columns = lambda: _values_are_columns(call)  # noqa: E731
    return sm90.rows_refusal(call.q, call.v, are_columns) or sm90.cache_alignment_refusal(call)


def _values_are_columns(call: DecodeCall) -> bool:
    """Whether v is the first columns of k's rows, said so or a view: then both are read once (csrc/ops_sm90.cpp)."""
    if call.is_latent or torch.compiler.is_compiling():
        return call.is_latent
    k, v = call.k, call.v
    is_same_memory = (
        k.untyped_storage()._cdata == v.untyped_storage()._cdata and k.storage_offset() == v.storage_offset()
    )
    return is_same_memory and k.stride() == v.stride() and v.shape[-1] <= k.shape[-1]


def _cpu_refusal(call: DecodeCall) -> str | None:
    return cpu.device_refusal(call.q) or dtype_refusal(call.q.dtype)


def _run_sm90(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    return decode_ops.flash_attn_decode(sm90.with_readable_query(call))


def _run_reference(call: DecodeCall) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.decode_attention(
        call.q, call.k, call.v, sinks=call.sinks, cache_seqlens=call.cache_seqlens, kv_start=call.kv_start,
        block_table=call.block_table, scale=call.scale, window_left=call.window_left, window_right=call.window_right,
        softcap=call.softcap,
    )  # fmt: skip


_Run = Callable[[DecodeCall], tuple[torch.Tensor, torch.Tensor]]
IMPLEMENTATIONS: dict[str, tuple[Callable[[DecodeCall], str | None], _Run]] = {
    "sm90": (_sm90_refusal, _run_sm90),
    "cpu": (_cpu_refusal, decode_ops.flash_attn_decode),
    "reference": (lambda call: None, _run_reference),
}
FP8_IMPLEMENTATIONS = cached.IMPLEMENTATIONS
_KERNELS = {"cuda": "sm90", "cpu": "cpu", "meta": "cpu"}


def _choose(call: DecodeCall) -> _Run:
    """The implementation for this call, by the module's table; raises if the one that was asked for cannot compute it."""
    impl, device = call.impl, call.q.device.type
    if impl is not None and impl not in IMPLEMENTATIONS:
        fail(ValueError, "impl", f"one of {list(IMPLEMENTATIONS)} or None", repr(impl))
    if call.is_fp8:
        return _choose_fp8(call, impl or _KERNELS.get(device, "sm90"))
    if impl is not None:
        refusal, run = IMPLEMENTATIONS[impl]
        if (reason := refusal(call)) is not None:
            raise RuntimeError(f"flashmla attention: impl={impl!r} cannot compute this call: {reason}")
        log_choice(call, impl, "explicit")
        return run
    reason = f"no kernel runs on {device}"
    if device in _KERNELS:
        refusal, run = IMPLEMENTATIONS[_KERNELS[device]]
        if (reason := refusal(call)) is None:
            log_choice(call, _KERNELS[device], f"first choice on {device}")
            return run
    warn_once(
        f"flashmla attention: decode_attention is computed by impl='reference', exactly but not by a kernel: it copies K and V "
        f"and waits for the device. The reason: {reason}.",
        stacklevel=4,
    )
    log_choice(call, "reference", reason)
    return _run_reference


def _choose_fp8(call: DecodeCall, name: str) -> _Run:
    refusal, run = FP8_IMPLEMENTATIONS[name]
    if (reason := refusal(call)) is not None:
        raise RuntimeError(
            f"flashmla attention: impl={name!r} cannot read the float8_e4m3fn k_cache: {reason}. Keep the cache in 16 bits (in "
            "generate leave Fp8Cache out), or pass impl='reference', which dequantises all of it"
        )
    log_choice(call, name, "fp8 caches")
    return run
