"""Implementation ``flex``, as far as a machine without a GPU can tell (tests/test_gpu.py has the rest).

Two stand-ins for the compiled kernel. :func:`simulated` computes what a BlockMask means, block list by block list, and
so tests the mask, its blocks and all that is around FlexAttention; the fixture ``graphs`` really compiles, with a
backend that runs the graphs as they are, and so tests what is compiled, how often, and that nothing runs uncompiled.
"""

import functools
import math

import numerics
import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from cases import CASES, Case, calls
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager

import flashmla_hf
from flashmla_hf import reference
from flashmla_hf.backends import flex, flex_mask
from flashmla_hf.reference import visible_keys


def attention(
    q, k, v, *, scale=None, is_causal=False, window=None, softcap=0.0, sinks=None, cu_seqlens_q=None,
    cu_seqlens_kv=None, return_lse=True,
):  # fmt: skip
    """flex.attention with the arguments of flashmla_hf.attention, whose checks send no CPU tensor here."""
    left, right = (-1 if bound is None else bound for bound in window or (None, None))
    return flex.attention(
        q, k, v, sinks=sinks, cu_seqlens_q=cu_seqlens_q, cu_seqlens_kv=cu_seqlens_kv,
        scale=q.shape[-1] ** -0.5 if scale is None else scale, window_left=left,
        window_right=0 if is_causal else right, softcap=softcap,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_caches(monkeypatch):
    for module, cache in ((flex_mask, "_masks"), (flex, "_scalar_tensors"), (flex, "_kernels")):
        monkeypatch.setattr(module, cache, type(getattr(module, cache))())


# ---- What is computed, with the kernel simulated ---------------------------------------------------------------------


def dense_blocks(counts, indices, rows, columns):
    """0/1 int [rows, columns] of the blocks in a list; a block listed twice is 2."""
    is_listed = torch.arange(indices.shape[-1]) < counts[0, 0, :, None]
    blocks = torch.zeros(rows, columns, dtype=torch.int32)
    blocks.scatter_add_(1, indices[0, 0].long(), is_listed.int())
    return blocks


def check_block_lists(block_mask, seqlen_q, seqlen_kv):
    """The pairs visible by the lists of a BlockMask, bool [seqlen_q, seqlen_kv]; its two directions must agree."""
    block, _ = block_mask.BLOCK_SIZE
    rows, columns = block_mask.kv_indices.shape[2:]
    partial = dense_blocks(block_mask.kv_num_blocks, block_mask.kv_indices, rows, columns)
    full = dense_blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, rows, columns)
    assert (partial + full).max() <= 1, "a block is listed twice"
    transposed = dense_blocks(block_mask.q_num_blocks, block_mask.q_indices, columns, rows).T
    assert (transposed == partial).all(), "the backward pass would visit other blocks than the forward pass"
    full_transposed = dense_blocks(block_mask.full_q_num_blocks, block_mask.full_q_indices, columns, rows).T
    assert (full_transposed == full).all()

    row, key = torch.arange(rows * block)[:, None], torch.arange(columns * block)[None]
    is_partial, is_full = (x.repeat_interleave(block, 0).repeat_interleave(block, 1).bool() for x in (partial, full))
    exists = (row < seqlen_q) & (key < seqlen_kv)
    assert not (is_full & ~exists).any(), "the kernel applies no mask in a full block, not even the bounds"
    is_visible = block_mask.mask_mod(0, 0, row, key)
    # Nothing computed in vain but the rest of blocks that are needed, blocks between such (the keys of a sequence without
    # queries), and blocks around rows that see nothing.
    needed = (is_visible & exists).view(rows, block, columns, block).any(dim=3).any(dim=1).int()
    needed = (needed.cummax(dim=1).values & needed.flip(1).cummax(dim=1).values.flip(1)).bool()
    sees_nothing = ~(is_visible & exists).any(dim=1).view(rows, block)
    assert not ((partial + full).bool() & ~needed & ~sees_nothing.any(dim=1)[:, None]).any()
    return (is_full | (is_partial & is_visible))[:seqlen_q, :seqlen_kv]


def simulated(query, key, value, *, score_mod, block_mask, scale, enable_gqa, kernel_options, return_aux):
    """FlexAttention by its documentation: query [batch, heads_q, seqlen_q, head_dim_qk], and so on."""
    assert enable_gqa
    assert return_aux.lse
    is_visible = check_block_lists(block_mask, query.shape[2], key.shape[2])
    group = query.shape[1] // key.shape[1]
    key, value = key.float().repeat_interleave(group, dim=1), value.float().repeat_interleave(group, dim=1)
    scores = score_mod(query.float() @ key.transpose(-1, -2) * scale, None, None, None, None)
    scores = scores.masked_fill(~is_visible, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
    return (weights @ value).to(query.dtype), torch_flex.AuxOutput(lse=lse)


def simulate(patch):
    patch.setattr(flex, "flex_attention", simulated)
    patch.setattr(flex, "_require_fused", lambda: None)
    patch.setattr(flex, "_kernel", lambda *call: flex._fused)


@pytest.mark.parametrize("block", [128, 16])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_feature_equals_the_reference(case, block, monkeypatch):
    simulate(monkeypatch)
    monkeypatch.setattr(flex_mask, "BLOCK", block)
    numerics.check(attention, case, torch.float32)


@settings(max_examples=100, deadline=None)
@given(case=calls(), block=st.sampled_from([4, 8, 16]), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_call_equals_the_reference(case, block, dtype):
    with pytest.MonkeyPatch.context() as patch:
        simulate(patch)
        patch.setattr(flex_mask, "BLOCK", block)
        flex_mask._masks.clear()
        numerics.check(attention, case, dtype)


@settings(max_examples=100, deadline=None)
@given(
    seqlen_q=st.integers(1, 70), seqlen_kv=st.integers(1, 70), left=st.integers(-1, 80), right=st.integers(-1, 80),
    block=st.sampled_from([2, 4, 16, 128]),
)  # fmt: skip
def test_block_lists_hold_exactly_the_visible_keys(seqlen_q, seqlen_kv, left, right, block):
    mask = flex_mask.build(seqlen_q, seqlen_kv, None, None, left, right, torch.device("cpu"), block)
    block_mask = torch_flex.BlockMask(
        (seqlen_q, seqlen_kv), mask.kv_counts, mask.kv_indices, mask.full_kv_counts, mask.full_kv_indices,
        mask.q_counts, mask.q_indices, mask.full_q_counts, mask.full_q_indices, (block, block),
        lambda batch, head, row, key: (key >= mask.begin[row]) & (key < mask.end[row]),
    )  # fmt: skip
    expected = visible_keys(seqlen_q, seqlen_kv, left, right)
    expected = torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool) if expected is None else expected
    assert (check_block_lists(block_mask, seqlen_q, seqlen_kv) == expected).all()
    # torch 2.11's kernels address the full lists by the strides of the partial ones.
    for partial, full in ((mask.kv_indices, mask.full_kv_indices), (mask.q_indices, mask.full_q_indices)):
        assert partial.stride() == full.stride()
        assert partial.is_contiguous()


def test_boundaries_out_of_range_keep_block_lists_inside_the_keys():
    cu_seqlens_q = torch.tensor([0, 40, 20, 900], dtype=torch.int32)
    cu_seqlens_kv = torch.tensor([0, 5000, -7, 64], dtype=torch.int32)
    mask = flex_mask.build(64, 64, cu_seqlens_q, cu_seqlens_kv, 9, 0, torch.device("cpu"), 16)
    for indices, blocks in (
        (mask.kv_indices, 4),
        (mask.full_kv_indices, 4),
        (mask.q_indices, 4),
        (mask.full_q_indices, 4),
    ):
        assert indices.min() >= 0
        assert indices.max() < blocks
    for counts in (mask.kv_counts, mask.full_kv_counts, mask.q_counts, mask.full_q_counts):
        assert counts.max() <= 4
    assert mask.end.max() <= 64


def test_a_mask_of_a_million_tokens_is_small():
    with pytest.MonkeyPatch.context() as patch:
        build, seen = flex_mask.build, []
        patch.setattr(flex_mask, "build", lambda *arguments: seen.append(build(*arguments)) or seen[-1])
        q = torch.empty(1, 1 << 20, 1, 1)
        flex_mask.find(q, q, None, None, -1, 0)
    (mask,) = seen
    assert sum(x.numel() * x.element_size() for x in mask) < 16 * 2**20


def test_masks_are_shared_between_layers_and_follow_boundaries_changed_in_place(monkeypatch):
    simulate(monkeypatch)
    q = torch.randn(70, 2, 16)
    cu_seqlens = torch.tensor([0, 30, 70], dtype=torch.int32)
    options = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_kv": cu_seqlens}
    first, _ = attention(q, q, q, **options)
    attention(q, q, q, **options)
    assert len(flex_mask._masks) == 1
    cu_seqlens[1] = 10
    changed, _ = attention(q, q, q, **options)
    assert not torch.allclose(first, changed)
    torch.testing.assert_close(changed, numerics.eager(q, q, q, **options)[0])


def test_the_caches_are_bounded(monkeypatch):
    simulate(monkeypatch)
    for n in range(1, 100):
        q = torch.randn(1, n, 1, 16)
        attention(q, q, q, scale=float(n))
    assert len(flex_mask._masks) <= flex_mask._MAX_CACHED_MASKS
    assert len(flex._scalar_tensors) <= flex._MAX_CACHED_SCALARS


def test_a_mask_made_in_inference_mode_serves_training_afterwards(monkeypatch):
    simulate(monkeypatch)
    q = torch.randn(1, 40, 2, 16)
    with torch.inference_mode():
        attention(q, q, q, is_causal=True)
    leaf = q.clone().requires_grad_()
    attention(leaf, q, q, is_causal=True)[0].sum().backward()
    assert len(flex_mask._masks) == 1
    assert not any(x.is_inference() for mask, _ in flex_mask._masks.values() for x in mask)


@pytest.mark.parametrize(
    ("shape_q", "shape_v", "reason"),
    [
        ((1, 8, 2, 520), (1, 8, 2, 64), "head_dim_qk 520: expected at most 512"),
        ((1, 8, 2, 64), (1, 8, 2, 520), "head_dim_v 520: expected at most 512"),
        ((70000, 8, 2, 64), (70000, 8, 2, 64), "batch 70000: expected at most 65535"),
        ((8, 70000, 64), (8, 2, 64), "heads_q 70000: expected at most 65535"),
        ((70000, 8, 64), (70000, 8, 64), None),  # packed: rows, not a batch
        ((2, 8, 2, 64), (2, 8, 2, 64), None),
    ],
)
def test_refusals_name_the_reason(shape_q, shape_v, reason, monkeypatch):
    monkeypatch.setattr(flex, "_HAS_TRITON", True)
    q, v = torch.empty(shape_q, device="meta"), torch.empty(shape_v, device="meta")
    assert flex.size_refusal(q, q, v) == reason


def test_a_missing_triton_is_refused(monkeypatch):
    monkeypatch.setattr(flex, "_HAS_TRITON", False)
    assert "triton is not installed" in flex.size_refusal(*(torch.empty(1, 8, 2, 64),) * 3)


# ---- What is compiled ------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch):
    """The list of graphs compiled so far; they run as they are (FlexAttention by torch's own dense definition)."""
    compiled = []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)  # refuses gradients on the CPU
    yield compiled
    torch._dynamo.reset()


_SMALL = {"heads_q": 4, "heads_kv": 2, "head_dim_qk": 16}


def test_one_graph_serves_all_lengths_batches_windows_and_scales(graphs):
    for case in (
        Case(batch=2, seqlen_q=150, is_causal=True, **_SMALL),
        Case(batch=2, seqlen_q=2, seqlen_kv=2, **_SMALL),
        Case(batch=3, seqlen_q=129, seqlen_kv=400, window=(5, 9), **_SMALL),
        Case(batch=4, seqlen_q=400, seqlen_kv=129, is_causal=True, scale=0.7, **_SMALL),
        Case(batch=128, seqlen_q=3, seqlen_kv=257, scale=-0.1, **_SMALL),
    ):
        numerics.check(attention, case, torch.float32)
    assert len(graphs) == 1


def test_one_graph_serves_all_packs(graphs):
    for case in (
        Case(seqlens_q=(3, 100, 0, 70), seqlens_kv=(70, 3, 9, 70), rest_q=4, **_SMALL),
        Case(seqlens_q=(300,), is_causal=True, **_SMALL),
        Case(seqlens_q=(7,) * 40, window=(3, 0), rest_kv=1, **_SMALL),
    ):
        numerics.check(attention, case, torch.float32)
    assert len(graphs) == 1


def test_every_kind_of_call_stays_compiled_past_the_recompile_limit(graphs):
    kinds = [(1, 16, ()), (1, 16, ("q",)), (1, 16, ("q", "k", "v")), (2, 16, ("q",)), (1, 24, ("q",))]
    with torch._dynamo.config.patch(recompile_limit=3):  # each more is seconds of compiling
        for _ in range(2):
            for heads, head_dim, wants in kinds:
                case = Case(batch=2, seqlen_q=40, heads_q=heads, head_dim_qk=head_dim, is_causal=True)
                numerics.check(attention, case, torch.float32, wants=wants)
            assert len(graphs) == len(kinds)


@pytest.mark.parametrize(
    "case",
    [
        Case("softcap and window", batch=2, seqlen_q=150, window=(4, 9), softcap=3.0, **_SMALL),
        Case("sinks and masked rows", batch=2, seqlen_q=50, seqlen_kv=20, is_causal=True, has_sinks=True, **_SMALL),
        Case("pack with sinks", seqlens_q=(3, 30), seqlens_kv=(9, 0), rest_q=4, has_sinks=True, **_SMALL),
        Case("tiny head dims", batch=2, seqlen_q=40, head_dim_qk=3, head_dim_v=5),
        Case("one query", seqlen_q=1, seqlen_kv=70, is_causal=True, **_SMALL),
        Case("one of everything", seqlen_q=1, seqlen_kv=1, heads_q=1, head_dim_qk=16),
        Case("transposed", batch=2, seqlen_q=50, layout="transposed", is_causal=True, **_SMALL),
        Case("sliced", batch=2, seqlen_q=50, layout="sliced", is_causal=True, **_SMALL),
    ],
    ids=lambda case: case.name,
)
def test_compiled_kinds_equal_the_reference(case, graphs):
    numerics.check(attention, case, torch.float32)
    assert len(graphs) == 1
    numerics.check(attention, case, torch.float32, seed=1)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    "case",
    [
        Case("window, softcap, sinks", batch=2, seqlen_q=150, window=(4, 9), softcap=3.0, has_sinks=True, **_SMALL),
        Case("pack", seqlens_q=(3, 30, 0), seqlens_kv=(9, 0, 4), rest_q=4, has_sinks=True, **_SMALL),
        Case("no keys", seqlen_q=9, seqlen_kv=0, has_sinks=True),
    ],
    ids=lambda case: case.name,
)
def test_a_caller_that_compiles_gets_one_graph(case, graphs):
    compiled = torch.compile(functools.partial(attention, **case.options), fullgraph=True)

    def call(*, return_lse, scale, is_causal, window, softcap, **tensors):
        return compiled(**tensors)

    numerics.check(call, case, torch.float32)
    assert len(graphs) == 1
    assert not flex._kernels, "compiled apart from the caller's graph"


def test_a_caller_over_its_own_recompile_limit_still_gets_a_compiled_kernel(graphs):
    def model(q, tag):
        return attention(q, q, q)[0] * len(tag)

    compiled = torch.compile(model, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in range(5):
            q = torch.randn(2, 40 + n, 3, 16)
            torch.testing.assert_close(compiled(q, "x" * n), numerics.eager(q, q, q)[0] * n)
    assert len(flex._kernels) == 1


def test_calls_that_would_run_uncompiled_raise(graphs):
    q = torch.randn(2, 40, 2, 16)
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.raises(RuntimeError, match="is switched off here"),
    ):
        attention(q, q, q)


def test_a_recompile_limit_that_is_hit_raises(graphs, monkeypatch):
    monkeypatch.setattr(flex, "_signature", lambda *call: "all the same")
    q = torch.randn(2, 40, 2, 16)
    with torch._dynamo.config.patch(recompile_limit=1):
        attention(q, q, q)
        with pytest.raises(RuntimeError, match="reached its recompile limit"):
            attention(q, q[:, :, :1], q[:, :, :1])


def test_autocast_changes_nothing(graphs):
    q = torch.randn(2, 40, 2, 16)
    expected, _ = attention(q, q, q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = attention(q, q, q)
    assert torch.equal(out, expected)
    assert len(graphs) == 1


def test_checkpointing_recomputes_the_same(graphs):
    from torch.utils.checkpoint import checkpoint

    q = torch.randn(2, 40, 2, 16, requires_grad=True)

    def layer(x):
        return attention(torch.sin(x), x, x, is_causal=True)[0].square().sum()

    (expected,) = torch.autograd.grad(layer(q), q)
    (grad,) = torch.autograd.grad(checkpoint(layer, q, use_reentrant=False), q)
    assert torch.equal(grad, expected)


def test_grad_modes_have_graphs_of_their_own_and_agree(graphs):
    q = torch.randn(2, 40, 2, 16)
    results = [attention(q, q, q)[0]]
    with torch.no_grad():
        results.append(attention(q, q, q)[0])
    with torch.inference_mode():
        results.append(attention(q, q, q)[0].clone())
    results.append(attention(q.clone().requires_grad_(), q, q)[0].detach())
    assert all(torch.equal(result, results[0]) for result in results)
    assert len(graphs) == len(flex._kernels) == 4


@pytest.mark.parametrize("first", [True, False], ids=["retained first", "freed first"])
def test_a_graph_that_is_retained_gives_its_gradients_again(first, graphs):
    q, k, v = (torch.randn(2, 40, 2, 16, requires_grad=True) for _ in range(3))

    def gradients(out, keeps):
        return torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=keeps)

    expected = gradients(numerics.eager(q, k, v)[0], False)
    if not first:
        gradients(attention(q, k, v)[0], False)
    for _ in range(2):
        out, _lse = attention(q, k, v)
        for keeps in (True, True, False):
            for mine, other in zip(gradients(out, keeps), expected, strict=True):
                torch.testing.assert_close(mine, other)
    assert torch._functorch.config.donated_buffer, "what others compile is theirs"
    assert len(graphs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_graphs_are_retained_and_autocast_changes_nothing():
    """What Triton computes; dense stand-ins on the CPU follow autocast in backward."""
    q, k, v = (torch.randn(1, 256, 4, 64, device="cuda", requires_grad=True) for _ in range(3))

    def gradients():
        out = flashmla_hf.attention(q, k, v, is_causal=True, impl="flex")
        assert out.dtype == q.dtype
        return [torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True) for _ in range(2)]

    outside = gradients()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        inside = gradients()
    for results in zip(*outside, *inside, strict=True):
        for result in results:
            torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("sink", [math.nan, math.inf, -math.inf])
def test_nan_and_infinite_sinks_give_what_the_reference_gives(sink, monkeypatch):
    simulate(monkeypatch)
    q, k, v = torch.randn(1, 8, 2, 16), torch.randn(1, 5, 2, 16), torch.randn(1, 5, 2, 16)
    sinks = torch.tensor([sink, 0.5])
    expected = reference.attention(q, k, v, sinks=sinks, scale=0.25, window_right=0)
    found = attention(q, k, v, sinks=sinks, scale=0.25, is_causal=True)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, equal_nan=True)
