"""The checks of a call of :func:`flashmla_hf.attention`, and the validated :class:`Call` that implementations compute; and of
one of :func:`flashmla_hf.decode_attention`, a :class:`DecodeCall`."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from flashmla_hf import decode_ops, ops
from flashmla_hf.ops import dtype_name
from flashmla_hf.scalars import fail, integer, number, resolve_window, scale_and_softcap
from flashmla_hf.torch_state import has_transforms, values_are_readable


@dataclass(slots=True)  # not frozen, as ops.Arguments
class Call(ops.Arguments):
    """One validated call, defaults resolved; nobody changes it. Field names and shapes are the operators' (:mod:`ops`)."""

    attn_mask: torch.Tensor | None
    dropout_p: float
    return_lse: bool
    impl: str | None  # what the caller asked for

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None


def validate(
    q: Any, k: Any, v: Any, scale: Any, is_causal: Any, window: Any, softcap: Any, sinks: Any, dropout_p: Any,
    cu_seqlens_q: Any, cu_seqlens_kv: Any, max_seqlen_q: Any, max_seqlen_kv: Any, deterministic: bool, impl: str | None,
    return_lse: Any, attn_mask: Any,
) -> Call:  # fmt: skip
    """Checks every argument of :func:`flashmla_hf.attention` and resolves every default.

    The implementations check the name ``impl`` and the values of cu_seqlens.
    """
    _check_impl(impl)
    is_packed = cu_seqlens_q is not None or cu_seqlens_kv is not None
    q, k, v = _checked_qkv(q, k, v, is_packed)
    if not is_packed and (max_seqlen_q is not None or max_seqlen_kv is not None):
        name, value = ("max_seqlen_kv", max_seqlen_kv) if max_seqlen_q is None else ("max_seqlen_q", max_seqlen_q)
        fail(ValueError, name, "none without cu_seqlens", value)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    scale, softcap = scale_and_softcap(scale, softcap, q)
    dropout_p = number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        fail(ValueError, "dropout_p", "a number in [0, 1)", dropout_p)
    if isinstance(scale, torch.SymFloat):
        # It depends on a symbolic head dim. As an operator's number it would become a constant of the graph.
        q, scale = (q * scale).to(q.dtype), 1.0
    window_left, window_right = resolve_window(window, is_causal)
    if sinks is not None:
        sinks = checked_sinks(sinks, q)
    if is_packed:
        _check_cu_seqlens(cu_seqlens_q, cu_seqlens_kv, q)
        if attn_mask is not None:
            fail(ValueError, "attn_mask", "none with packed sequences (cu_seqlens already separate them)", "a mask")
        max_seqlen_q = _max_seqlen("max_seqlen_q", max_seqlen_q, q.shape[0])
        max_seqlen_kv = _max_seqlen("max_seqlen_kv", max_seqlen_kv, k.shape[0])
        if q.device.type == "cpu" and not has_transforms():  # on a GPU the values are not read back
            _check_longest("q", cu_seqlens_q, q.shape[0], max_seqlen_q)
            _check_longest("kv", cu_seqlens_kv, k.shape[0], max_seqlen_kv)
    else:
        max_seqlen_q, max_seqlen_kv = q.shape[1], k.shape[1]
    if attn_mask is not None:
        _check_attn_mask(attn_mask, (q.shape[0], q.shape[2], q.shape[1], k.shape[1]), q.device)

    return Call(
        q=q, k=k, v=v, sinks=sinks, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv, max_seqlen_q=max_seqlen_q,
        max_seqlen_kv=max_seqlen_kv, scale=scale, window_left=window_left, window_right=window_right, softcap=softcap,
        deterministic=deterministic, attn_mask=attn_mask, dropout_p=dropout_p, return_lse=bool(return_lse), impl=impl,
    )  # fmt: skip


def _check_impl(impl: Any) -> None:
    if impl is not None and not isinstance(impl, str):
        fail(TypeError, "impl", "the name of an implementation or None", repr(impl))


def _checked_qkv(q: Any, k: Any, v: Any, is_packed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, each a tensor of the right layout, and together of fitting shapes."""
    # Inside a transform of torch.func strides are not those of memory; there the operators' rules make copies.
    has_true_strides = not has_transforms()
    has_empty_strides = False
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dim() != (3 if is_packed else 4):
            layout = (
                "[total, heads, dim] with cu_seqlens" if is_packed else "[batch, seqlen, heads, dim] without cu_seqlens"
            )
            fail(ValueError, name, layout, f"{x.dim()} dimensions {[*x.shape]}")
        _check_like_q(name, x, q)
        if has_true_strides and x.stride(-1) != 1 and x.shape[-1] != 1:
            if x.numel() != 0:
                fail(ValueError, name, "a contiguous last dimension (call .contiguous())", f"stride {x.stride(-1)}")
            has_empty_strides = True
    if has_empty_strides:
        # The strides of a tensor without elements mean nothing, and contiguous() leaves them.
        q, k, v = (x.clone(memory_format=torch.contiguous_format) if x.numel() == 0 else x for x in (q, k, v))
    _check_floating("q", q, torch.float8_e4m3fn)
    if k.shape[-1] != q.shape[-1]:
        fail(ValueError, "k", f"head_dim {q.shape[-1]} (that of q)", k.shape[-1])
    if k.shape[:-1] != v.shape[:-1]:
        fail(ValueError, "v", f"shape {[*k.shape[:-1]]} before the last dimension (that of k)", [*v.shape[:-1]])
    if not is_packed and k.shape[0] != q.shape[0]:
        fail(ValueError, "k", f"batch {q.shape[0]} (that of q)", k.shape[0])
    if q.shape[-2] % k.shape[-2] != 0:
        fail(ValueError, "k", f"a number of heads that divides q's {q.shape[-2]}", k.shape[-2])
    return q, k, v


def _check_like_q(name: str, x: torch.Tensor, q: torch.Tensor, is_fp8: bool = False) -> None:
    """One of q, keys and values [..., heads, head_dim]: q's dtype (or fp8) and device, and some of both sizes."""
    if x.dtype != q.dtype and not is_fp8:
        fail(TypeError, name, f"dtype {dtype_name(q.dtype)} (that of q)", dtype_name(x.dtype))
    if x.device != q.device:
        fail(ValueError, name, f"device {q.device} (that of q)", x.device)
    if x.shape[-1] == 0 or x.shape[-2] == 0:
        fail(ValueError, name, "at least one head and one dimension", f"shape {[*x.shape]}")


def _check_floating(name: str, x: torch.Tensor, narrow: torch.dtype | None = None) -> None:
    """A floating dtype that torch computes in, or ``narrow``, the one of 8 bits that this argument takes."""
    if not x.dtype.is_floating_point:
        fail(TypeError, name, "a floating dtype", dtype_name(x.dtype))
    if x.dtype.itemsize == 1 and x.dtype != narrow:
        expected = "a floating dtype of 16 bits or more" + (f", or {dtype_name(narrow)}" if narrow else "")
        fail(TypeError, name, expected, dtype_name(x.dtype))


def checked_sinks(sinks: Any, q: torch.Tensor) -> torch.Tensor:
    """``sinks`` in the dtype of the statistics: fp32, or float64 with float64 inputs, which only the reference takes."""
    check_tensor("sinks", sinks)
    if tuple(sinks.shape) != (q.shape[-2],):
        fail(ValueError, "sinks", f"shape [{q.shape[-2]}] (one logit per query head)", [*sinks.shape])
    _check_floating("sinks", sinks)
    if sinks.device != q.device:
        fail(ValueError, "sinks", f"device {q.device} (that of q)", sinks.device)
    # Not promote_types, which refuses fp8.
    return sinks.to(torch.float64 if q.dtype == torch.float64 else torch.float32).contiguous()


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, torch.Tensor):
        fail(TypeError, name, "a torch.Tensor", type(x).__name__)
    if x.layout != torch.strided or x.is_nested:
        fail(
            TypeError, name, "a dense strided tensor (pack ragged batches with cu_seqlens)", "a sparse or nested tensor"
        )


def _check_cu_seqlens(cu_seqlens_q: Any, cu_seqlens_kv: Any, q: torch.Tensor) -> None:
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_kv", cu_seqlens_kv)):
        if x is None:
            fail(ValueError, name, "a tensor, since the other cu_seqlens is given (pass both or neither)", None)
        check_tensor(name, x)
        if x.dtype != torch.int32:
            fail(TypeError, name, "dtype int32", dtype_name(x.dtype))
        if x.dim() != 1 or x.shape[0] < 1 or not x.is_contiguous():
            fail(
                ValueError, name, "a contiguous tensor [num_sequences + 1]", f"shape {[*x.shape]}, stride {x.stride()}"
            )
        if x.device != q.device:
            fail(ValueError, name, f"device {q.device} (that of q)", x.device)
    if cu_seqlens_q.shape != cu_seqlens_kv.shape:
        fail(
            ValueError, "cu_seqlens_kv", f"{cu_seqlens_q.shape[0]} boundaries (as cu_seqlens_q)", cu_seqlens_kv.shape[0]
        )


def sequence_bounds(name: str, cu_seqlens: torch.Tensor, total: int) -> list[tuple[int, int]]:
    """(begin, end) of each packed sequence; raises if the boundaries are not those of ``total`` rows."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > total or any(a > b for a, b in pairwise(bounds)):
        expected = f"boundaries that begin at 0, never fall and end at most at {total} (the packed length)"
        fail(ValueError, name, expected, f"{bounds[:8]}{'...' if len(bounds) > 8 else ''}")
    return list(pairwise(bounds))


def _check_longest(side: str, cu_seqlens: torch.Tensor, total: int, max_seqlen: int) -> None:
    """The values of ``cu_seqlens_<side>``, if they can be read: the operators check them again."""
    if not values_are_readable(cu_seqlens):
        return
    longest = max((b - a for a, b in sequence_bounds(f"cu_seqlens_{side}", cu_seqlens, total)), default=0)
    if max_seqlen < longest:
        fail(ValueError, f"max_seqlen_{side}", f"at least {longest} (the longest sequence)", max_seqlen)


def _max_seqlen(name: str, value: object, bound: int) -> int:
    if value is None:
        return bound
    value = integer(name, value, "an int")
    if torch.compiler.is_compiling():
        # A length that comes from the data has no value yet; the host compares it with the boundaries.
        from torch.fx.experimental.symbolic_shapes import guard_or_false

        is_negative = guard_or_false(value < 0)
    else:
        is_negative, value = value < 0, min(value, bound)  # any larger bound says the same, beyond 64 bits too
    if is_negative:
        fail(ValueError, name, "a length >= 0", value)
    return value


def _check_attn_mask(attn_mask: Any, shape: tuple[int, ...], device: torch.device) -> None:
    check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool and not attn_mask.dtype.is_floating_point:
        fail(
            TypeError,
            "attn_mask",
            "dtype bool (true keeps) or a floating dtype (added)",
            dtype_name(attn_mask.dtype),
        )
    if attn_mask.dtype != torch.bool:
        _check_floating("attn_mask", attn_mask)
    if attn_mask.dim() > 4 or any(
        mine not in (1, full) for mine, full in zip(reversed(attn_mask.shape), reversed(shape), strict=False)
    ):
        fail(ValueError, "attn_mask", f"a shape that broadcasts to {[*shape]}", [*attn_mask.shape])
    if attn_mask.device != device:
        fail(ValueError, "attn_mask", f"device {device} (that of q)", attn_mask.device)


# ---- Caches ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)  # not frozen, as ops.Arguments
class DecodeCall(decode_ops.DecodeArguments):
    """One validated call on caches, defaults resolved. Field names and shapes are the operator's (:mod:`decode_ops`)."""

    impl: str | None  # what the caller asked for
    is_latent: bool = False  # v is a view of the first columns of k
    # fp32, the shape of k and v without head_dim; both with e4m3 caches, else neither.
    k_descale: torch.Tensor | None = None
    v_descale: torch.Tensor | None = None

    @property
    def is_fp8(self) -> bool:
        return self.k_descale is not None

    @property
    def capacity(self) -> int:
        """The rows that a sequence may have."""
        return self.k.shape[1] * (1 if self.block_table is None else self.block_table.shape[1])


def validate_decode(
    q: Any, k_cache: Any, v_cache: Any, cache_seqlens: Any, block_table: Any, kv_start: Any, scale: Any, is_causal: Any,
    window: Any, softcap: Any, sinks: Any, num_splits: Any, impl: str | None, is_latent: bool = False, k_descale: Any = None,
    v_descale: Any = None,
) -> DecodeCall:  # fmt: skip
    """Checks the arguments of :func:`flashmla_hf.decode_attention` except the new keys and values, and resolves defaults.

    The caller has checked the descales (:func:`flashmla_hf.fp8.cached.check_descales`). The implementations check the name
    ``impl`` and the values of cache_seqlens, kv_start and block_table.
    """
    _check_impl(impl)
    _check_cached(q, k_cache, v_cache, block_table, is_fp8=k_descale is not None)
    for name, x in (("cache_seqlens", cache_seqlens), ("kv_start", kv_start)):
        if x is None:
            continue
        check_int32(name, x, q)
        if tuple(x.shape) != (q.shape[0],) or not x.is_contiguous():
            got = f"shape {[*x.shape]}, stride {x.stride()}"
            fail(ValueError, name, f"a contiguous tensor [{q.shape[0]}] (batch of q)", got)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    scale, softcap = scale_and_softcap(scale, softcap, q)
    if isinstance(scale, torch.SymFloat):  # as in validate
        q, scale = (q * scale).to(q.dtype), 1.0
    window_left, window_right = resolve_window(window, is_causal)
    if sinks is not None:
        sinks = checked_sinks(sinks, q)
    num_splits = integer("num_splits", num_splits, "0 or 1")
    if num_splits not in (0, 1):
        expected = "0 (as many as are fast) or 1 (a sequence's result does not depend on the rest of the batch)"
        fail(ValueError, "num_splits", expected, num_splits)
    return DecodeCall(
        q=q, k=k_cache, v=v_cache, sinks=sinks, cache_seqlens=cache_seqlens, kv_start=kv_start, block_table=block_table,
        scale=scale, window_left=window_left, window_right=window_right, softcap=softcap, can_split=num_splits == 0, impl=impl,
        is_latent=is_latent, k_descale=k_descale, v_descale=v_descale,
    )  # fmt: skip


def values_in_keys(k_cache: Any, v_cache: Any, head_dim_v: Any) -> torch.Tensor:
    """The values that are the first ``head_dim_v`` columns of k_cache's rows: a view. v_cache must be ``None``."""
    if head_dim_v is None:
        expected = "a torch.Tensor, or None with head_dim_v (values that are columns of k_cache)"
        fail(TypeError, "v_cache", expected, "None without head_dim_v")
    if v_cache is not None:
        fail(ValueError, "head_dim_v", "none, since v_cache is given (the values are either)", head_dim_v)
    return first_columns("k_cache", k_cache, head_dim_v)


def first_columns(name: str, rows: Any, head_dim_v: Any) -> torch.Tensor:
    """The first ``head_dim_v`` columns of ``rows``, the keys of that name: a view."""
    head_dim_v = integer("head_dim_v", head_dim_v, "an int")
    check_tensor(name, rows)
    if rows.dim() != 4:
        return rows  # refused by its layout
    if rows.dtype == torch.float8_e4m3fn:
        expected = "16 or 32 bits with head_dim_v (fp8 has no attention to latents)"
        fail(TypeError, name, expected, dtype_name(rows.dtype))
    if head_dim_v < 1 or head_dim_v > rows.shape[-1]:
        fail(ValueError, "head_dim_v", f"from 1 to {rows.shape[-1]} (the columns of {name})", head_dim_v)
    return rows[..., :head_dim_v]


def check_int32(name: str, x: Any, q: torch.Tensor) -> None:
    """An argument of numbers: an int32 tensor on q's device."""
    if isinstance(x, (list, tuple, int)):
        expected = "a torch.Tensor (torch.tensor([...], dtype=torch.int32, device=q.device))"
        fail(TypeError, name, expected, type(x).__name__)
    check_tensor(name, x)
    if x.dtype != torch.int32:
        fail(TypeError, name, "dtype int32 (call .int())", dtype_name(x.dtype))
    if x.device != q.device:
        fail(ValueError, name, f"device {q.device} (that of q)", x.device)


def check_float32(
    name: str, x: Any, shape: list[int], whose_shape: str, device: torch.device, whose_device: str
) -> None:
    """An argument of factors: an fp32 tensor of ``shape`` on ``device``."""
    check_tensor(name, x)
    if x.dtype != torch.float32:
        fail(TypeError, name, "dtype float32", dtype_name(x.dtype))
    if [*x.shape] != shape:
        fail(ValueError, name, f"shape {shape} ({whose_shape})", [*x.shape])
    if x.device != device:
        fail(ValueError, name, f"device {device} (that of {whose_device})", x.device)


def check_cached_layout(q: Any, k_cache: Any, v_cache: Any, block_table: Any) -> None:
    """q and the caches: tensors of four dimensions."""
    layout = "[batch, capacity, heads_kv, dim] without block_table"
    if block_table is not None:
        layout = "[num_pages, page_size, heads_kv, dim] with block_table"
    tensors = (("q", q, "[batch, seqlen_q, heads_q, dim]"), ("k_cache", k_cache, layout), ("v_cache", v_cache, layout))
    for name, x, expected in tensors:
        check_tensor(name, x)
        if x.dim() != 4:
            fail(ValueError, name, expected, f"{x.dim()} dimensions {[*x.shape]}")


def _check_cached(q: Any, k_cache: Any, v_cache: Any, block_table: Any, is_fp8: bool) -> None:
    """q, the caches and the table: together of fitting shapes."""
    check_cached_layout(q, k_cache, v_cache, block_table)
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        _check_like_q(name, x, q, is_fp8 and x is not q)
        if x.stride(-1) != 1 and x.shape[-1] != 1 and x.numel() != 0 and not has_transforms():
            fail(ValueError, name, "a contiguous last dimension (call .contiguous())", f"stride {x.stride(-1)}")
    _check_floating("q", q)
    if k_cache.shape[-1] != q.shape[-1]:
        fail(ValueError, "k_cache", f"head_dim {q.shape[-1]} (that of q)", k_cache.shape[-1])
    if k_cache.shape[:-1] != v_cache.shape[:-1]:
        expected = f"shape {[*k_cache.shape[:-1]]} before the last dimension (that of k_cache)"
        fail(ValueError, "v_cache", expected, [*v_cache.shape[:-1]])
    if q.shape[-2] % k_cache.shape[-2] != 0:
        expected, got = f"a number of heads that divides q's {q.shape[-2]}", f"{k_cache.shape[-2]}"
        # Transformers' caches, and perhaps its queries, are [batch, heads, seqlen, head_dim].
        if k_cache.shape[1] > 0 and any(heads > 0 and heads % k_cache.shape[1] == 0 for heads in q.shape[1:3]):
            got += ": tensors are [batch, seqlen, heads, head_dim]: call .transpose(1, 2)"
        fail(ValueError, "k_cache", expected, got)
    if block_table is not None:
        _check_block_table(block_table, q, k_cache.shape[1])
    elif k_cache.shape[0] != q.shape[0]:
        fail(ValueError, "k_cache", f"batch {q.shape[0]} (that of q), or pass block_table", k_cache.shape[0])


def _check_block_table(block_table: Any, q: torch.Tensor, page_size: int) -> None:
    check_int32("block_table", block_table, q)
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        expected = f"shape [{q.shape[0]}, pages of a sequence] (batch of q)"
        fail(ValueError, "block_table", expected, [*block_table.shape])
    if block_table.stride(1) != 1 and block_table.shape[1] > 1 and block_table.numel() != 0 and not has_transforms():
        fail(ValueError, "block_table", "contiguous rows (call .contiguous())", f"stride {block_table.stride(1)}")
    if page_size < 1 or page_size % decode_ops.PAGE_SIZE_MULTIPLE != 0:
        expected = f"a page_size (its size 1) that is a multiple of {decode_ops.PAGE_SIZE_MULTIPLE}"
        way_out = "allocate pages of such a size, or gather them into caches [batch, capacity, heads_kv, dim]"
        fail(ValueError, "k_cache", expected, f"{page_size}: {way_out}")
