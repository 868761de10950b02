"""The table of the Hopper kernels (csrc/sm90/tiles.h) and what is derived from it."""

import re
from pathlib import Path

import pytest
from cases import SM90_ROWS, sm90_tiles

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("kind", ["Forward", "Backward", "Decode"])
def test_the_list_of_head_dims_names_every_entry_once_and_each_has_its_instantiation(kind):
    listed = sm90_tiles.head_dims(kind) + (sm90_tiles.head_dims("Latent") if kind == "Decode" else [])
    assert sorted(set(listed)) == sorted(listed) == sorted({row["head_dims"] for row in sm90_tiles.entries(kind)})
    files = (ROOT / "csrc/sm90/instantiations").glob(f"{kind.lower()}_*.cu")
    found = [re.findall(rf"launch_{kind.lower()}_head_dims<(\d+), (\d+)>", path.read_text()) for path in files]
    assert sorted((int(qk), int(v)) for ((qk, v),) in found) == sorted(listed)


@pytest.mark.parametrize(("kind", "name"), [("Fp8Forward", "fp8"), ("E4m3Decode", "e4m3_decode")])
def test_the_lists_of_fp8_name_every_entry_once_and_each_has_its_instantiation(kind, name):
    listed = [head_dim for head_dim, _ in sm90_tiles.head_dims(kind)]
    assert listed == sorted(set(listed)) == [row["head_dims"][0] for row in sm90_tiles.entries(kind)]
    files = (ROOT / "csrc/sm90/instantiations").glob(f"{name}_*.cu")
    found = [re.findall(rf"launch_{name}_head_dim<(\d+)>", path.read_text()) for path in files]
    assert sorted(int(head_dim) for (head_dim,) in found) == listed


def test_the_head_dims_shared_by_columns_have_a_kernel_for_dq():
    by_columns = {row["head_dims"][0] for row in sm90_tiles.entries("Backward") if row["kSplitsColumns"]}
    assert by_columns == {row["head_dims"][0] for row in sm90_tiles.entries("BackwardQueries")}


def test_every_kernel_asserts_that_its_products_are_one_wgmma():
    """CUTLASS's selector takes several narrower ones in silence, where a source does not ask for the extended shapes."""
    kernels = {path.name: path.read_text() for path in (ROOT / "csrc/sm90").rglob("*.cuh")}
    products = {
        name: set(re.findall(r"using (\w+)\s*=\s*decltype\(cute::make_tiled_mma", text))
        for name, text in kernels.items()
    }
    assert products["forward.cuh"] == {"MmaS", "MmaO"}
    for name, mmas in products.items():
        asserted = " ".join(re.findall(r"static_assert\((is_one_wgmma<.*)\);", kernels[name]))
        # SharedMma and RegisterMma of the backward are MmaDK and MmaDV.
        assert {mma for mma in mmas if not re.search(rf"\b{mma}\b", asserted)} <= {"SharedMma", "RegisterMma"}, name


def test_every_entry_has_a_comment_above_it():
    text = (ROOT / "csrc/sm90/tiles.h").read_text()
    entries = list(re.finditer(r"(.*\n)template <[^>]*>\nstruct \w+Config<[^>]*> {\n", text))
    assert len(entries) == sum(
        len(sm90_tiles.entries(kind))
        for kind in ("Forward", "Fp8Forward", "Backward", "BackwardQueries", "Decode", "E4m3Decode")
    )
    assert all(entry[1].startswith("//") for entry in entries)


def test_the_limits_are_those_of_the_list_of_head_dims():
    assert sm90_tiles.limits() == {
        "head_dim_multiple": 8, "largest_head_dim": SM90_ROWS[-1][0], "largest_decode_head_dim": 256,
        "largest_latent_head_dims": [576, 512],
        "largest_fp8_head_dim": 256, "e4m3_head_dim_multiple": 16, "largest_e4m3_decode_head_dim": 256,
    }  # fmt: skip
    assert max(max(row) for row in SM90_ROWS) == SM90_ROWS[-1][0]


def test_the_documents_say_what_the_table_says():
    assert sm90_tiles.main(["--check"]) == 0


def test_a_document_that_is_out_of_date_is_found(tmp_path, monkeypatch, capsys):
    (tmp_path / "page.md").write_text("up to <!-- tiles largest -->7<!-- /tiles -->\n")
    monkeypatch.setattr(sm90_tiles, "ROOT", tmp_path)
    monkeypatch.setattr(sm90_tiles, "DOCUMENTS", ("page.md",))
    assert sm90_tiles.main(["--check"]) == 1
    assert "page.md differs from csrc/sm90/tiles.h: run `make tiles`" in capsys.readouterr().err
    assert sm90_tiles.main([]) == 0
    assert (tmp_path / "page.md").read_text() == "up to <!-- tiles largest -->512<!-- /tiles -->\n"
    assert sm90_tiles.main(["--check"]) == 0
