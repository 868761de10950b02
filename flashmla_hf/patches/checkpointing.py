"""Patches "checkpointing", "keep_attention" and "offload": what a layer keeps from forward to backward, and where it keeps it.

``torch.utils.checkpoint`` (non-reentrant) does the checkpointing: every decoder layer keeps its input [batch, seqlen, hidden]
and runs again in backward. Two options apply per layer:

- keep_attention: the layer also keeps (out, lse) of its attention. The second run uses them instead of calling the kernel.
- offload: the layer keeps its tensors on the host (:mod:`offload`). They come back one layer ahead of their use.

A plan chooses the layers at the first layer of every forward pass; "auto" counts free bytes (:meth:`Checkpointing.plan`).
Backward needs the last layers first, so these stay on the GPU.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from flashmla_hf import host_memory, recompute_cache
from flashmla_hf.patches import forwards, gradients, memory, offload, structure
from flashmla_hf.patches.offload import Offloaded, Offloader
from flashmla_hf.patches.replacements import Replacements
from flashmla_hf.torch_state import has_transforms

# What one layer's backward holds per token, in tensors as wide as the hidden states and as the attention's output: residual,
# two norms' results, their gradients and the projections' (8); q, out, dout, dq if the patches removed the others (4).
# Llama-3.1-8B with LoRA took 8 of both in all at 524,288 tokens, and 6 at 262,144; fp32 copies that no patch removes add to it.
WORKING_HIDDEN = 8
WORKING_ATTENTION = 4
# Share of free GPU memory that "auto" uses. The rest is for fragmentation and for other allocations.
USED_SHARE = 0.9
# Shares of free host memory. Pinned memory cannot be swapped, and kept attention is not worth a machine that stops responding.
# Inputs are worth more: the run ends if there is no room for them.
USED_HOST_SHARE = 0.75
USED_HOST_SHARE_FOR_INPUTS = 0.95
# Share of what is then left for layers without a checkpoint, whose tensors are estimated and not known.
WHOLE_SHARE = 0.8
# Bytes for the loss's chunk and the MLP's tile.
WORKING_BYTES = 5 * memory.GIB

# Number of layers: all, a number, or by free memory. ``None`` is none of them: the patch is off.
NumLayers = bool | int | str | None
# The contexts in which torch.utils.checkpoint runs a layer: in forward, and in backward.
Contexts = Callable[[], tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]]


@dataclass
class Plan:
    """The plan of one forward pass.

    Layers below ``first_on_device`` offload their input. Layers from ``first_kept`` on keep their attention; those of them
    below ``first_kept_on_device`` keep it on the host. Layers from ``first_whole`` on run without a checkpoint. ``parked``
    holds what was offloaded, by layer and kind.
    """

    first_on_device: int
    first_kept: int
    first_kept_on_device: int
    first_whole: int
    parked: dict[tuple[int, str], weakref.ref[Offloaded]] = field(default_factory=dict)

    def next_needed(self, layer: int, kind: str) -> Offloaded | None:
        """What backward needs after ``kind`` of ``layer``: the layer's attention, or the input of the layer below."""
        order = [(layer, "attention")] if kind == "input" else []
        order += [(layer - 1, "input"), (layer - 1, "attention")]
        for key in order:
            found = self.parked.get(key)
            if found is not None:
                return found()
        return None


def _caches_by_position(layer: nn.Module) -> dict[int, bool | None]:
    """The positions of a cache among the arguments of ``layer``'s forward, with what takes its place."""
    if getattr(layer, "_can_checkpoint_with_cache", False):
        return {}
    without = dict.fromkeys((*structure.CACHE_NAMES, "layer_past")) | {"use_cache": False}
    return {i: without[name] for i, name in enumerate(forwards.parameters_of(layer)) if name in without}


class Checkpointing:
    """All checkpointed layers of one model."""

    def __init__(
        self,
        layers: list[structure.Layer],
        keep_attention: NumLayers,
        offload: NumLayers,
        parameters: Callable[[], Iterable[nn.Parameter]] = lambda: (),
    ) -> None:
        self.layers, self.parameters = layers, parameters
        self.keep_attention, self.offload = keep_attention, offload
        self._caches = [_caches_by_position(layer.module) for layer in layers]
        self._plan: Plan | None = None
        self._offloaders: dict[torch.device, Offloader] = {}

    def run(self, index: int, function: Callable[..., Any], *args: Any) -> Any:
        """Runs layer ``index``, ``function(hidden_states, ...)``, checkpointed. Transformers calls this in its place."""
        if not torch.is_grad_enabled():
            return function(*args)
        # The second run would write a cache again. Transformers removes one that has a keyword; some models pass it by
        # position (RecurrentGemma).
        args = tuple(self._caches[index].get(i, x) for i, x in enumerate(args))
        if has_transforms():  # which know no saved tensors' hooks
            return function(*args)
        if torch.compiler.is_compiling():
            return checkpoint(function, *args, use_reentrant=False)
        hidden = args[0]
        if index == 0 or self._plan is None:
            self._plan = self.plan(hidden)
        plan = self._plan
        if index >= plan.first_whole:
            return function(*args)
        contexts: Contexts = noop_context_fn
        hooks: contextlib.AbstractContextManager = contextlib.nullcontext()
        if index == 0:
            function = self._refuse_switched_adapters(function)
        if index >= plan.first_kept:
            kept = KeptAttention()
            if index < plan.first_kept_on_device:
                kept.park = lambda *tensors: self._park(plan, index, "attention", tensors)
            contexts = kept.contexts
        if index < plan.first_on_device:
            hooks = self._offloading(plan, index, _identity(hidden))
        with hooks:
            return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

    def _refuse_switched_adapters(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of the first layer. It raises PatchError if adapters were switched before it runs again.

        Adapters are switched in all layers, and the check of one layer is cheap.
        """
        unchanged, has_run = gradients.Unchanged(self.layers[0].module, has_weights=False), False

        def checked(*args: Any) -> Any:
            nonlocal has_run
            if has_run:
                unchanged.check()
            has_run = True
            return function(*args)

        return checked

    def _offloading(self, plan: Plan, index: int, identity: tuple) -> contextlib.AbstractContextManager:
        """Hooks that park the tensor with this identity when it is saved.

        The hooks live as long as what they saved, so they must not hold the tensor.
        """
        return torch.autograd.graph.saved_tensors_hooks(
            lambda x: self._park(plan, index, "input", (x,)) if _identity(x) == identity else x,
            lambda x: x.fetch()[0] if isinstance(x, Offloaded) else x,
        )

    def _park(self, plan: Plan, index: int, kind: str, tensors: tuple[torch.Tensor, ...]) -> Offloaded:
        device = tensors[0].device
        if device not in self._offloaders:
            self._offloaders[device] = Offloader(device)
        parked = self._offloaders[device].park(*tensors, next_needed=lambda: plan.next_needed(index, kind))
        plan.parked[index, kind] = weakref.ref(parked)
        return parked

    def plan(self, hidden: torch.Tensor) -> Plan:
        """The plan for a pass over hidden states [batch, seqlen, hidden] that begins now.

        The room is a share of the device's free bytes, less the gradients that backward will allocate and less what one layer's
        backward works with. It is filled with the last layers' inputs, then with the last layers' attention. With "offload",
        inputs without room go to the host as far as its free bytes reach (the count for the GPU is the more careful one), and
        kept attention too. Without "offload" every input stays, whatever the count is. Numbers given by the caller are used
        unchanged. If everything fits and "keep_attention" may choose, the last layers run without a checkpoint, as many as
        there is room for: a short sequence pays nothing for memory that it does not need. Without a GPU nothing can be saved:
        all but the last layer go to the host, so that the same code runs.
        """
        number, device = len(self.layers), hidden.device
        is_gpu = device.type == "cuda"
        tokens = hidden.shape[:-1].numel()
        width = max((structure.attention_width(x.attention) for x in self.layers if x.attention), default=1)
        input_bytes = max(1, structure.bytes_of(hidden))
        attention_bytes = max(1, tokens * width * hidden.element_size())
        free = memory.device_free_bytes(device) - memory.missing_gradient_bytes(self.parameters(), device)
        room = int(free * USED_SHARE) - (WORKING_BYTES if is_gpu else 0)
        room = max(0, room - WORKING_HIDDEN * input_bytes - WORKING_ATTENTION * attention_bytes)

        host = self._host_bytes(device) if self.offload is not None and is_gpu else 0

        if self.offload is None:
            offloaded = 0
        elif self.offload != "auto":
            offloaded = min(int(self.offload), number)
        elif is_gpu:
            without_room = number - min(max(room // input_bytes, 1), number)
            offloaded = min(without_room, _host_room(host, USED_HOST_SHARE_FOR_INPUTS) // input_bytes)
        else:
            offloaded = number - 1
        room = max(0, room - (number - offloaded) * input_bytes)

        fit = min(room // attention_bytes, number)
        if self.keep_attention is None:
            kept = 0
        elif self.keep_attention == "auto":
            on_host = max(0, _host_room(host, USED_HOST_SHARE) - offloaded * input_bytes) // attention_bytes
            kept = min(fit + on_host, number)
        else:
            kept = number if self.keep_attention is True else min(int(self.keep_attention), number)
        if self.offload is None:
            kept_on_device = kept
        else:  # a number sends everything that these layers keep to the host
            kept_on_device = min(kept, fit if self.offload == "auto" and is_gpu else number - offloaded)
        whole = 0
        if is_gpu and self.keep_attention == "auto" and offloaded == 0 and kept_on_device == number:
            left = int((room - number * attention_bytes) * WHOLE_SHARE)
            whole = self._whole_layers(left, tokens, hidden)
        return Plan(offloaded, number - kept, number - kept_on_device, number - whole)

    def _whole_layers(self, left: int, tokens: int, hidden: torch.Tensor) -> int:
        """How many of the last layers save everything that their backward needs in ``left`` bytes."""
        is_autocast = torch.is_autocast_enabled(hidden.device.type)
        count = 0
        for layer in reversed(self.layers):
            elements = structure.saved_elements(layer)
            if elements is None:
                break
            left -= elements * tokens * hidden.element_size()
            if is_autocast:  # cast weights are saved too
                left -= 2 * sum(p.numel() for p in layer.module.parameters() if p.dtype is torch.float32)
            if left < 0:
                break
            count += 1
        return count

    def _host_bytes(self, device: torch.device) -> int:
        """Bytes of the host for this process: its share of the available ones, and those that the arena holds unused."""
        offloader = self._offloaders.get(device)
        unused = len(offloader.arena.free) * offload.BLOCK if offloader else 0
        return host_memory.available_bytes() // memory.host_sharers() + unused


def _host_room(host_bytes: int, share: float) -> int:
    return max(0, int(host_bytes * share) - offload.RESERVE)


def _identity(x: torch.Tensor) -> tuple[int, torch.Size, torch.dtype]:
    return x.data_ptr(), x.shape, x.dtype


class KeptAttention:
    """(out, lse) of the attention calls of one layer: its first run saves them, every later run loads them."""

    def __init__(self) -> None:
        self.park: Callable[..., Offloaded] | None = None
        self._kept: list[tuple[torch.Tensor, ...] | Offloaded] = []
        self._num_loaded = 0
        self._is_recomputing = False

    def contexts(self) -> tuple[_Keeping, _Keeping]:
        """The contexts in which ``torch.utils.checkpoint`` runs the layer: in forward, and in backward."""
        return _Keeping(self, is_recomputing=False), _Keeping(self, is_recomputing=True)

    def begin(self, is_recomputing: bool) -> None:
        """Begins a run of the layer."""
        self._is_recomputing, self._num_loaded = is_recomputing, 0

    def load(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(out, lse) of the next attention call, as new tensors; ``None`` if the kernel must run."""
        if not self._is_recomputing or self._num_loaded >= len(self._kept):
            return None
        kept = self._kept[self._num_loaded]
        self._num_loaded += 1
        out, lse = kept.fetch() if isinstance(kept, Offloaded) else kept
        # New tensors over the same memory: autograd writes its history into the ones that it gets.
        return out.detach(), lse.detach()

    def save(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Receives the outputs of an attention call for which :meth:`load` gave ``None``."""
        if not self._is_recomputing:
            out, lse = out.detach(), lse.detach()
            self._kept.append((out, lse) if self.park is None else self.park(out, lse))


class _Keeping:
    """Makes ``kept`` the cache of this thread's attention calls. It can be entered again (``retain_graph``)."""

    def __init__(self, kept: KeptAttention, is_recomputing: bool) -> None:
        self.kept, self.is_recomputing = kept, is_recomputing

    def __enter__(self) -> None:
        self.kept.begin(self.is_recomputing)
        self.before, recompute_cache.active.cache = recompute_cache.active.cache, self.kept

    def __exit__(self, *exception: object) -> None:
        recompute_cache.active.cache = self.before


def check_keep_attention(model: nn.Module) -> None:
    """Raises UnsupportedPatch if the attention of ``model`` does not return what the patch "keep_attention" keeps."""
    decoder = structure.decoder(model, "keep_attention")
    if not structure.uses_flashmla(decoder):
        raise structure.refuse(
            model, "keep_attention", "attn_implementation", "'flashmla' (its kernel returns what is kept)",
            repr(structure.implementation_of(decoder)),
        )  # fmt: skip
    for layer in structure.decoder_layers(model, "keep_attention"):
        structure.attention_of(model, layer, "keep_attention")


def patch_checkpointing(model: Any, replacements: Replacements, keep_attention: NumLayers, offload: NumLayers) -> None:
    """``keep_attention``, ``offload``: ``None`` switches them off, "auto" decides by free memory, a number counts layers."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise structure.refuse(
            model, "checkpointing", type(model).__name__, "supports_gradient_checkpointing", "a model without it"
        )
    layers = structure.decoder_layers(model, "checkpointing")
    checkpointing = Checkpointing(layers, keep_attention, offload, model.parameters)
    for index, layer in enumerate(layers):
        if not hasattr(layer.module, "gradient_checkpointing"):
            raise structure.refuse(
                model, "checkpointing", f"{layer.name} ({type(layer.module).__name__})",
                "a transformers.modeling_layers.GradientCheckpointingLayer", "another module",
            )  # fmt: skip
        replacements.set(layer.module, "_gradient_checkpointing_func", _Layer(checkpointing, index))
        replacements.set(layer.module, "gradient_checkpointing", True, may_change=True)
    modules = [layer.module for layer in layers]
    replacements.set(model, "_set_gradient_checkpointing", _switch(modules))
    replacements.hook(structure.decoder(model, "checkpointing"), _refuse_cache(modules))


class _Layer:
    """``checkpointing.run`` for one layer."""

    def __init__(self, checkpointing: Checkpointing, index: int) -> None:
        self.checkpointing, self.index = checkpointing, index

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.checkpointing.run(self.index, function, *args)


def _refuse_cache(layers: list[Any]) -> Callable[[nn.Module, tuple, dict[str, Any]], None]:
    """A forward pre-hook of the decoder that raises PatchError for a cache with tokens in training.

    Transformers' checkpointed layers ignore a cache and log a line, so a prefix in it would have no effect.
    """

    def check(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = structure.cache_of(kwargs)
        if cache is None or not any(layer.gradient_checkpointing and layer.training for layer in layers):
            return
        if (length := cache.get_seq_length()) > 0:
            raise structure.PatchError(
                f"flashmla_hf.patch: patch 'checkpointing': {type(decoder).__name__} in training: expected empty "
                f"past_key_values, got {length} tokens (peft's prefix tuning passes some), which checkpointed layers ignore. "
                f"Call model.eval(). {structure.exclude('checkpointing')}"
            )

    return check


def _switch(layers: list[Any]) -> Callable[..., None]:
    """Replaces Transformers' switch for checkpointing, which would put its own function in place of this patch's.

    Trainers switch checkpointing on by default, and around generation: that is no mistake of the user's. Only a setting that
    this patch does not honour is worth a warning. ``use_reentrant`` is none: it gives the same numbers.
    """

    def set_gradient_checkpointing(
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
        **kwargs: Any,
    ) -> None:
        settings = [] if every_n_layers == 1 else ["every_n_layers"]
        function = gradient_checkpointing_func
        if isinstance(function, partial):
            settings += [name for name in function.keywords if name != "use_reentrant"]
            function = function.func
        if function is not checkpoint:  # Transformers' offload=True, or a function of somebody else's
            settings.append(f"the function {getattr(function, '__qualname__', repr(function))}")
        if enable and settings:
            warnings.warn(
                "flashmla_hf.patch: the patch 'checkpointing' checkpoints every layer in its own way: "
                f"{', '.join(settings)} of gradient_checkpointing_enable() has no effect. Leave it out. "
                f"{structure.exclude('checkpointing')}",
                stacklevel=3,
            )
        for layer in layers:
            layer.gradient_checkpointing = enable

    return set_gradient_checkpointing
