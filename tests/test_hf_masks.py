"""The mask function and its forms: exact against Transformers' own dense masks, without copies, syncs or n x n
memory."""

from __future__ import annotations

import itertools

import pytest
import torch
from counting import counted_calls
from hf_support import DEVICE, build_causal_lm, close, kernel_calls, needs_kernel
from transformers import masking_utils as mu

from flashmla_hf import reference
from flashmla_hf.hf import boundaries, forward, masks


def is_in_memory(mask: torch.Tensor) -> bool:
    return not isinstance(mask, masks.LazyMask) or mask._state["dense"] is not None


class Layer(torch.nn.Module):
    """What an attention layer of a model is to the attention function."""

    def __init__(self, is_causal=True, **config):
        super().__init__()
        self.is_causal = is_causal
        self.config = type("Config", (), {"model_type": "test", **config})()


def qkv(batch, seqlen_q, seqlen_kv, heads_q=4, heads_kv=2, dim=8, layout="bshd", seed=0):
    """[batch, heads, seqlen, dim] as a model hands them over: views of [batch, seqlen, heads, dim], or of a cache."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((seqlen_q, heads_q), (seqlen_kv, heads_kv), (seqlen_kv, heads_kv))
    tensors = [torch.randn(batch, s, h, dim, generator=generator).to(DEVICE).transpose(1, 2) for s, h in shapes]
    return tensors if layout == "bshd" else [tensors[0], *(x.contiguous() for x in tensors[1:])]


def oracle(q, k, v, allowed):
    """Attention under a dense boolean mask [batch, 1, seqlen_q, seqlen_kv]; rows that see nothing are 0."""
    out, _ = reference.attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=allowed, scale=q.shape[-1] ** -0.5)
    return out


PADDINGS = {
    "none": None,
    "ones": [(0, 0), (0, 0), (0, 0)],
    "left": [(4, 0), (0, 0), (1, 0)],
    "left alike": [(3, 0), (3, 0), (3, 0)],
    "right": [(0, 5), (0, 0), (0, 1)],
    "both": [(2, 3), (0, 0), (5, 1)],
    "empty row": [(0, 12), (0, 0), (3, 0)],
}


def padding_mask(name, length, hole=False):
    if PADDINGS[name] is None:
        return None
    mask = torch.ones(3, length, dtype=torch.bool, device=DEVICE)
    for row, (left, right) in enumerate(PADDINGS[name]):
        mask[row, :left] = False
        mask[row, length - right :] = False
    if hole:
        mask[1, length // 2] = False
    return mask


def patterns(batch, length):
    """Every mask function of Transformers: name -> (function, arguments of the interface, the layer's own
    arguments)."""
    segments = torch.tensor(
        [[0] * 5 + [1] * (length - 5), [0] * length, [0, 1, 2] + [3] * (length - 3)], device=DEVICE
    )[:batch]
    positions = torch.stack([torch.cat([torch.arange(int(n)) for n in row.unique_consecutive(return_counts=True)[1]])
                             for row in segments.cpu()]).to(DEVICE)  # fmt: skip
    window = mu.sliding_window_causal_mask_function(4)

    def packed(base):
        if hasattr(mu, "packed_sequence_compatibility_function"):
            return mu.packed_sequence_compatibility_function(base, positions, segments)
        return mu.and_masks(base, mu.packed_sequence_mask_function(segments))

    both_ways = {"allow_is_bidirectional_skip": True, "allow_is_causal_skip": False}
    images = torch.full((batch, length), -1, device=DEVICE)
    images[:, 3:7] = 0
    insist = {"allow_is_causal_skip": False}
    zeros = torch.zeros(batch, dtype=torch.long, device=DEVICE)
    return {
        "causal": (mu.causal_mask_function, {}, {}),
        "window": (window, {"local_size": 4}, {"sliding_window": 4}),
        "window of one": (mu.sliding_window_causal_mask_function(1), {"local_size": 1}, {"sliding_window": 1}),
        "packed": (packed(mu.causal_mask_function), {"allow_is_causal_skip": False}, {}),
        "packed window": (packed(window), {"local_size": 4, "allow_is_causal_skip": False}, {"sliding_window": 4}),
        "chunked": (mu.chunked_causal_mask_function(5, zeros), {"local_size": 5}, {}),
        "one chunk": (mu.chunked_causal_mask_function(50, zeros), {"local_size": 50}, {}),
        "image": (mu.or_masks(mu.causal_mask_function, mu.blockwise_overlay(images)), insist, {}),
        "custom": (
            mu.or_masks(mu.causal_mask_function, lambda b, h, q, k: (q < 6) & (k < 6)),
            {"allow_is_causal_skip": False, "use_vmap": True},
            {},
        ),
        "full": (mu.bidirectional_mask_function, both_ways, {"is_causal": False}),
        "full window": (
            mu.sliding_window_bidirectional_mask_function(3), {**both_ways, "local_size": 3},
            {"is_causal": False, "sliding_window": 4},
        ),
    }  # fmt: skip


NAMES = tuple(patterns(3, 12))
# A hole needs a padding mask; packed sequences have none.
PATTERNS = [
    pytest.param(name, padding, hole, id=f"{name}-{padding}-{'hole' if hole else ''}")
    for name in NAMES
    for padding in PADDINGS
    for hole in (False, True)
    if padding != "none" or not hole
    if padding == "none" or "packed" not in name
]


@needs_kernel
@pytest.mark.parametrize(("name", "padding", "hole"), PATTERNS)
def test_every_pattern_and_padding_is_exact(name, padding, hole):
    length = 12
    function, arguments, options = patterns(3, length)[name]
    mask = padding_mask(padding, length, hole)
    size = {"batch_size": 3, "q_length": length, "kv_length": length, "device": DEVICE, "mask_function": function}
    form = masks.flashmla_mask(attention_mask=mask, **size, **arguments)
    allowed = mu.sdpa_mask(
        attention_mask=mask, **size, allow_is_causal_skip=False, use_vmap=arguments.get("use_vmap", False)
    )
    q, k, v = qkv(3, length, length)
    is_causal = options.get("is_causal", True)
    with counted_calls() as calls:
        got, _ = forward.attention_forward(
            Layer(is_causal), q, k, v, form, sliding_window=options.get("sliding_window")
        )
    # The mask is the truth: it counts for a layer that does not say the same, or says nothing.
    for layer in (Layer(not is_causal), torch.nn.Module()):
        assert torch.equal(forward.attention_forward(layer, q, k, v, form)[0], got)
    want = oracle(q, k, v, allowed)
    is_padding = None if mask is None else ~mask[:, :, None, None]
    if is_padding is not None:  # padding queries are nobody's business, but they are finite
        assert torch.isfinite(got).all()
        got, want = got.masked_fill(is_padding, 0.0), want.masked_fill(is_padding, 0.0)
    assert close(got, want, 1e-5)
    needs_dense = hole or name in ("image", "custom") or (name == "chunked" and padding not in ("none", "ones"))
    needs_dense |= name == "chunked" and hole
    assert (kernel_calls(calls) == 0) == needs_dense
    if not needs_dense:
        assert not is_in_memory(form), "no n x n mask"
    assert torch.equal(form.clone(), allowed)


@needs_kernel
@pytest.mark.parametrize("layout", ["bshd", "cache"])
@pytest.mark.parametrize("padding", ["none", "ones", "left", "left alike", "empty row"])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("cache", ["dynamic", "static", "static tensor"])
def test_decoding_and_chunked_prefill_are_exact(cache, queries, padding, layout):
    """Fewer queries than keys, and caches with rows that hold nothing yet."""
    seen, size = 12, 12 if cache == "dynamic" else 20
    q, k, v = qkv(3, queries, size, layout=layout)
    mask = padding_mask(padding, seen)
    offset = torch.tensor(seen - queries, device=DEVICE) if "tensor" in cache else seen - queries
    for name, options in (("causal", {}), ("window", {"local_size": 4})):
        function = patterns(3, seen)[name][0]
        arguments = {
            "batch_size": 3, "q_length": queries, "kv_length": size, "q_offset": offset, "mask_function": function,
            "attention_mask": mask, "device": DEVICE,
        }  # fmt: skip
        form = masks.flashmla_mask(**arguments, **options)
        allowed = mu.sdpa_mask(**arguments, allow_is_causal_skip=False)
        with counted_calls() as calls:
            got, _ = forward.attention_forward(Layer(), q, k, v, form, sliding_window=options.get("local_size"))
        assert kernel_calls(calls) == 1
        want = oracle(q, k, v, allowed)
        if mask is not None:
            is_padding = ~mask[:, seen - queries :, None, None]
            got, want = got.masked_fill(is_padding, 0.0), want.masked_fill(is_padding, 0.0)
        assert close(got, want, 1e-5)


@needs_kernel
def test_padding_queries_give_exactly_zero_and_get_no_gradient():
    q, k, v = (x.requires_grad_() for x in qkv(3, 12, 12))
    mask = padding_mask("both", 12)
    form = masks.flashmla_mask(3, 12, 12, attention_mask=mask, device=DEVICE)
    out, _ = forward.attention_forward(Layer(), q, k, v, form)
    assert (out[~mask] == 0).all()
    out.sum().backward()
    for x in (q, k, v):
        assert (x.grad.transpose(1, 2)[~mask] == 0).all()
        assert (x.grad.transpose(1, 2)[mask] != 0).any()


@needs_kernel
def test_a_users_four_dimensional_mask_is_applied_alone():
    """No causal mask and no window on top; boolean keeps, floating is added; broadcast heads and queries."""
    q, k, v = qkv(2, 10, 10)
    generator = torch.Generator().manual_seed(3)
    kept = (torch.rand(2, 1, 10, 10, generator=generator) < 0.6).to(DEVICE)
    kept[..., 0] = True
    bias = torch.randn(2, 4, 10, 10, generator=generator).to(DEVICE)
    keys = torch.ones(2, 1, 1, 10, dtype=torch.bool, device=DEVICE)
    keys[0, ..., 7:] = False
    for mask in (kept, bias, keys, torch.where(kept, 0.0, torch.finfo(torch.float32).min)):
        got, _ = forward.attention_forward(Layer(), q, k, v, mask, sliding_window=2)
        assert close(got, oracle(q, k, v, mask.expand(2, 4 if mask is bias else 1, 10, 10)), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("shape", [(2, 1, 2, 10), (2, 3, 3, 10), (3, 1, 3, 10), (3, 1, 1, 1)])
def test_a_users_mask_of_another_shape_is_refused(shape, dtype):
    """Eager attention raises, too; nothing says which rows, heads or queries such a mask means."""
    q, k, v = qkv(2, 3, 10)
    wanted = (
        r"attention_mask: expected a 4-D mask that broadcasts to \[2, 4, 3, 10\] \[batch, heads, queries, keys\], got"
    )
    with pytest.raises(ValueError, match=wanted):
        forward.attention_forward(Layer(), q, k, v, torch.ones(shape, dtype=dtype, device=DEVICE))


def test_a_padding_mask_of_another_batch_is_refused():
    q, k, v = qkv(2, 3, 10)
    with pytest.raises(ValueError, match=r"attention_mask: expected the batch of the queries, 2, got \[3, 10\]"):
        forward.attention_forward(Layer(), q, k, v, torch.ones(3, 10, dtype=torch.bool, device=DEVICE))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_boundaries_cut_a_four_dimensional_mask(dtype):
    """As that of a model whose images see themselves, in a packed row."""
    q, k, v = qkv(1, 12, 12)
    boundaries = torch.tensor([0, 5, 12], dtype=torch.int32, device=DEVICE)
    kept = torch.ones(12, 12, device=DEVICE).tril().bool()
    kept[3:8, 3:8] = True
    segment = torch.arange(12, device=DEVICE) >= 5
    mask = kept[None, None] if dtype == torch.bool else torch.where(kept, 0.0, torch.finfo(dtype).min)[None, None]
    got, _ = forward.attention_forward(Layer(), q, k, v, mask, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries)
    assert close(got, oracle(q, k, v, (kept & (segment[:, None] == segment))[None, None]), 1e-5)


@needs_kernel
@pytest.mark.parametrize("shape", [(3, 1, 1, 12), (1, 1, 1, 12), (3, 1, 12, 12), (3, 12)])
def test_a_mask_that_hides_every_key_gives_zero(shape):
    q, k, v = (x.requires_grad_() for x in qkv(3, 12, 12))
    out, _ = forward.attention_forward(Layer(), q, k, v, torch.zeros(shape, dtype=torch.bool, device=DEVICE))
    assert (out == 0).all()
    out.sum().backward()
    assert all((x.grad == 0).all() for x in (q, k, v))


def test_a_four_dimensional_mask_of_integers_raises():
    q, k, v = qkv(3, 12, 12)
    for dtype in (torch.int32, torch.int64):
        with pytest.raises(ValueError, match="expected bool"):
            forward.attention_forward(Layer(), q, k, v, torch.ones(3, 1, 12, 12, dtype=dtype, device=DEVICE))


@needs_kernel
def test_a_tokenizers_integer_mask_is_key_padding():
    """Layers of models that go around the mask layer hand it over as it is."""
    q, k, v = qkv(3, 12, 12)
    mask = padding_mask("both", 12)
    want, _ = forward.attention_forward(Layer(), q, k, v, mask)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.float32):
        got, _ = forward.attention_forward(Layer(), q, k, v, mask.to(dtype))
        assert torch.equal(got, want)
    one_row = mask[:1].expand(3, -1)
    want_alike, _ = forward.attention_forward(Layer(), q, k, v, one_row)
    assert torch.equal(forward.attention_forward(Layer(), q, k, v, mask[:1].long())[0], want_alike)
    last = q[:, :, -2:]
    decoded = [forward.attention_forward(Layer(), last, k, v, mask.to(dtype))[0] for dtype in (torch.bool, torch.int32)]
    assert torch.equal(*decoded)
    longer = torch.cat([torch.ones(3, 4, dtype=torch.long, device=DEVICE), mask.long()], dim=1)  # a sliding cache
    assert torch.equal(forward.attention_forward(Layer(), q, k, v, longer)[0], want)


@needs_kernel
def test_callers_that_insist_on_a_tensor_get_one():
    form = masks.flashmla_mask(2, 8, 8, allow_is_causal_skip=False, device=DEVICE)
    assert torch.equal(form, mu.sdpa_mask(2, 8, 8, allow_is_causal_skip=False, device=DEVICE))
    form = masks.flashmla_mask(
        2, 8, 8, mask_function=mu.bidirectional_mask_function, allow_is_bidirectional_skip=False, device=DEVICE
    )
    assert form.shape == (2, 1, 8, 8)


@pytest.fixture
def reads(monkeypatch):
    """Counts how often Python looks at the values of a tensor: on a GPU each is a synchronisation."""
    count = [0]
    for name in ("tolist", "item", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)

        def counting(self, _original=original):
            count[0] += 1
            return _original(self)

        monkeypatch.setattr(torch.Tensor, name, counting)
    return count


@needs_kernel
@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", ["padding", "segments", "positions"])
def test_all_layers_of_a_forward_pass_share_one_synchronisation(kind, inference, reads):
    q, k, v = qkv(2, 12, 12)
    with torch.inference_mode(inference):
        positions = torch.cat([torch.arange(5), torch.arange(7)]).to(DEVICE)[None]
        reads[0] = 0
        form, options = None, {}
        if kind == "padding":
            mask = torch.ones(2, 12, dtype=torch.bool, device=DEVICE)
            mask[0, :3] = False
            form = masks.flashmla_mask(2, 12, 12, attention_mask=mask, device=DEVICE)
        elif kind == "segments":
            function = mu.packed_sequence_mask_function(torch.tensor([[1] * 5 + [2] * 7] * 2, device=DEVICE))
            form = masks.flashmla_mask(2, 12, 12, mask_function=mu.and_masks(mu.causal_mask_function, function))
        else:
            options = {"position_ids": positions}
        outs = [forward.attention_forward(Layer(), q, k, v, form, **options)[0] for _ in range(4)]
        # Positions: whether they pack at all, and how many sequences. A user's inference-mode tensor does not count its
        # changes, so nothing may be kept on it.
        if kind != "positions":
            assert reads[0] == 1
        elif not inference:
            assert reads[0] == 2
    assert all(torch.equal(outs[0], out) for out in outs)


@needs_kernel
def test_a_mask_changed_in_place_is_read_again():
    q, k, v = qkv(2, 12, 12)
    mask = torch.ones(2, 12, dtype=torch.bool, device=DEVICE)
    mask[0, :3] = False
    first, _ = forward.attention_forward(Layer(), q, k, v, mask)
    mask[0, :6] = False
    second, _ = forward.attention_forward(Layer(), q, k, v, mask)
    assert (first[0, 3:6] != 0).any()
    assert (second[0, :6] == 0).all()


@needs_kernel
@pytest.mark.parametrize("kind", ["mask", "positions", "boundaries"])
def test_what_changed_uncounted_since_the_last_forward_pass_is_read_again(kind):
    """A collective writes into its buffer without a new version, as ``.data`` does: torch does not count it."""
    q, k, v = qkv(1, 8, 8)
    layers = [Layer(), Layer()]
    values = {
        "mask": [[1] * 8, [0] * 3 + [1] * 5],
        "positions": [[*range(8)], [*range(3), *range(5)]],
        "boundaries": [[0, 5, 8], [0, 3, 8]],
    }[kind]

    def attend(x):
        options = {"mask": {"attention_mask": x}, "positions": {"position_ids": x}}
        given = options.get(kind, {"cu_seq_lens_q": x, "cu_seq_lens_k": x, "max_length_q": 8, "max_length_k": 8})
        return [forward.attention_forward(layer, q, k, v, **given)[0] for layer in layers]

    wanted = [torch.tensor([x] if kind != "boundaries" else x, device=DEVICE) for x in values]
    buffer = torch.zeros_like(wanted[0])
    outs = []
    for x in wanted:
        buffer.data.copy_(x)
        assert buffer._version == 0, "uncounted"
        outs.append(attend(buffer))
        assert all(torch.equal(got, expected) for got, expected in zip(outs[-1], attend(x.clone()), strict=True))
    assert not torch.equal(outs[0][0], outs[1][0])


@needs_kernel
def test_a_pass_that_runs_again_in_backward_reads_nothing_again(reads):
    q, k, v = (x.requires_grad_() for x in qkv(1, 12, 12))
    positions = torch.cat([torch.arange(5), torch.arange(7)]).to(DEVICE)[None]
    layers = [Layer(), Layer()]
    reads[0] = 0
    out = q
    for layer in layers:
        out = torch.utils.checkpoint.checkpoint(
            lambda x, layer=layer: forward.attention_forward(layer, x, k, v, position_ids=positions)[0].transpose(1, 2),
            out, use_reentrant=False,
        )  # fmt: skip
    before = reads[0]
    out.sum().backward()
    assert before == reads[0] == 2


@needs_kernel
def test_a_mask_kept_from_inference_mode_can_be_trained_with():
    q, k, v = qkv(2, 12, 12)
    mask = padding_mask("left", 12)[:2].clone()
    with torch.inference_mode():
        forward.attention_forward(Layer(), q, k, v, mask)
    q.requires_grad_()
    forward.attention_forward(Layer(), q, k, v, mask)[0].sum().backward()


def test_flattening_copies_nothing_where_tokens_are_dense(monkeypatch):
    seen = []
    monkeypatch.setattr(forward, "attention", lambda *tensors, **options: seen.append(tensors) or tensors[0])
    for batch, layout in ((3, "bshd"), (1, "cache")):
        q, k, v = qkv(batch, 24, 24, layout=layout)
        mask = torch.ones(batch, 24, dtype=torch.bool, device=DEVICE)
        mask[0, :4] = False
        forward.attention_forward(Layer(), q, k, v, mask)
        assert [x.data_ptr() for x in seen[-1]] == [x.data_ptr() for x in (q, k, v)]
        assert seen[-1][0].dim() == 3


def test_positions_are_read_as_packed_rows_only_where_they_are():
    find = boundaries.segments_from_positions
    arange = torch.arange(8, device=DEVICE)[None]
    assert find(arange + 5, 1, 8, True) is None
    assert find(None, 1, 8, True) is None
    assert find(arange[:, :1], 1, 1, True) is None
    assert find(torch.zeros(3, 2, 8, device=DEVICE, dtype=torch.long), 2, 8, True) is None
    packed = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]], device=DEVICE)
    assert find(packed, 2, 8, True).tolist() == [[1, 1, 1, 2, 2, 3, 3, 3]] * 2
    jumps = torch.tensor([[2, 3, 7, 8, 2, 3, 5, 6]], device=DEVICE)  # patches of two images
    assert find(jumps, 1, 8, False).tolist() == [[1, 1, 1, 1, 2, 2, 2, 2]]


@pytest.mark.parametrize("batch", [1, 3])
def test_boundaries_of_any_padding_cover_every_token_once(batch):
    for lefts in itertools.product(range(4), repeat=min(batch, 2)):
        mask = torch.ones(batch, 6, dtype=torch.bool, device=DEVICE)
        for row, left in enumerate(lefts):
            mask[row, :left] = False
        ranges = boundaries.key_ranges(mask)
        for seqlen_q in (1, 2, 6):
            q, kv = boundaries.range_boundaries(ranges, seqlen_q, 6, True)
            assert q.dtype == kv.dtype == torch.int32
            assert q.shape == kv.shape == (5 * batch + 1,)
            assert int(q[0]) == int(kv[0]) == 0
            assert int(q[-1]) == batch * seqlen_q
            assert int(kv[-1]) == batch * 6
            assert (q.diff() >= 0).all()
            assert (kv.diff() >= 0).all()


def test_ranges_in_a_graph_of_any_length_are_reduced_in_the_dtype_of_lengths():
    """int64: torch 2.11 compiles a reduction of int32 beside a symbolic length into Triton code of two types, which fails (see
    tests/test_hf_gpu.py)."""
    reduced = []

    def look(graph, _):
        reduced.extend(
            node.meta["example_value"].dtype for node in graph.graph.nodes if node.target in ("amin", "amax")
        )
        return graph.forward

    def ranges(mask):
        found = boundaries.key_ranges(mask)
        return found.start, found.end

    torch._dynamo.reset()
    mask = torch.arange(12, device=DEVICE) >= torch.tensor([[3], [0]], device=DEVICE)
    start, end = torch.compile(ranges, backend=look, dynamic=True, fullgraph=True)(mask)
    assert (start.tolist(), end.tolist()) == ([3, 0], [12, 12])
    assert reduced == [torch.int64] * 2


@pytest.mark.filterwarnings("ignore:flashmla attention. ")
def test_a_mask_of_other_keys_than_the_layers_is_refused_and_one_of_one_key_is_broadcast():
    q, k, v = qkv(3, 6, 9)
    for shape in ((3, 1, 6, 12), (3, 1, 1, 12), (3, 1, 6, 5), (3, 1, 1, 5)):
        for mask in (torch.ones(shape, dtype=torch.bool, device=DEVICE), torch.zeros(shape, device=DEVICE)):
            message = f"expected a mask of the layer's 9 keys, got one of {shape[-1]}.* raised leaves a cache of uneven layers"
            with pytest.raises(ValueError, match=message):
                forward.attention_forward(Layer(False), q, k, v, mask)
    everything = torch.ones(3, 1, 1, 1, dtype=torch.bool, device=DEVICE)
    out, _ = forward.attention_forward(Layer(False), q, k, v, everything)
    assert close(out, oracle(q, k, v, everything))


@pytest.mark.filterwarnings("ignore")
def test_a_prefix_under_transformers_checkpointing_raises_as_in_eager():
    # Checkpointed layers leave past_key_values out, and the mask does not: its first columns would show later tokens.
    model = build_causal_lm("flashmla")
    ids = torch.arange(1, 9, device=DEVICE)[None]
    prefix = model(ids[:, :3], use_cache=True).past_key_values
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="Under gradient checkpointing a layer ignores past_key_values"):
        model.train()(ids, past_key_values=prefix, labels=ids)
