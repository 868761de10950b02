"""The benchmarks' peer by cuDNN's own frontend: the graphs that it builds, with a stand-in that computes what they say."""

from __future__ import annotations

import sys
import types

import check
import cudnn_frontend
import pytest
import torch
from check import Inputs
from peers import FP8_TOLERANCES, PEERS, Peer, Unsupported
from shapes import Shape

from flashmla_hf import attention


class Tensor:
    def __init__(self, name, dim=None, stride=None, data_type=None):
        self.name, self.dim, self.stride, self.data_type = name, dim, stride, data_type
        self.offsets, self.is_output = None, False

    def set_output(self, value):
        self.is_output = value
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self

    def set_data_type(self, kind):
        self.data_type = kind
        return self

    def set_ragged_offset(self, tensor):
        self.offsets = tensor
        return self


class Graph:
    """A graph of cuDNN's frontend with one attention, computed by the reference."""

    fp8_outputs = ("BFLOAT16", "FP8_E4M3")

    def __init__(self, **options):
        assert options.keys() == {"io_data_type", "intermediate_data_type", "compute_data_type", "handle"}
        self.is_built = False

    def tensor(self, *, name, dim, stride, data_type):
        assert all(isinstance(number, int) for number in (*dim, *stride))
        return Tensor(name, dim, stride, data_type)

    def sdpa(self, *, q, k, v, generate_stats, **options):
        self.kind, self.options, self.inputs = "fwd", options, (q, k, v)
        self.outputs = (Tensor("O"), Tensor("Stats") if generate_stats else None)
        return self.outputs

    def sdpa_backward(self, *, q, k, v, o, dO, stats, **options):
        self.kind, self.options, self.inputs = "bwd", options, (q, k, v, o, dO, stats)
        self.outputs = (Tensor("dQ"), Tensor("dK"), Tensor("dV"))
        return self.outputs

    def sdpa_fp8(self, *, q, k, v, generate_stats, **options):
        assert generate_stats is False
        self.kind, self.inputs = "fp8", (q, k, v)
        self.scales = {
            name: options.pop(name)
            for name in ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        }
        self.options, self.outputs = options, (Tensor("O"), None, Tensor("Amax_S"), Tensor("Amax_O"))
        return self.outputs

    def build(self, heuristics):
        if self.kind == "fp8" and self.outputs[0].data_type not in self.fp8_outputs:
            raise RuntimeError("no engine")
        assert heuristics == ["A", "FALLBACK"]
        assert all(tensor is None or tensor.is_output for tensor in self.outputs)
        self.is_built = True

    def get_workspace_size(self):
        return 0

    def execute(self, pack, workspace, handle):
        assert self.is_built
        assert handle == "handle"
        assert workspace.dtype == torch.uint8
        options = {"scale": self.options["attn_scale"]}
        if "diagonal_band_right_bound" in self.options:
            assert self.options["diagonal_alignment"] == "BOTTOM_RIGHT"
            left = self.options.get("diagonal_band_left_bound")
            options["window"] = (None if left is None else left - 1, self.options["diagonal_band_right_bound"])
        if self.options.get("use_padding_mask"):
            lengths = pack[self.options["seq_len_q"]].flatten()
            bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
            options |= {"cu_seqlens_q": bounds, "cu_seqlens_kv": bounds}
            for tensor in (*self.inputs, *self.outputs):
                if tensor is not None and tensor.offsets is not None:
                    rows = pack[tensor.offsets].flatten() // (tensor.dim[1] * tensor.dim[3])
                    assert rows.tolist() == bounds.tolist(), tensor.name
        else:
            for tensor in (*self.inputs, *self.outputs):
                if tensor in pack and "tat" not in tensor.name:
                    assert list(pack[tensor].shape) == tensor.dim
                    assert list(pack[tensor].stride()) == tensor.stride
        plain = [
            pack[tensor] if pack[tensor].dim() == 3 else pack[tensor].transpose(1, 2) for tensor in self.inputs[:3]
        ]
        if self.kind == "fp8":
            assert all(x.dtype == torch.float8_e4m3fn for x in plain)
            plain = [x.float() * pack[self.scales[f"descale_{name}"]] for name, x in zip("qkv", plain, strict=True)]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in plain]
            out = attention(*leaves, impl="reference", **options)
        as_given = lambda x, like: x if like.dim() == 3 else x.transpose(1, 2)  # noqa: E731
        if self.kind == "fp8":
            out = out * pack[self.scales["scale_o"]]
        if self.kind != "bwd":
            pack[self.outputs[0]].copy_(as_given(out.detach(), pack[self.outputs[0]]))
            return
        dout = pack[self.inputs[4]]
        for tensor, gradient in zip(self.outputs, torch.autograd.grad(out, leaves, as_given(dout, dout)), strict=True):
            pack[tensor].copy_(as_given(gradient, pack[tensor]))


def fake_cudnn():
    named = lambda *names: types.SimpleNamespace(**{name: name for name in names})  # noqa: E731
    return types.SimpleNamespace(
        create_handle=lambda: "handle", pygraph=Graph, heur_mode=named("A", "FALLBACK"), backend_version=lambda: 91000,
        data_type=named("BFLOAT16", "HALF", "FLOAT", "INT32", "INT64", "FP8_E4M3"), diagonal_alignment=named("BOTTOM_RIGHT"),
    )  # fmt: skip


CUDNN_SHAPES = [
    "d64 B2 H4/2 S100 causal fp32", "d64 B1 H2/2 S70 full fp32", "d48/32 B2 H3/1 S90 window20 fp32",
    "d64 B3 H4/2 S80 causal ragged fp32", "d64 B2 H2/1 S40 full packed fp32",
]  # fmt: skip


@pytest.mark.parametrize("text", CUDNN_SHAPES)
def test_cudnns_frontend_is_asked_for_the_right_attention(text):
    shape = Shape.parse(text)
    peer = Peer(cudnn_frontend.Attention(fake_cudnn(), shape, "cpu"))
    inputs = Inputs.random(shape, "cpu")
    truth = check.expected(shape, inputs, needs_gradients=True)
    for training in (False, True):
        problem, errors = check.verdict(shape, peer, inputs, truth, training)
        assert problem is None, (problem, errors)


@pytest.mark.parametrize("text", CUDNN_SHAPES)
def test_the_frontends_own_graph_takes_the_arguments(text):
    """As far as a machine without cuDNN can tell: the graph of the package, if it is installed, is valid."""
    cudnn = pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    attend = cudnn_frontend.Attention(
        types.SimpleNamespace(
            create_handle=lambda: None, data_type=cudnn.data_type, diagonal_alignment=cudnn.diagonal_alignment,
            heur_mode=cudnn.heur_mode, pygraph=_validated(cudnn.pygraph),
        ),
        Shape.parse(text), "cpu",
    )  # fmt: skip
    for which in ("fwd", "fwd with stats", "bwd"):
        graph, _ = attend._build(which)
        assert graph.was_validated


def _validated(kind):
    class Validated(kind):
        def build(self, heuristics):
            self.validate()
            self.was_validated = True

    return Validated


@pytest.mark.parametrize("outputs", [("BFLOAT16", "FP8_E4M3"), ("FP8_E4M3",)], ids=str)
@pytest.mark.parametrize("text", ["d64 B2 H4/2 S100 causal bf16", "d64 B1 H2/2 S70 full bf16"])
def test_cudnns_fp8_is_asked_for_the_right_attention(text, outputs, monkeypatch):
    monkeypatch.setattr(Graph, "fp8_outputs", outputs)
    shape = Shape.parse(text)
    peer = Peer(cudnn_frontend.Fp8Attention(fake_cudnn(), shape, "cpu"), tolerances=FP8_TOLERANCES)
    inputs = Inputs.random(shape, "cpu")
    truth = check.expected(shape, inputs, needs_gradients=False)
    problem, errors = check.verdict(shape, peer, inputs, truth, training=False)
    assert problem is None
    assert 0.01 < errors["O"] < 0.08
    monkeypatch.setattr(Graph, "fp8_outputs", ())
    with pytest.raises(RuntimeError, match="no engine"):
        cudnn_frontend.Fp8Attention(fake_cudnn(), shape, "cpu")(inputs.q, inputs.k, inputs.v)


@pytest.mark.parametrize("text", ["d64 B2 H4/2 S100 causal bf16", "d128 B1 H2/2 S70 full bf16"])
def test_the_frontends_own_graph_takes_the_arguments_of_fp8(text):
    cudnn = pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
    attend = cudnn_frontend.Fp8Attention(
        types.SimpleNamespace(
            create_handle=lambda: None, data_type=cudnn.data_type, diagonal_alignment=cudnn.diagonal_alignment,
            heur_mode=cudnn.heur_mode, pygraph=_validated(cudnn.pygraph),
        ),
        Shape.parse(text), "cpu",
    )  # fmt: skip
    for kind in (cudnn.data_type.BFLOAT16, cudnn.data_type.FP8_E4M3):
        assert attend._build_fp8(kind)[0].was_validated


def test_without_the_frontend_the_reason_is_given(monkeypatch):
    shape = Shape.parse("d64 B1 H2/2 S70 full fp32")
    monkeypatch.setitem(sys.modules, "cudnn", None)
    with pytest.raises(Unsupported, match="nvidia-cudnn-frontend: "):
        PEERS["cudnn"](shape, "cuda")
    broken = types.SimpleNamespace(backend_version=lambda: 1 / 0)
    monkeypatch.setitem(sys.modules, "cudnn", broken)
    with pytest.raises(Unsupported, match=r"nvidia-cudnn-frontend: .*division"):
        PEERS["cudnn"](shape, "cuda")
    with pytest.raises(Unsupported, match="cuDNN runs on GPUs"):
        PEERS["cudnn"](shape, "cpu")
