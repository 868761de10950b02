"""cuDNN's attention by its own frontend (the package nvidia-cudnn-frontend): what NVIDIA publishes numbers of.

torch's SDPA calls the same library, but through a frontend of its own, without windows and packed documents. Graphs are built
once per shape; a call allocates what torch's would: output, statistics, gradients and workspace.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from shapes import DTYPES, Shape

from flashmla_hf.training.arguments import first_line


class Missing(Exception):
    """There is no frontend here; the message says why."""


def load(device: str) -> ModuleType:
    """The module ``cudnn``; raises Missing with the reason."""
    if device != "cuda":
        raise Missing("cuDNN runs on GPUs")
    try:
        import cudnn

        cudnn.backend_version()
    except Exception as error:  # no package, no library beside it, or one that is too old: each has its own exception
        raise Missing(f"nvidia-cudnn-frontend: {first_line(error)[:200]}") from None
    return cudnn


class Attention:
    """``attention(q, k, v)`` of one shape, differentiable; [batch, seqlen, heads, dim], or packed [total, heads, dim]."""

    def __init__(self, cudnn: ModuleType, shape: Shape, device: str) -> None:
        self.cudnn, self.shape = cudnn, shape
        self.handle = cudnn.create_handle()
        if device == "cuda":
            cudnn.set_stream(self.handle, torch.cuda.current_stream().cuda_stream)
        self.longest = max(shape.lengths())
        self.lengths = torch.tensor(shape.lengths(), dtype=torch.int32, device=device).view(-1, 1, 1, 1)
        starts = [0, *(document.stop for document in shape.documents())] if shape.is_packed else []
        self.starts = torch.tensor(starts, dtype=torch.int64, device=device)
        # Names of tensors -> elements from which each document begins, of a packed shape.
        self.offsets: dict[str, torch.Tensor] = {}
        self.graphs: dict[str, tuple[Any, dict[str, Any]]] = {}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            return _Function.apply(q, k, v, self)
        return self.forward("fwd", q, k, v)[0]

    # ---- running -----------------------------------------------------------------------------------------------------

    def forward(self, which: str, q, k, v) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output, and the statistics for "fwd with stats"."""
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        data = {"q": q, "k": k, "v": v, "o": out}
        stats = None
        if which != "fwd":
            stats = q.new_empty(self.shape.batch, self.shape.heads_q, self.longest, 1, dtype=torch.float32)
            data["stats"] = stats
        self._execute(which, data, q)
        return out, stats

    def backward(self, dout, q, k, v, out, stats) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gradients = tuple(torch.empty_like(x) for x in (q, k, v))
        data = {"q": q, "k": k, "v": v, "o": out, "stats": stats, "dO": dout.contiguous()}
        self._execute("bwd", data | dict(zip(("dQ", "dK", "dV"), gradients, strict=True)), q)
        return gradients

    def _execute(self, which: str, data: dict[str, torch.Tensor], like: torch.Tensor) -> None:
        if which not in self.graphs:
            self.graphs[which] = self._build(which)
        graph, tensors = self.graphs[which]
        is_laid_out = {name: x.dim() == 3 or name == "stats" or x.numel() == 1 for name, x in data.items()}
        pack = {tensors[name]: x if is_laid_out[name] else x.transpose(1, 2) for name, x in data.items()}
        if self.shape.is_packed:
            pack |= {tensors["lengths"]: self.lengths}
            pack |= {tensors[f"{name} offsets"]: offsets for name, offsets in self.offsets.items() if name in data}
        workspace = like.new_empty(max(1, graph.get_workspace_size()), dtype=torch.uint8)
        graph.execute(pack, workspace, handle=self.handle)

    # ---- building ----------------------------------------------------------------------------------------------------

    def _build(self, which: str) -> tuple[Any, dict[str, Any]]:
        cudnn, shape, types = self.cudnn, self.shape, self.cudnn.data_type
        element = {"bf16": types.BFLOAT16, "fp16": types.HALF, "fp32": types.FLOAT}[shape.dtype]
        graph = cudnn.pygraph(
            io_data_type=element, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT, handle=self.handle
        )
        tensors: dict[str, Any] = {}
        options: dict[str, Any] = {"attn_scale": shape.head_dim_qk**-0.5}
        if shape.is_causal:
            options |= {"diagonal_alignment": cudnn.diagonal_alignment.BOTTOM_RIGHT, "diagonal_band_right_bound": 0}
        if shape.window is not None:
            options["diagonal_band_left_bound"] = shape.window + 1  # counts the query's own key
        if shape.is_packed:
            tensors["lengths"] = self._small(graph, "lengths", self.lengths, types.INT32)
            options |= {"use_padding_mask": True, "seq_len_q": tensors["lengths"], "seq_len_kv": tensors["lengths"]}

        def described(name: str, tensor: Any | None = None) -> Any:
            """An input of the graph, or ``tensor`` as its output."""
            dims, strides = self._layout(name)
            if tensor is None:
                tensor = graph.tensor(name=name, dim=dims, stride=strides, data_type=element)
            else:
                tensor.set_output(True).set_dim(dims).set_stride(strides).set_data_type(element)
            if shape.is_packed:
                offsets = self._offsets(name)
                tensors[f"{name} offsets"] = self._small(graph, f"{name} offsets", offsets, types.INT64)
                tensor.set_ragged_offset(tensors[f"{name} offsets"])
            tensors[name] = tensor
            return tensor

        q, k, v = (described(name) for name in "qkv")
        if which != "bwd":
            out, stats = graph.sdpa(q=q, k=k, v=v, generate_stats=which != "fwd", **options)
            described("o", out)
            if which != "fwd":
                stats.set_output(True).set_data_type(types.FLOAT)
                tensors["stats"] = stats
        else:
            dims = [shape.batch, shape.heads_q, self.longest, 1]
            strides = [shape.heads_q * self.longest, self.longest, 1, 1]
            tensors["stats"] = graph.tensor(name="stats", dim=dims, stride=strides, data_type=types.FLOAT)
            out, dout = described("o"), described("dO")
            found = graph.sdpa_backward(q=q, k=k, v=v, o=out, dO=dout, stats=tensors["stats"], **options)
            for name, tensor in zip(("dQ", "dK", "dV"), found, strict=True):
                described(name, tensor)
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        return graph, tensors

    def _layout(self, name: str) -> tuple[list[int], list[int]]:
        """Dims and strides of [batch, heads, seqlen, dim] in the memory of [batch, seqlen, heads, dim]."""
        is_key = name.lower().lstrip("d") in ("k", "v")
        heads = self.shape.heads_kv if is_key else self.shape.heads_q
        seqlen = self.longest if self.shape.is_packed else self.shape.seqlen_kv if is_key else self.shape.seqlen_q
        dim = self._columns(name)
        return [self.shape.batch, heads, seqlen, dim], [seqlen * heads * dim, dim, heads * dim, 1]

    def _columns(self, name: str) -> int:
        is_value = name.lower().lstrip("d") in ("v", "o")
        return self.shape.head_dim_v if is_value else self.shape.head_dim_qk

    def _offsets(self, name: str) -> torch.Tensor:
        if name not in self.offsets:
            dims, _ = self._layout(name)
            self.offsets[name] = (self.starts * dims[1] * dims[3]).view(-1, 1, 1, 1)
        return self.offsets[name]

    @staticmethod
    def _small(graph: Any, name: str, x: torch.Tensor, kind: Any) -> Any:
        return graph.tensor(name=name, dim=list(x.shape), stride=list(x.stride()), data_type=kind)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, attention: Attention):
        out, stats = attention.forward("fwd with stats", q, k, v)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.attention = attention
        return out

    @staticmethod
    def backward(ctx, dout):
        return *ctx.attention.backward(dout, *ctx.saved_tensors), None


class Fp8Attention(Attention):
    """The forward of e4m3 tensors, one scale each: q, k and v are quantised at the first call with them, and not again, so that
    a later call is the kernel alone. The result is bf16, or where this cuDNN gives none, e4m3 that a pass of torch's scales."""

    _SCALE_OUT = 64.0  # results of normal inputs are far below 1

    def __init__(self, cudnn: ModuleType, shape: Shape, device: str) -> None:
        super().__init__(cudnn, shape, device)
        self.device = device
        self.quantized: tuple[tuple[int, ...], dict[str, torch.Tensor]] = ((), {})
        self.out_dtype: torch.dtype | None = None

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        pointers = tuple(x.data_ptr() for x in (q, k, v))
        if pointers != self.quantized[0]:
            self.quantized = pointers, self._quantize(q, k, v)
        if not self.graphs:
            self._build_any()
        assert self.out_dtype is not None
        data = dict(self.quantized[1])
        data["o"] = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=self.out_dtype)
        data |= {name: self._number(0.0) for name in ("amax_s", "amax_o")}
        self._execute("fp8", data, q)
        return data["o"] if self.out_dtype == torch.bfloat16 else data["o"].to(q.dtype) / self._SCALE_OUT

    def _number(self, value: float) -> torch.Tensor:
        return torch.full((1, 1, 1, 1), value, device=self.device)

    def _quantize(self, q, k, v) -> dict[str, torch.Tensor]:
        data = {"descale_s": self._number(1 / 256), "scale_s": self._number(256.0)}
        data["scale_o"] = self._number(1.0 if self.out_dtype == torch.bfloat16 else self._SCALE_OUT)
        for name, x in (("q", q), ("k", k), ("v", v)):
            scale = x.detach().abs().amax().float() / 448.0
            data[name] = (x.detach().float() / scale).to(torch.float8_e4m3fn)
            data[f"descale_{name}"] = scale.view(1, 1, 1, 1)
        return data

    def _build_any(self) -> None:
        for dtype, kind in ((torch.bfloat16, "BFLOAT16"), (torch.float8_e4m3fn, "FP8_E4M3")):
            try:
                self.graphs["fp8"] = self._build_fp8(getattr(self.cudnn.data_type, kind))
            except Exception as error:  # cuDNN's own; the last one is the reason
                refusal = error
                continue
            self.out_dtype = dtype
            self.quantized[1]["scale_o"].fill_(1.0 if dtype == torch.bfloat16 else self._SCALE_OUT)
            return
        raise refusal

    def _build_fp8(self, out_type: Any) -> tuple[Any, dict[str, Any]]:
        cudnn, shape, types = self.cudnn, self.shape, self.cudnn.data_type
        graph = cudnn.pygraph(
            io_data_type=types.FP8_E4M3, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT,
            handle=self.handle,
        )  # fmt: skip
        options: dict[str, Any] = {"attn_scale": shape.head_dim_qk**-0.5, "generate_stats": False}
        if shape.is_causal:
            options |= {"diagonal_alignment": cudnn.diagonal_alignment.BOTTOM_RIGHT, "diagonal_band_right_bound": 0}
        tensors: dict[str, Any] = {}
        for name in "qkv":
            dims, strides = self._layout(name)
            tensors[name] = graph.tensor(name=name, dim=dims, stride=strides, data_type=types.FP8_E4M3)
        numbers = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        tensors |= {name: self._small(graph, name, self._number(1.0), types.FLOAT) for name in numbers}
        out, _, amax_s, amax_o = graph.sdpa_fp8(**tensors, **options)
        dims, strides = self._layout("o")
        out.set_output(True).set_dim(dims).set_stride(strides).set_data_type(out_type)
        for amax in (amax_s, amax_o):
            amax.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(types.FLOAT)
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        return graph, tensors | {"o": out, "amax_s": amax_s, "amax_o": amax_o}


assert DTYPES.keys() == {"bf16", "fp16", "fp32"}  # those that _build knows
