"""Attention to caches finds rows beyond 2^31 elements (on a GPU 2^32), wherever they lie, and a million keys.

One buffer holds both caches. On a CPU nearly all of it is memory that nobody touches; on a GPU it is 9 GB of NaN.
"""

from __future__ import annotations

from dataclasses import replace

import gpu_support
import pytest
import torch
from decode_cases import DecodeCase, check, device_of, dtypes_of, each_kernel, inputs_of

from flashmla_hf.decode import decode_attention

# Strides beyond these many elements: where 32 bits wrap, signed and on a GPU also unsigned. In bytes they wrap before.
FAR = {"cpu": 2**31, "cuda": 2**32}
SPARE = 2**21  # elements of each cache beyond that


class Buffer:
    """Room for caches whose elements are far apart."""

    def __init__(self, device: str, dtype: torch.dtype):
        self.far = FAR[device]
        if device == "cuda":
            gpu_support.needs_memory(10)
            self.base = torch.full((self.far + 2 * SPARE,), torch.nan, dtype=dtype, device=device)
            return
        try:
            self.base = torch.empty(self.far + 2 * SPARE, dtype=dtype)
        except RuntimeError as error:
            pytest.skip(f"no room for {2 * self.far / 2**30:.0f} GiB of addresses: {error}")
        self.base[: 2 * SPARE] = torch.nan  # where an address that wraps would lead

    def view(self, shape, strides, which: int, first: int = 0) -> torch.Tensor:
        """The cache number ``which``; its strides leave room for the other one."""
        return self.base.as_strided(shape, strides, first + which * SPARE)


def near_strides(shape) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


def far_apart(tensors: dict, buffer: Buffer, dim: int) -> dict:
    """The caches with the last entry of dimension ``dim`` (0: sequences or pages, 1: rows, 2: heads) beyond the limit."""
    caches = {}
    for which, name in enumerate(("k_cache", "v_cache")):
        shape = tensors[name].shape
        strides = near_strides(shape)
        strides[dim] = -(-buffer.far // (shape[dim] - 1) // 8) * 8
        caches[name] = buffer.view(shape, strides, which).copy_(tensors[name])
        where = [0, 0, 0, 0]
        where[dim] = shape[dim] - 1
        assert caches[name][tuple(where)].storage_offset() >= buffer.far
    return {**tensors, **caches}


def at_the_end(tensors: dict, buffer: Buffer) -> dict:
    """The pages as the last ones of a cache that is as large as the buffer, with a table that names them there."""
    caches, table = {}, tensors["block_table"]
    for which, name in enumerate(("k_cache", "v_cache")):
        pages, *shape = tensors[name].shape
        size = near_strides([1, *shape])[0]
        skipped = -(-buffer.far // size)
        cache = buffer.view((skipped + pages, *shape), near_strides([1, *shape]), which)
        cache[skipped:] = tensors[name]
        caches[name] = cache
    is_page = (table >= 0) & (table < pages)
    return {**tensors, **caches, "block_table": torch.where(is_page, table + skipped, table)}


_CASE = DecodeCase(
    lengths=(20, 17, 9), starts=(0, 3, 0), seqlen_q=3, heads_q=6, heads_kv=3, head_dim_qk=64, window=(12, 0)
)
CASES = {
    "sequences": (_CASE, lambda tensors, buffer: far_apart(tensors, buffer, 0)),
    "rows": (replace(_CASE, lengths=(20, 20, 20)), lambda tensors, buffer: far_apart(tensors, buffer, 1)),
    "heads": (_CASE, lambda tensors, buffer: far_apart(tensors, buffer, 2)),
    "strides of pages": (replace(_CASE, page_size=16), lambda tensors, buffer: far_apart(tensors, buffer, 0)),
    "pages": (replace(_CASE, page_size=16, lengths=(70, 0, 33), window=None), at_the_end),
    "many queries": (replace(_CASE, page_size=16, lengths=(70, 90, 33), seqlen_q=30), at_the_end),
}  # fmt: skip


@each_kernel
@pytest.mark.parametrize("name", CASES)
def test_caches_beyond_2_31_elements(impl, name):
    case, move = CASES[name]
    dtype = dtypes_of(impl)[-1]
    buffer = Buffer(device_of(impl), dtype)

    def moved(*, impl, **arguments):
        tensors = {key: arguments.pop(key) for key in ("k_cache", "v_cache", "block_table")}
        return decode_attention(**move(tensors, buffer), **arguments, impl=impl)

    check(impl, case, dtype, function=moved)


@each_kernel
@pytest.mark.parametrize("name", ["sequences", "rows", "heads", "pages"])
def test_new_keys_are_written_beyond_2_31_elements(impl, name):
    case, move = CASES[name]
    case = replace(case, lengths=(20, 17, 9), starts=None, window=None, capacity=24)
    dtype, device = dtypes_of(impl)[-1], device_of(impl)
    near = inputs_of(case, dtype, device).tensors
    if name == "pages":  # those of new keys too
        near["block_table"] = torch.arange(6, dtype=torch.int32, device=device).reshape(3, 2)
        near["k_cache"], near["v_cache"] = (torch.randn_like(near[key]) for key in ("k_cache", "v_cache"))
    far = move(near, Buffer(device, dtype))
    new = {key: torch.randn(3, 4, 3, 64, device=device).to(dtype) for key in ("k", "v")}
    assert torch.equal(decode_attention(**far, **new, impl=impl), decode_attention(**near, **new, impl=impl))
    for key in ("k_cache", "v_cache"):
        pages = near[key].shape[0]
        assert torch.equal(far[key][-pages:].nan_to_num(), near[key].nan_to_num())


@gpu_support.needs_sm90
@gpu_support.on_gpu
@pytest.mark.parametrize("page_size", [0, 64])
@pytest.mark.parametrize("window", [None, (5000, 0)], ids=["all", "window"])
def test_a_million_keys_that_differ(page_size, window):
    gpu_support.needs_memory(16)
    case = DecodeCase(
        lengths=(2**20 + 5, 7), starts=(11, 0), seqlen_q=2, heads_q=2, heads_kv=1, page_size=page_size, window=window
    )
    for num_splits in (0, 1):
        check("sm90", replace(case, num_splits=num_splits), torch.bfloat16)
