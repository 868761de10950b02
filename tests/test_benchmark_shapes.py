"""Shapes of the benchmarks: FLOPs, visible pairs and tiles, and the text that names them."""

from __future__ import annotations

import bench_attention
import pytest
import torch
from shapes import SUITES, Shape


def test_flops_follow_their_formulas():
    full = Shape(2, 8, 4, 1000, 1000, 128, 64)
    pairs = 2 * 8 * 1000 * 1000
    assert full.flops("fwd") == 2 * pairs * (128 + 64)
    assert full.flops("bwd") == 2 * pairs * (3 * 128 + 2 * 64)
    assert full.flops("fwd+bwd") == full.flops("fwd") + full.flops("bwd")
    causal = Shape(2, 8, 4, 1000, 1000, 128, 64, is_causal=True)
    assert causal.flops("fwd") * 2 == full.flops("fwd")


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_kv", "window"),
    [(50, 50, None), (50, 50, 7), (20, 50, None), (20, 50, 7), (50, 20, None), (50, 20, 7)],
)
def test_visible_pairs_are_those_of_the_mask(seqlen_q, seqlen_kv, window):
    shape = Shape(1, 1, 1, seqlen_q, seqlen_kv, 8, 8, True, window)
    position = torch.arange(seqlen_q)[:, None] + seqlen_kv - seqlen_q
    key = torch.arange(seqlen_kv)
    visible = (key <= position) & (key >= position - (seqlen_kv if window is None else window))
    assert shape.visible_pairs() == int(visible.sum())


def test_a_window_counts_its_pairs_and_full_causal_half_the_square():
    windowed = Shape(1, 1, 1, 8192, 8192, 64, 64, True, 512)
    assert windowed.flops("fwd") == 2 * windowed.visible_pairs() * 128
    assert windowed.flops("fwd") < 0.13 * Shape(1, 1, 1, 8192, 8192, 64, 64, True).flops("fwd")


@pytest.mark.parametrize("layout", ["packed", "ragged"])
def test_a_pack_counts_the_pairs_of_its_documents(layout):
    shape = Shape(16, 4, 2, 1024, 1024, 64, 64, True, layout=layout)
    lengths = shape.lengths()
    assert (len(lengths), sum(lengths)) == (16, 16 * 1024)
    assert [d.stop - d.start for d in shape.documents()] == lengths
    assert shape.visible_pairs() == sum(n * (n + 1) // 2 for n in lengths)
    assert shape.flops("fwd") == 2 * 4 * 128 * (sum(n * n for n in lengths) // 2)
    assert (min(lengths), max(lengths)) == ((209, 3228) if layout == "ragged" else (1024, 1024))  # as documented


@pytest.mark.parametrize(
    "text",
    ["d64 B2 H1 S300 full", "d64 B1 H1 S300 causal", "d64 B1 H1 S100/300 causal", "d64 B1 H1 S300/100 causal",
     "d64 B1 H1 S300 window40", "d64 B1 H1 S200/300 window100", "d64 B3 H1 S90 causal ragged"],
)  # fmt: skip
def test_tiles_visited_are_those_with_a_visible_pair(text):
    shape, tiles = Shape.parse(text), 0
    for length in shape.lengths():
        seqlen_kv = length if shape.is_packed else shape.seqlen_kv
        position, key = torch.arange(length)[:, None] + seqlen_kv - length, torch.arange(seqlen_kv)
        visible = torch.ones(length, seqlen_kv, dtype=torch.bool)
        if shape.is_causal:
            window = seqlen_kv if shape.window is None else shape.window
            visible = (key <= position) & (key >= position - window)
        tiles += sum(bool(tile.any()) for rows in visible.split(64) for tile in rows.split(32, dim=1))
    assert shape.tiles_visited(64, 32) == tiles


@pytest.mark.parametrize("suite", SUITES)
def test_shapes_read_back_as_they_are_printed(suite):
    for shape in SUITES[suite].shapes:
        assert Shape.parse(str(shape)) == shape


@pytest.mark.parametrize(
    "text",
    [
        "d64",
        "d64 B1 H3/2 S8 causal",
        "d64 B1 H2 S8 sideways",
        "d64 B2 H2 S8/9 causal ragged",
        "d64/72 B1 H2/1 S8 full latent",
    ],
)
def test_a_text_that_names_no_shape_is_refused_with_the_expected_form(text):
    with pytest.raises(SystemExit, match="--shape"):
        bench_attention.main(["--shape", text, "--device", "cpu"])
