"""The Hopper kernel of fp8 caches: the rule of numerics.py on values that the caches hold exactly, scales that are no powers of
two, what rows without a key hold, bits, graphs, and ``generate``.

    FLASHMLA_FP8_DECODE_CASES=20000 FLASHMLA_FUZZ_SEED=1 python3 -m pytest tests/test_sm90_fp8_decode.py -k random

What is refused is in tests/test_fp8_decode.py, which needs no GPU.
"""

import dataclasses
import math
import os
import random
from dataclasses import replace

import decode_cases
import gpu_support
import numerics
import pytest
import torch
from cases import sm90_tiles
from decode_cases import DecodeCase, int32
from operator_names import OperatorNames
from test_fp8_decode import exact_values  # noqa: F401 (a fixture)

import flashmla_hf
from flashmla_hf.decode import decode_attention
from flashmla_hf.fp8.quantization import DTYPE, quantize_tokens
from flashmla_hf.hf.fp8_layers import Fp8Layer

pytestmark = [gpu_support.needs_sm90, gpu_support.on_gpu]
RANDOM_CASES = int(os.environ.get("FLASHMLA_FP8_DECODE_CASES", "1200"))
SEED = int(os.environ.get("FLASHMLA_FUZZ_SEED", "0"))
half = gpu_support.half


def quantized(cache):
    """cache in fp8. Rows of NaN, which no query sees, have NaN for a scale as well."""
    data, scale = quantize_tokens(cache)
    return data, scale.masked_fill(cache.isnan().all(-1), math.nan)


def in_fp8(q, k_cache, v_cache, **options):
    (k8, k_descale), (v8, v_descale) = quantized(k_cache), quantized(v_cache)
    return decode_attention(q, k8, v8, k_descale=k_descale, v_descale=v_descale, **options)


def random_cases(dtype, count):
    """decode_cases' random calls, of the head dims of these kernels and what they pad."""
    source = random.Random(f"fp8 {dtype} {SEED}")
    dims = [dim for dim, _ in sm90_tiles.head_dims("E4m3Decode")]
    for _ in range(count):
        widths = [source.choice(dims) for _ in range(2)]
        if source.randint(0, 2):
            widths = [widths[0]] * 2
        if source.randint(0, 1):
            widths = [width - 16 * source.randint(0, width // 16 - 1) for width in widths]
        case = decode_cases.random_case(source, "sm90", source.choice([500, 500, 3000]))
        yield replace(case, head_dim_qk=widths[0], head_dim_v=widths[1]), source.randint(0, 2**31)


@half
def test_random_calls_keep_the_error_rule(dtype, exact_values):  # noqa: F811
    before, failures = dataclasses.replace(numerics.looks), []
    count = RANDOM_CASES // 2
    for case, seed in random_cases(dtype, count):
        try:
            decode_cases.check("sm90", case, dtype, seed, in_fp8)
        except (AssertionError, RuntimeError) as error:
            failures.append(f"{dtype} {seed} {str(error).splitlines()[0]}")
    assert not failures, "\n".join(failures[:12])
    assert (numerics.looks - before).calls == count


@half
def test_long_sequences_keep_the_error_rule(dtype, exact_values):  # noqa: F811
    case = DecodeCase((20_077, 5, 9_000), starts=(900, 0, 3), heads_q=8, head_dim_qk=128)
    for page_size in (0, 16, 64):
        for window in (None, (1500, None), (40, None)):
            for seqlen_q in (1, 3, 16):
                for num_splits in (0, 1):
                    changed = replace(
                        case, window=window, page_size=page_size, seqlen_q=seqlen_q, num_splits=num_splits
                    )
                    decode_cases.check("sm90", changed, dtype, 0, in_fp8)


def test_the_rule_finds_a_scale_of_another_row(exact_values):  # noqa: F811
    def wrong(q, k_cache, v_cache, **options):
        (k8, k_descale), (v8, v_descale) = quantized(k_cache), quantized(v_cache)
        return decode_attention(q, k8, v8, k_descale=k_descale, v_descale=v_descale.roll(1, dims=1), **options)

    with pytest.raises(AssertionError, match=r"error|infinities"):
        decode_cases.check("sm90", DecodeCase((300, 200)), torch.bfloat16, 0, wrong)


def caches(batch, rows, heads, dim, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(batch, rows, heads, dim, generator=generator, device="cuda") for _ in range(2)]


def scaled(x, factor):
    """x in fp8 with factors [batch, rows, heads], as they are."""
    return (x / factor[..., None]).clamp(-448, 448).to(DTYPE)


@half
@pytest.mark.parametrize("spread", [0.0, 3.0, 20.0])
@pytest.mark.parametrize("magnitude", [1e-20, 1.0, 1e15])
def test_scales_of_any_size(dtype, spread, magnitude):
    """Factors that are no powers of two, 2^spread apart in the root mean square, times ``magnitude``, against float64."""
    generator = torch.Generator("cuda").manual_seed(int(spread))
    k, v = caches(2, 700, 2, 64)
    ones = torch.ones(2, 700, 2, device="cuda")
    k_descale = ones / 50
    v_descale = torch.exp2(torch.randn(2, 700, 2, generator=generator, device="cuda") * spread) / 50
    k8, v8 = scaled(k, k_descale), scaled(v, ones / 50)
    v_descale = v_descale * (magnitude if dtype == torch.bfloat16 else 1.0)  # fp16 would not hold the result
    if dtype == torch.float16:
        v_descale = v_descale / v_descale.max()
    q = torch.randn(2, 2, 8, 64, generator=generator, device="cuda").to(dtype)
    out = decode_attention(q, k8, v8, k_descale=k_descale, v_descale=v_descale)
    exact = decode_attention(q, k8, v8, k_descale=k_descale, v_descale=v_descale, impl="reference").double()
    assert (out.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


@half
def test_queries_of_any_size(dtype):
    """bf16 queries outside fp16's range, in rows of their own."""
    k, v = caches(1, 300, 2, 128)
    (k8, k_descale), (v8, v_descale) = quantized(k), quantized(v)
    q = torch.randn(1, 1, 8, 128, device="cuda").to(dtype)
    factors = torch.tensor([1.0, 2.0**90, 2.0**-90, 2.0**20, 2.0**-30, 1.0, 2.0**30, 2.0**-120], device="cuda")
    if dtype == torch.float16:
        factors = torch.tensor([1.0, 2.0**9, 2.0**-9, 2.0**5, 2.0**-5, 1.0, 2.0**3, 2.0**-12], device="cuda")
    options = {"k_descale": k_descale, "v_descale": v_descale}
    for head, factor in enumerate(factors.tolist()):
        big = q[:, :, head : head + 1].expand(-1, -1, 2, -1) * factor
        scale = 128**-0.5 / factor
        if not math.isfinite(torch.tensor(scale).float().item()):
            continue
        out, lse = decode_attention(big.to(dtype), k8, v8, scale=scale, return_lse=True, **options)
        exact, exact_lse = decode_attention(
            big.to(dtype), k8, v8, scale=scale, return_lse=True, impl="reference", **options
        )
        torch.testing.assert_close(out, exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-3)
        torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-4, atol=1e-3)


def test_descales_may_lie_as_they_like():
    k, v = caches(3, 200, 2, 64)
    (k8, k_descale), (v8, v_descale) = quantized(k), quantized(v)
    q = torch.randn(3, 2, 4, 64, device="cuda").bfloat16()
    expected = decode_attention(q, k8, v8, k_descale=k_descale, v_descale=v_descale)
    wide = torch.full((3, 200, 7), math.nan, device="cuda")
    wide[..., 2:6:2], wide[..., 3:7:2] = k_descale, v_descale
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k_descale, v_descale)]
    for k_scale, v_scale in ((wide[..., 2:6:2], wide[..., 3:7:2]), turned):
        assert torch.equal(decode_attention(q, k8, v8, k_descale=k_scale, v_descale=v_scale), expected)
    one = torch.full((1,), 0.5, device="cuda").expand(3, 200, 2)
    torch.testing.assert_close(
        decode_attention(q, k8, v8, k_descale=one, v_descale=one),
        decode_attention(q, k8, v8, k_descale=one, v_descale=one, impl="reference"), rtol=2e-2, atol=2e-2,
    )  # fmt: skip


@half
def test_nan_in_a_cache_is_seen_where_it_is_visible(dtype):
    k, v = caches(2, 50, 2, 64)
    for name in ("key", "value", "key's scale", "value's scale"):
        (k8, k_descale), (v8, v_descale) = quantized(k), quantized(v)
        q = torch.randn(2, 1, 4, 64, device="cuda").to(dtype)
        poisoned = {"key": k8, "value": v8, "key's scale": k_descale, "value's scale": v_descale}[name]
        poisoned[1, 30, 1] = torch.tensor(math.nan, device="cuda").to(poisoned.dtype)
        out = decode_attention(q, k8, v8, k_descale=k_descale, v_descale=v_descale)
        seen = out.isnan().any(-1)
        assert torch.equal(seen, torch.tensor([[[False] * 4], [[False, False, True, True]]], device="cuda")), name


BATCH = DecodeCase(
    (300, 1, 64, 0, 2500, 129),
    starts=(7, 0, 40, 0, 0, 0),
    seqlen_q=2,
    heads_q=8,
    heads_kv=2,
    head_dim_qk=128,
    page_size=64,
)


@half
@pytest.mark.parametrize("page_size", [0, 64])
def test_a_sequences_bits_do_not_depend_on_its_batch(dtype, page_size):
    inputs = decode_cases.inputs_of(replace(BATCH, page_size=page_size), dtype, "cuda")
    together = in_fp8(**inputs.tensors, num_splits=1)
    names = ["q", "cache_seqlens", "kv_start", *(("block_table",) if page_size else ("k_cache", "v_cache"))]
    for b in range(len(BATCH.lengths)):
        tensors = {**inputs.tensors, **{name: inputs.tensors[name][b : b + 1] for name in names}}
        assert torch.equal(in_fp8(**tensors, num_splits=1), together[b : b + 1])


@half
def test_a_repeated_call_gives_the_same_bits(dtype):
    for lengths in ((9000,), (300, 5000, 17), (40,) * 70):
        inputs = decode_cases.inputs_of(replace(BATCH, lengths=lengths, starts=None), dtype, "cuda")
        first = in_fp8(**inputs.tensors)
        assert all(torch.equal(in_fp8(**inputs.tensors), first) for _ in range(5))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_calls_behind_each_other_give_the_same_bits(dim):
    """A stream of calls without a pause, longer than L2: loads that a later one overtakes, kernels that begin early, and a
    workspace that the next call has again. Of 128 columns a stage belongs to another warp in every turn of the ring."""
    gpu_support.needs_memory(8)
    batch, rows, heads = 4, 131072 * 128 // dim, 8
    generator = torch.Generator("cuda").manual_seed(dim)
    k8, v8 = (
        torch.randint(0, 112, (batch, rows, heads, dim), dtype=torch.uint8, generator=generator, device="cuda").view(
            DTYPE
        )
        for _ in range(2)
    )
    near = [torch.rand(batch, heads, rows, generator=generator, device="cuda").transpose(1, 2) / 64 for _ in range(2)]
    q = torch.randn(batch, 1, 4 * heads, dim, generator=generator, device="cuda").bfloat16()
    for scales in (near, [x.contiguous() for x in near]):
        options = {"k_descale": scales[0], "v_descale": scales[1]}
        outs = [decode_attention(q, k8, v8, **options) for _ in range(40)]
        assert all(torch.equal(out, outs[0]) for out in outs)
        graph, out = gpu_support.captured(lambda options=options: decode_attention(q, k8, v8, **options))
        for _ in range(20):
            graph.replay()
        assert torch.equal(out, outs[0])
    for head in (0, heads - 1):  # float64 of a head at a time
        cache = [x[:1, :, head : head + 1] for x in (k8, v8, *near)]
        of_head = slice(4 * head, 4 * head + 4)
        exact = decode_attention(
            q[:1, :, of_head], *cache[:2], k_descale=cache[2], v_descale=cache[3], impl="reference"
        )
        torch.testing.assert_close(outs[0][:1, :, of_head], exact, rtol=1e-2, atol=1e-2 * exact.abs().max().item())


def test_a_cuda_graph_follows_lengths_tables_and_appended_keys():
    k, v = caches(4, 512, 2, 64)
    (k8, k_descale), (v8, v_descale) = quantized(k), quantized(v)
    k8, v8, k_descale, v_descale = (x.reshape(32, 64, *x.shape[2:]) for x in (k8, v8, k_descale, v_descale))
    lengths, table = int32([5, 64, 200, 400], "cuda"), torch.randperm(32, device="cuda").int().reshape(4, 8)
    q = torch.randn(4, 1, 8, 64, device="cuda").bfloat16()
    new_k, new_v = (torch.randn(4, 1, 2, 64, device="cuda").bfloat16() for _ in range(2))
    options = {"k_descale": k_descale, "v_descale": v_descale, "block_table": table, "cache_seqlens": lengths}

    def call():
        return decode_attention(q, k8, v8, k=new_k, v=new_v, **options)

    graph, out = gpu_support.captured(call)
    for step in range(3):
        lengths += 37
        table.copy_(torch.randperm(32, device="cuda").reshape(4, 8))
        new_k.normal_(), new_v.normal_(), q.normal_()
        graph.replay()
        exact = decode_attention(
            q,
            k8,
            v8,
            k_descale=k_descale,
            v_descale=v_descale,
            block_table=table,
            cache_seqlens=lengths + 1,
            impl="reference",
        )
        torch.testing.assert_close(out, exact, rtol=2e-2, atol=2e-2, msg=f"step {step}")


def test_a_call_waits_for_nothing():
    k, v = caches(2, 100, 2, 64)
    (k8, k_descale), (v8, v_descale) = quantized(k), quantized(v)
    lengths, q = int32([3, 80], "cuda"), torch.randn(2, 1, 4, 64, device="cuda").bfloat16()
    new = [torch.randn(2, 1, 2, 64, device="cuda").bfloat16() for _ in range(2)]

    def call():
        return decode_attention(
            q, k8, v8, k=new[0], v=new[1], cache_seqlens=lengths, k_descale=k_descale, v_descale=v_descale
        )

    call()
    gpu_support.run_behind_other_work(lambda: lengths.add_(1), call)


def test_a_cache_of_more_than_four_gibibytes():
    gpu_support.needs_memory(8)
    rows, heads = 2**19, 40  # 2^32 bytes and more behind the first row of the last page
    k8 = torch.zeros(2, rows, heads, 128, dtype=torch.uint8, device="cuda").view(DTYPE)
    scales = torch.ones(2, heads, rows, device="cuda").transpose(1, 2)
    near = rows - 300
    values = torch.randn(300, heads, 128, device="cuda").to(DTYPE)
    k8[1, near:].view(torch.uint8).copy_(values.view(torch.uint8))
    q = torch.randn(2, 1, heads, 128, device="cuda").bfloat16()
    starts = int32([near, near], "cuda")
    out = decode_attention(q, k8, k8, k_descale=scales, v_descale=scales, kv_start=starts)
    small = k8[:, near:].contiguous()
    ones = torch.ones(2, 300, heads, device="cuda")
    expected = decode_attention(q, small, small, k_descale=ones, v_descale=ones, impl="reference")
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


@half
@pytest.mark.parametrize("page_size", [0, 64])
def test_new_keys_are_quantised_and_written_in_one_launch(dtype, page_size):
    k, v = caches(4, 256, 2, 64)
    (k8, k_descale), (v8, v_descale) = quantized(k), quantized(v)
    options = {"cache_seqlens": int32([5, 64, 200, 0], "cuda")}
    if page_size:
        k8, v8, k_descale, v_descale = (x.reshape(16, page_size, *x.shape[2:]) for x in (k8, v8, k_descale, v_descale))
        options["block_table"] = torch.arange(16, device="cuda").int().view(4, 4)
    options |= {"k_descale": k_descale, "v_descale": v_descale}
    new_k, new_v = (torch.randn(4, 3, 2, 64, device="cuda").to(dtype) for _ in range(2))
    q = torch.randn(4, 1, 8, 64, device="cuda").to(dtype)
    with OperatorNames() as operators:
        got = decode_attention(q, k8, v8, k=new_k, v=new_v, **options)
    launched = [name for name in operators.names if name != "aten::unsqueeze"]  # a view, to compare memory
    assert launched == ["flashmla::append_to_cache", "flashmla::flash_attn_decode_e4m3"]
    options["cache_seqlens"] = options["cache_seqlens"] + 3
    assert torch.equal(got, decode_attention(q, k8, v8, **options))
    written, factors = quantize_tokens(new_k[2])
    rows = k8.reshape(-1, *k8.shape[2:])[512 + 200 :][:3], k_descale.reshape(-1, 2)[512 + 200 :][:3]
    assert torch.equal(rows[0].float(), written.float())
    assert torch.equal(rows[1], factors)


@half
@pytest.mark.parametrize("new", [1, 5])
def test_a_layer_of_an_fp8_cache_holds_what_it_holds_on_a_cpu(dtype, new):
    layers = [Fp8Layer() for _ in range(2)]
    for rows in (130, new, new):
        key, value = (torch.randn(3, 2, rows, 64).to(dtype) for _ in range(2))
        layers[0].update(key, value)
        with OperatorNames() as operators:
            layers[1].update(key.cuda(), value.cuda())
    assert operators.names.count("flashmla::append_to_cache") == 1
    for name in layers[0]._buffers():
        on_cpu, on_gpu = (getattr(layer, name)[:, :, : 130 + 2 * new].float() for layer in layers)
        assert torch.equal(on_cpu, on_gpu.cpu()), name


# ---- generate --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "options"),
    [("Llama", {"head_dim": 64}), ("Llama", {"head_dim": 128}), ("Mistral", {"head_dim": 64, "sliding_window": 20})],
)
def test_generate_with_an_fp8_cache_gives_the_emulations_logits(family, options):
    from hf_support import build_causal_lm, random_ids  # Transformers

    model = build_causal_lm("flashmla", family, **options).cpu().float()
    ids = random_ids(2, 40).cpu()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    given = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "output_logits": True,
             "return_dict_in_generate": True}  # fmt: skip
    expected = model.generate(ids, past_key_values=flashmla_hf.Fp8Cache(), **given)
    exact = model.generate(ids, **given)
    model = model.to("cuda", torch.float16)
    given["attention_mask"] = mask.cuda()
    got = model.generate(ids.cuda(), past_key_values=flashmla_hf.Fp8Cache(), **given)
    # Numbers of half precision are rounded to e4m3 otherwise than those of fp32: on a CPU that is up to 0.35 of what e4m3 changes.
    # Logits as long as the tokens are the same.
    for step, (a, b, c) in enumerate(zip(got.logits, expected.logits, exact.logits, strict=True)):
        difference, change = ((x - b).square().mean().sqrt() for x in (a.cpu().float(), c))
        assert difference <= 0.6 * change + 5e-3 * b.abs().max(), step
        if any(
            not torch.equal(x.sequences[:, : 41 + step].cpu(), expected.sequences[:, : 41 + step]) for x in (got, exact)
        ):
            break
    assert step > 0
