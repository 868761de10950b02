"""Attention to caches, for every implementation there is: the CPU kernel and the reference here, sm90 where there is a Hopper.

    python3 -m pytest tests/test_decode.py -k sm90
    FLASHMLA_DECODE_CASES=20000 FLASHMLA_FUZZ_SEED=1 python3 -m pytest tests/test_decode.py -k "random and sm90"

What a call refuses is in tests/test_decode_refusals.py, appending in tests/test_decode_append.py.
"""

import dataclasses
import math
import os
import random
from collections import Counter
from dataclasses import replace

import decode_cases
import gpu_support
import numerics
import pytest
import torch
from decode_cases import DecodeCase, check, device_of, dtypes_of, each_impl, inputs_of, int32, random_cases

from flashmla_hf import attention, direct, libraries
from flashmla_hf.decode import decode_attention

RANDOM_CASES = int(os.environ.get("FLASHMLA_DECODE_CASES", "1200"))
SEED = int(os.environ.get("FLASHMLA_FUZZ_SEED", "0"))


# ---- Numbers ---------------------------------------------------------------------------------------------------------


def sweep(impl, dtype, cases, function=decode_attention, most_failures=12) -> list[str]:
    """A line for each case that breaks the rule, and how to run it again."""
    failures = []
    for case, seed in cases:
        try:
            check(impl, case, dtype, seed, function)
        except (AssertionError, RuntimeError) as error:
            reproducer = decode_cases.reproducer(impl, case, dtype, seed)
            failures.append(f"{str(error).splitlines()[0]}\n  {reproducer}")
        if len(failures) == most_failures:
            break
    return failures


@each_impl
def test_random_calls_keep_the_error_rule(impl):
    before, dtypes = dataclasses.replace(numerics.looks), dtypes_of(impl)
    count = RANDOM_CASES // len(dtypes) // (4 if impl == "reference" else 1)
    for dtype in dtypes:
        failures = sweep(impl, dtype, random_cases(impl, dtype, count, SEED))
        assert not failures, f"{len(failures)} calls of {count} break the rule:\n" + "\n".join(failures)
    numerics.assert_rule_was_kept([], before, count * len(dtypes))


@each_impl
def test_random_calls_of_long_sequences_keep_the_error_rule(impl):
    """Many tiles of keys, so that a GPU shares them out; few calls on a CPU, which takes its time."""
    count, most_keys = {"sm90": (RANDOM_CASES // 8, 20_000), "cpu": (6, 4_000), "reference": (3, 4_000)}[impl]
    source = random.Random(f"long {impl} {SEED}")
    cases = [
        (replace(decode_cases.random_case(source, impl, most_keys), heads_kv=1, heads_q=4), n) for n in range(count)
    ]
    failures = sweep(impl, dtypes_of(impl)[0], cases)
    assert not failures, f"{len(failures)} calls of {count} break the rule:\n" + "\n".join(failures)


FEATURES = {
    **{f"pages of {n}": lambda case, n=n: case.page_size == n for n in decode_cases.PAGE_SIZES},
    "dense": lambda case: case.page_size == 0,
    "starts": lambda case: case.starts is not None and any(case.starts),
    "everything hidden by the start": lambda case: case.starts is not None and any(
        s == n > 0 for s, n in zip(case.starts, case.lengths, strict=True)
    ),
    "empty sequences": lambda case: 0 in case.counts,
    "one key": lambda case: 1 in case.counts,
    "fewer keys than queries": lambda case: any(n < case.seqlen_q for n in case.counts),
    "ragged": lambda case: len(set(case.counts)) > 1,
    "no lengths": lambda case: not case.has_lengths,
    "one query": lambda case: case.seqlen_q == 1,
    "16 queries": lambda case: case.seqlen_q == 16,
    "more than 16 queries": lambda case: case.seqlen_q > 16,
    **{f"group {n}": lambda case, n=n: case.heads_q == n * case.heads_kv for n in (1, 2, 5, 8, 16)},
    "windows": lambda case: case.window is not None and case.window[0] is not None,
    "windows that skip pages": lambda case: bool(case.page_size)
    and any(case.first_key(b) >= case.page_size for b in range(len(case.lengths))),
    "not causal": lambda case: not case.is_causal,
    "to the right": lambda case: not case.is_causal and case.bounds[1] > 0,
    "softcap": lambda case: case.softcap > 0,
    "sinks": lambda case: case.has_sinks,
    "scale 0": lambda case: case.scale == 0,
    "negative scale": lambda case: case.scale is not None and case.scale < 0,
    "head dim 256": lambda case: case.head_dim_qk == 256,
    "head dims 192/128": lambda case: (case.head_dim_qk, case.head_dim_v) == (192, 128),
    **{layout: lambda case, layout=layout: case.layout == layout for layout in decode_cases.LAYOUTS},
    "num_splits 1": lambda case: case.num_splits == 1,
}  # fmt: skip


@pytest.mark.parametrize("impl", ["cpu", "sm90"])
def test_the_random_calls_reach_every_feature(impl):
    cases = [case for case, _ in random_cases(impl, torch.bfloat16, 400, SEED)]
    assert cases == [case for case, _ in random_cases(impl, torch.bfloat16, 400, SEED)]
    counts = Counter({name: sum(map(has, cases)) for name, has in FEATURES.items()})
    rare = {name: count for name, count in counts.items() if count < 5}
    assert not rare, f"hardly among the calls: {rare}"


def _without(name, **fixed):
    return lambda **arguments: decode_attention(**{**arguments, name: fixed.get("value")})


def _shifted(*, cache_seqlens, **arguments):
    return decode_attention(
        cache_seqlens=None if cache_seqlens is None else (cache_seqlens - 1).clamp(min=0), **arguments
    )


WRONG = {
    "starts forgotten": _without("kv_start"),
    "sinks forgotten": _without("sinks"),
    "softcap forgotten": _without("softcap", value=0.0),
    "lengths forgotten": _without("cache_seqlens"),
    "the window forgotten": _without("window"),
    "causality forgotten": _without("is_causal", value=False),
    "one key less": _shifted,
    "queries turned around": lambda *, q, **arguments: decode_attention(q=q.flip(1), **arguments),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_random_calls_find_what_is_wrong(name):
    cases = [(replace(case, page_size=0), seed) for case, seed in random_cases("cpu", torch.float32, 60, 0)]
    assert sweep("cpu", torch.float32, cases, WRONG[name], most_failures=1), f"{name}: passes"


_GQA = {"heads_q": 8, "heads_kv": 2}
CASES = {
    "one token": DecodeCase(lengths=(300,), **_GQA),
    "a ragged batch": DecodeCase(lengths=(300, 1, 64, 0, 129), **_GQA),
    "one key": DecodeCase(lengths=(1,), seqlen_q=1),
    "no key": DecodeCase(lengths=(0, 0), seqlen_q=2, capacity=9),
    "no key, sinks": DecodeCase(lengths=(0, 5), seqlen_q=3, has_sinks=True),
    "no capacity": DecodeCase(lengths=(0,), seqlen_q=3),
    "no query": DecodeCase(lengths=(5, 9), seqlen_q=0, page_size=16),
    "fewer keys than queries": DecodeCase(lengths=(3, 40), seqlen_q=16, **_GQA),
    "fewer keys than queries, pages": DecodeCase(lengths=(3, 40), seqlen_q=16, page_size=16, **_GQA),
    "left padding": DecodeCase(lengths=(200, 200, 200), starts=(0, 77, 199), **_GQA),
    "left padding of everything": DecodeCase(lengths=(20, 20), starts=(20, 3), seqlen_q=2),
    "a start behind the end": DecodeCase(lengths=(20, 20), starts=(30, 3), capacity=40, page_size=16),
    "left padding that hides some queries": DecodeCase(lengths=(20, 20), starts=(17, 3), seqlen_q=8, window=(5, 0)),
    "window 0": DecodeCase(lengths=(100, 3), seqlen_q=4, window=(0, 0)),
    "window": DecodeCase(lengths=(400, 90, 3), seqlen_q=4, window=(70, 0), page_size=16, **_GQA),
    "to the right": DecodeCase(lengths=(100, 3), seqlen_q=9, window=(3, 2), is_causal=False, page_size=16),
    "not causal": DecodeCase(lengths=(100, 3), seqlen_q=9, is_causal=False),
    "softcap and sinks": DecodeCase(lengths=(100, 33), seqlen_q=2, softcap=3.0, has_sinks=True, page_size=48, **_GQA),
    "a page larger than the sequence": DecodeCase(lengths=(100, 33), page_size=256, **_GQA),
    "16 queries of 16 heads": DecodeCase(lengths=(500,), seqlen_q=16, heads_q=16, heads_kv=1, page_size=64),
    "17 queries": DecodeCase(lengths=(500, 17), seqlen_q=17, heads_q=4, heads_kv=1, page_size=64),
    "chunked prefill": DecodeCase(lengths=(500, 260), seqlen_q=200, page_size=64, **_GQA),
    "head dims 192/128": DecodeCase(lengths=(300, 5), head_dim_qk=192, head_dim_v=128, page_size=64, **_GQA),
    "head dim 256": DecodeCase(lengths=(300, 5), seqlen_q=2, head_dim_qk=256, page_size=64, **_GQA),
    "head dim 8": DecodeCase(lengths=(300, 5), seqlen_q=2, head_dim_qk=8, page_size=64, **_GQA),
    "a static cache of Transformers": DecodeCase(lengths=(33, 7), capacity=512, layout="transposed", **_GQA),
    # A GPU has a kernel for up to eight rows of a kv head (csrc/sm90/decode/few_rows.cuh), in steps of 64 or 128 keys.
    "eight rows": DecodeCase(lengths=(127, 128, 129, 1, 300), seqlen_q=2, **_GQA),
    "eight rows of 128 columns": DecodeCase(lengths=(63, 64, 65, 0, 300), seqlen_q=2, head_dim_qk=128, **_GQA),
    "nine rows": DecodeCase(lengths=(127, 128, 129), seqlen_q=3, heads_q=6, heads_kv=2, page_size=16),
    "seven rows": DecodeCase(lengths=(300, 5), starts=(130, 2), heads_q=14, heads_kv=2, head_dim_qk=128, page_size=48),
    "one row a tile": DecodeCase(lengths=(100,) * 9, has_lengths=False, heads_q=4, heads_kv=4),
    "many sequences": DecodeCase(lengths=tuple(range(0, 200, 3)), page_size=16, heads_q=2, heads_kv=1),
    "a long cache": DecodeCase(lengths=(20000, 7), page_size=256, heads_q=4, heads_kv=1),
    "a long cache, a short window": DecodeCase(lengths=(20000, 7), window=(100, 0), heads_q=4, heads_kv=1),
}

# Calls whose tiles a GPU shares out among the CTAs of clusters (csrc/sm90/decode/launch_decode.cuh), and their kin.
_EIGHT = {"heads_q": 32, "heads_kv": 8}
CLUSTERS = {
    "16 CTAs a tile": DecodeCase(lengths=(4096,), head_dim_qk=128, **_EIGHT),
    "8 CTAs a tile": DecodeCase(lengths=(1000,) * 4, has_lengths=False, **_EIGHT),
    "4 CTAs a tile, 16 queries": DecodeCase(lengths=(700,) * 8, has_lengths=False, seqlen_q=16, **_EIGHT),
    "a unit a CTA": DecodeCase(lengths=(1024,), head_dim_qk=128, has_sinks=True, **_EIGHT),
    "CTAs without a unit": DecodeCase(lengths=(130,), capacity=3000, seqlen_q=2, head_dim_qk=128, **_EIGHT),
    "CTAs without a unit, pages": DecodeCase(lengths=(77,), capacity=3000, page_size=48, **_EIGHT),
    "no key": DecodeCase(lengths=(0,), capacity=2000, has_sinks=True, **_EIGHT),
    "everything hidden": DecodeCase(lengths=(900,), starts=(900,), capacity=2000, **_EIGHT),
    "left padding and a window": DecodeCase(lengths=(3000,), starts=(2200,), window=(1500, 0), page_size=16, **_EIGHT),
    "two tiles a kv head": DecodeCase(lengths=(2500,), seqlen_q=12, heads_q=64, heads_kv=8, head_dim_qk=128),
    "head dims 192/128": DecodeCase(lengths=(900,), head_dim_qk=192, head_dim_v=128, softcap=5.0, **_EIGHT),
    "head dim 256": DecodeCase(lengths=(2000,), head_dim_qk=256, heads_q=16, heads_kv=8),
    "head dim 40": DecodeCase(lengths=(2000,), seqlen_q=3, head_dim_qk=40, head_dim_v=24, **_EIGHT),
}


@each_impl
@pytest.mark.parametrize("name", CASES)
def test_cases_keep_the_error_rule(impl, name):
    for dtype in dtypes_of(impl):
        check(impl, CASES[name], dtype)


@each_impl
@pytest.mark.parametrize("name", CLUSTERS)
def test_tiles_of_several_ctas_keep_the_error_rule_and_their_bits(impl, name):
    case = CLUSTERS[name]
    for dtype in dtypes_of(impl)[-1:] if impl != "sm90" else dtypes_of(impl):
        check(impl, case, dtype)
    inputs = inputs_of(case, dtypes_of(impl)[-1], device_of(impl))
    first, *others = (
        decode_attention(**inputs.tensors, **case.options, return_lse=True, impl=impl)
        for _ in range(20 if impl == "sm90" else 2)
    )
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@each_impl
def test_float64_is_the_references(impl):
    inputs = inputs_of(replace(CASES["one token"]), torch.float64, device_of(impl))
    if impl != "reference":
        with pytest.raises(RuntimeError, match=f"impl='{impl}' cannot compute this call: dtype float64"):
            decode_attention(**inputs.tensors, impl=impl)
        return
    out, lse = decode_attention(**inputs.tensors, impl=impl, return_lse=True)
    assert out.dtype == lse.dtype == torch.float64
    torch.testing.assert_close(out, decode_cases.truth(CASES["one token"], inputs)[0])


@each_impl
def test_it_is_attention(impl):
    """On a full dense cache it is flashmla_hf.attention."""
    dtype, device = dtypes_of(impl)[0], device_of(impl)
    inputs = inputs_of(DecodeCase(lengths=(90, 90), seqlen_q=5, has_lengths=False), dtype, device)
    q, k, v = inputs.q, inputs.k_cache, inputs.v_cache
    for options in ({}, {"window": (9, 0)}, {"is_causal": False}):
        out, lse = decode_attention(q, k, v, **options, return_lse=True, impl=impl)
        expected, expected_lse = attention(q, k, v, **{"is_causal": True, **options}, return_lse=True)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out, expected, rtol=4 * eps, atol=4 * eps)
        torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


# ---- Where keys lie --------------------------------------------------------------------------------------------------


@each_impl
@pytest.mark.parametrize("page_size", [16, 48, 64, 256])
def test_pages_give_the_bits_of_a_dense_cache(impl, page_size):
    """The keys are the same and are summed in the same order."""
    for window in (None, (30, 0)):
        case = DecodeCase(
            lengths=(300, 1, 64, 0), starts=(7, 0, 40, 0), seqlen_q=3, window=window, page_size=page_size, num_splits=1
        )
        paged = inputs_of(case, dtypes_of(impl)[-1], device_of(impl))
        dense = inputs_of(decode_cases.without_pages(case), dtypes_of(impl)[-1], device_of(impl))
        results = [decode_attention(**x.tensors, **case.options, return_lse=True, impl=impl) for x in (paged, dense)]
        for got, expected in zip(*results, strict=True):
            if impl == "sm90":  # tiles of keys may be cut at pages
                eps = torch.finfo(got.dtype).eps
                torch.testing.assert_close(got, expected, rtol=2 * eps, atol=2 * eps)
            else:
                assert torch.equal(got, expected)


@each_impl
def test_sequences_may_share_pages(impl):
    inputs = inputs_of(DecodeCase(lengths=(48,), page_size=16), dtypes_of(impl)[-1], device_of(impl))
    alone = decode_attention(**inputs.tensors, num_splits=1, impl=impl)
    q = inputs.q.expand(3, -1, -1, -1).contiguous()
    tensors = {**inputs.tensors, "q": q, "cache_seqlens": inputs.cache_seqlens.expand(3).contiguous()}
    tensors["block_table"] = inputs.block_table.expand(3, -1)
    together = decode_attention(**tensors, num_splits=1, impl=impl)
    assert torch.equal(together, alone.expand(3, -1, -1, -1))


@each_impl
def test_rows_of_the_table_may_be_far_apart(impl):
    inputs = inputs_of(DecodeCase(lengths=(48, 30), page_size=16), dtypes_of(impl)[-1], device_of(impl))
    wide = torch.full((2, 50), -7, dtype=torch.int32, device=device_of(impl))
    wide[:, 20:23] = inputs.block_table
    tensors = {**inputs.tensors, "block_table": wide[:, 20:23]}
    assert torch.equal(decode_attention(**tensors, impl=impl), decode_attention(**inputs.tensors, impl=impl))


@each_impl
def test_a_million_keys(impl):
    """The same page again and again weighs as one."""
    dtype, device = dtypes_of(impl)[-1], device_of(impl)
    inputs = inputs_of(DecodeCase(lengths=(64,), page_size=64, head_dim_qk=16), dtype, device)
    tensors = {**inputs.tensors, "block_table": inputs.block_table.repeat(1, 2**14), "cache_seqlens": None}
    out, lse = decode_attention(**tensors, return_lse=True, impl=impl)
    expected, expected_lse = decode_cases.truth(DecodeCase(lengths=(64,), head_dim_qk=16), inputs)
    numerics.assert_within("out", out, out, expected, 4 * torch.finfo(dtype).eps)
    numerics.assert_within("lse", lse, lse, expected_lse + math.log(2**14), 1e-4)


# ---- What is hidden ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_reaches_only_the_queries_that_see_it(impl, page_size, value):
    case = DecodeCase(
        lengths=(40, 40), seqlen_q=6, window=(3, 0), page_size=page_size, heads_q=2, heads_kv=2, head_dim_qk=16
    )
    inputs = inputs_of(case, torch.float32, "cpu")
    before = decode_attention(**inputs.tensors, **case.options, impl=impl)
    page, row = (0, 36) if not page_size else (inputs.block_table[0, 2].item(), 4)
    inputs.v_cache[page, row] = value  # key 36: queries 2 to 5, at positions 36 to 39, see it
    inputs.k_cache[page, row] = value
    after = decode_attention(**inputs.tensors, **case.options, impl=impl)
    assert torch.equal(after[0, :2], before[0, :2])
    assert torch.equal(after[1], before[1])
    assert after[0, 2:].isnan().all()


# ---- Bits ------------------------------------------------------------------------------------------------------------

BATCH = DecodeCase(lengths=(300, 1, 64, 0, 500, 129), starts=(7, 0, 40, 0, 0, 0), page_size=64, seqlen_q=2, **_GQA)


@each_impl
@pytest.mark.parametrize("page_size", [0, 64])
def test_a_sequences_bits_do_not_depend_on_its_batch(impl, page_size):
    case = replace(BATCH, page_size=page_size)
    inputs = inputs_of(case, dtypes_of(impl)[-1], device_of(impl))
    together = decode_attention(**inputs.tensors, num_splits=1, return_lse=True, impl=impl)
    names = ["q", "cache_seqlens", "kv_start", *(("block_table",) if page_size else ("k_cache", "v_cache"))]
    for b in range(len(case.lengths)):
        tensors = {**inputs.tensors, **{name: inputs.tensors[name][b : b + 1] for name in names}}
        alone = decode_attention(**tensors, num_splits=1, return_lse=True, impl=impl)
        for got, expected in zip(alone, together, strict=True):
            assert torch.equal(got[0], expected[b])


@each_impl
def test_a_repeated_call_gives_the_same_bits(impl):
    inputs = inputs_of(BATCH, dtypes_of(impl)[-1], device_of(impl))
    first, *others = (decode_attention(**inputs.tensors, impl=impl) for _ in range(5))
    assert all(torch.equal(first, other) for other in others)


@each_impl
def test_the_fast_path_gives_the_bits_of_the_operator(impl, monkeypatch):
    """Every plain call takes it (tests/test_direct.py says what is plain); the reference has none."""
    if direct.module is None:
        pytest.skip(libraries.unavailable["direct"])
    dtype, taken, decode = dtypes_of(impl)[-1], [], direct.decode
    monkeypatch.setattr(direct, "decode", lambda request: taken.append(decode(request)) or taken[-1])
    for case, seed in random_cases(impl, dtype, 60, 7):
        inputs = inputs_of(case, dtype, device_of(impl), seed)
        for return_lse in (False, True):
            monkeypatch.setattr(direct, "enabled", True)
            got = decode_attention(**inputs.tensors, **case.options, return_lse=return_lse, impl=impl)
            assert (taken.pop() is None) == (impl == "reference")
            monkeypatch.setattr(direct, "enabled", False)
            expected = decode_attention(**inputs.tensors, **case.options, return_lse=return_lse, impl=impl)
            assert taken.pop() is None
            pairs = zip(got, expected, strict=True) if return_lse else [(got, expected)]
            assert all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("name", ["a ragged batch", "chunked prefill", "17 queries", "16 queries of 16 heads"])
def test_the_cpus_bits_do_not_depend_on_threads(name):
    """One kv head a worker, and all workers for each sequence."""
    threads, results = torch.get_num_threads(), []
    inputs = inputs_of(CASES[name], torch.bfloat16, "cpu")
    try:
        for n in (1, 2, 3, 12):
            torch.set_num_threads(n)
            results.append(decode_attention(**inputs.tensors, **CASES[name].options, impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


# ---- A GPU -----------------------------------------------------------------------------------------------------------


@gpu_support.needs_sm90
@gpu_support.on_gpu
def test_a_call_waits_for_nothing_and_runs_on_the_current_stream():
    inputs = inputs_of(BATCH, torch.bfloat16, "cuda")
    expected = decode_attention(**inputs.tensors, impl="sm90")
    later = {**inputs.tensors, "q": torch.zeros_like(inputs.q)}
    got = gpu_support.run_behind_other_work(
        lambda: later["q"].copy_(inputs.q), lambda: decode_attention(**later, impl="sm90")
    )
    assert torch.equal(got, expected)


@gpu_support.needs_sm90
@gpu_support.on_gpu
def test_a_cuda_graph_follows_lengths_starts_and_tables():
    cases = [
        replace(BATCH, capacity=512),
        replace(BATCH, capacity=512, lengths=(1, 500, 0, 77, 3, 512), starts=(0, 100, 0, 0, 2, 1)),
    ]
    both = [inputs_of(case, torch.bfloat16, "cuda", seed) for seed, case in enumerate(cases)]
    static = {name: x if x is None else x.clone() for name, x in both[0].tensors.items()}
    graph, out = gpu_support.captured(lambda: decode_attention(**static, num_splits=1, impl="sm90"))
    for inputs in (both[1], both[0]):
        for name, x in inputs.tensors.items():
            if x is not None:
                static[name].copy_(x)
        graph.replay()
        assert torch.equal(out, decode_attention(**inputs.tensors, num_splits=1, impl="sm90"))


@gpu_support.needs_sm90
@gpu_support.on_gpu
def test_a_cuda_graph_of_one_sequence_follows_its_length():
    """Its tiles are shared out among the CTAs of clusters, by the length that they read."""
    case = DecodeCase(lengths=(3000,), capacity=4096, head_dim_qk=128, **_EIGHT)
    inputs = inputs_of(case, torch.bfloat16, "cuda")
    caches = {"k_cache": inputs.clean_k, "v_cache": inputs.clean_v}
    static = {**inputs.tensors, **caches, "cache_seqlens": inputs.cache_seqlens.clone()}
    graph, out = gpu_support.captured(lambda: decode_attention(**static, impl="sm90"))
    for length in (3000, 1, 64, 0, 1025, 4096, 130):
        static["cache_seqlens"].fill_(length)
        graph.replay()
        assert torch.equal(out, decode_attention(**static, impl="sm90"))


@gpu_support.needs_sm90
@gpu_support.on_gpu
def test_calls_on_two_streams_at_once_give_the_same_bits():
    cases = [CLUSTERS["16 CTAs a tile"], CLUSTERS["8 CTAs a tile"]]
    both = [inputs_of(case, torch.bfloat16, "cuda", seed).tensors for seed, case in enumerate(cases)]
    expected = [decode_attention(**tensors, impl="sm90") for tensors in both]
    streams = [torch.cuda.Stream() for _ in both]
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for stream, tensors in zip(streams, both, strict=True):
            with torch.cuda.stream(stream):
                results.append(decode_attention(**tensors, impl="sm90"))
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


@gpu_support.needs_sm90
@gpu_support.on_gpu
def test_on_a_gpu_lengths_are_clamped_and_pages_outside_the_cache_hold_zeros():
    case = DecodeCase(lengths=(64, 64), page_size=16, heads_q=2, heads_kv=1)
    inputs = inputs_of(case, torch.bfloat16, "cuda")
    expected = decode_attention(**inputs.tensors, impl="sm90")
    for lengths in ([65, 64], [2**31 - 1, 1000]):
        tensors = {**inputs.tensors, "cache_seqlens": int32(lengths, "cuda")}
        assert torch.equal(decode_attention(**tensors, impl="sm90"), expected)
    negative = decode_attention(**{**inputs.tensors, "cache_seqlens": int32([-5, 64], "cuda")}, impl="sm90")
    assert torch.equal(negative[1], expected[1])
    assert (negative[0] == 0).all()
    table = inputs.block_table.clone()
    zeroed = [x.clone() for x in (inputs.k_cache, inputs.v_cache)]
    for x in zeroed:
        x[table[0, 1].item()] = 0
    as_zeros = decode_attention(**{**inputs.tensors, "k_cache": zeroed[0], "v_cache": zeroed[1]}, impl="sm90")
    for page in (-1, inputs.k_cache.shape[0], 2**31 - 1):
        table[0, 1] = page
        assert torch.equal(decode_attention(**{**inputs.tensors, "block_table": table}, impl="sm90"), as_zeros)
