"""What torch.compile makes of fp8 caches on a Hopper GPU: new rows by the kernel, in place, and a static Fp8Cache's step one CUDA
graph."""

import gpu_support
import pytest
import torch
from decode_cases import int32
from hf_support import build_causal_lm, random_ids
from torch._inductor.utils import run_and_get_code
from transformers import DynamicCache

import flashmla_hf
from flashmla_hf.decode import decode_attention
from flashmla_hf.fp8.quantization import quantize_tokens

pytestmark = [
    gpu_support.needs_sm90, gpu_support.on_gpu, pytest.mark.usefixtures("recompile_limit_is_put_back"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning"),
]  # fmt: skip
half = gpu_support.half


@half
@pytest.mark.parametrize("page_size", [0, 64])
def test_a_compiled_call_appends_by_the_kernel_and_copies_no_cache(dtype, page_size):
    (k8, k_descale), (v8, v_descale) = (
        quantize_tokens(torch.randn(4, 64 * 1024, 2, 64, device="cuda")) for _ in range(2)
    )
    options = {"cache_seqlens": int32([5, 64, 20_000, 0], "cuda")}
    if page_size:
        k8, v8, k_descale, v_descale = (x.reshape(-1, page_size, *x.shape[2:]) for x in (k8, v8, k_descale, v_descale))
        options["block_table"] = torch.arange(4096, device="cuda").int().view(4, 1024)
    new_k, new_v = (torch.randn(4, 3, 2, 64, device="cuda").to(dtype) for _ in range(2))
    q = torch.randn(4, 1, 8, 64, device="cuda").to(dtype)
    written = [[x.clone() for x in (k8, v8, k_descale, v_descale)] for _ in range(2)]

    def step(q, new_k, new_v, k8, v8, k_descale, v_descale):
        return decode_attention(
            q, k8, v8, k=new_k, v=new_v, k_descale=k_descale, v_descale=v_descale, **options
        )  # fmt: skip

    expected = step(q, new_k, new_v, *written[0])
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True)
    got, (code,) = run_and_get_code(compiled, q, new_k, new_v, *written[1])
    assert torch.equal(got, expected)
    for one, other in zip(*written, strict=True):
        assert torch.equal(one.float(), other.float())
    assert code.count("torch.ops.flashmla.append_to_cache.default(") == 1
    peak = gpu_support.peak_bytes(lambda: compiled(q, new_k, new_v, *written[1]))
    assert peak < k8.numel() // 4, f"{peak:,} bytes beside a cache of {k8.numel():,}"


@pytest.mark.parametrize(("source", "target"), [(2, 3), (4, 3), (2, 2)])
def test_a_compiled_append_of_rows_of_the_cache_writes_what_was_there(source, target):
    """Of a 16-bit cache. The rows are those from before the append, also where they lie on the rows that it writes."""
    caches = [torch.randn(1, 16, 2, 64, device="cuda").bfloat16() for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    for copy, cache in zip(expected, caches, strict=True):
        copy[:, target : target + 3] = cache[:, source : source + 3]

    def step(q, k_cache, v_cache, lengths):
        k, v = (cache[:, source : source + 3] for cache in (k_cache, v_cache))
        return decode_attention(q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths)

    torch._dynamo.reset()
    q = torch.randn(1, 1, 2, 64, device="cuda").bfloat16()
    _, (code,) = run_and_get_code(torch.compile(step, fullgraph=True), q, *caches, int32([target], "cuda"))
    assert code.count("torch.ops.flashmla.append_to_cache.default(") == 1
    for cache, copy in zip(caches, expected, strict=True):
        assert torch.equal(cache, copy)


def largest_difference(got, expected):
    """Of logits, relative to the largest, and the last step compared: the one whose tokens differ, or the last of all."""
    largest = 0.0
    for step, (a, b) in enumerate(zip(got.logits, expected.logits, strict=True)):
        largest = max(largest, float((a - b).abs().max() / b.abs().max()))
        seen = got.sequences.shape[1] - len(got.logits) + step + 1
        if not torch.equal(got.sequences[:, :seen], expected.sequences[:, :seen]):
            break  # a tie, after which the tokens are others
    return largest, step


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "options"), [("Llama", {"head_dim": 128}), ("Mistral", {"head_dim": 64, "sliding_window": 20})]
)
def test_generate_captures_a_static_fp8_cache_in_one_graph(family, options):
    """By itself, as for a StaticCache: no breaks, nothing that CUDA graphs skip, no copy of the cache, and nothing compiled again
    for another prompt. What does not fit raises from Python, and the device goes on.

    Uncompiled it gives a growing cache's bits. A compiled step rounds in other places, and where that puts a key or a value on the
    other side of a boundary of e4m3, it is another by a sixteenth: logits may differ by as much as a growing cache's from exact ones."""
    model = build_causal_lm("flashmla", family, **options).to("cuda", torch.float16)
    room = 32 * 1024
    cache = flashmla_hf.Fp8Cache(model.config, max_cache_len=room)
    given = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    counters, addresses = torch._dynamo.utils.counters, None

    def generated(cache, **more):
        return model.generate(ids, past_key_values=cache, **given, **more)

    torch._dynamo.reset()
    counters.clear()
    for seed, padding in ((0, 0), (1, 7), (2, 0)):
        ids = random_ids(2, 40, seed=seed).cuda()
        given["attention_mask"] = (
            torch.arange(40, device="cuda") >= torch.tensor([[padding], [0]], device="cuda")
        ).long()
        growing = generated(flashmla_hf.Fp8Cache())
        uncompiled = generated(flashmla_hf.Fp8Cache(model.config, max_cache_len=room), disable_compile=True)
        assert all(torch.equal(a, b) for a, b in zip(uncompiled.logits, growing.logits, strict=True))
        allowed, _ = largest_difference(growing, generated(DynamicCache()))
        assert 0 < allowed < 0.5, allowed
        kept = []
        peak = gpu_support.peak_bytes(lambda: kept.append(generated(cache)))  # noqa: B023
        difference, step = largest_difference(kept[0], growing)
        assert difference <= allowed, (seed, difference, allowed)
        assert step > 0
        assert cache.get_seq_length() == 51
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
        assert counters["inductor"]["cudagraph_skips"] == 0
        if seed:  # the first call makes the cache, and compiles
            assert peak < cache.layers[0].key_data.numel(), (
                f"{peak:,} bytes beside a layer of {cache.layers[0].key_data.numel():,}"
            )
            assert [[x.data_ptr() for x in layer._rows()] for layer in cache.layers] == addresses
        addresses = [[x.data_ptr() for x in layer._rows()] for layer in cache.layers]
        cache.reset()

    small = flashmla_hf.Fp8Cache(model.config, max_cache_len=45)
    with pytest.raises(
        ValueError, match=r"max_cache_len: expected at least 46 \(it holds 45 tokens, and 1 come\), got 45"
    ):
        generated(small)
    assert torch.isfinite(generated(cache).logits[-1]).all()
