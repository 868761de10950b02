"""Patches "checkpointing", "keep_attention" and "offload": what a layer keeps from forward to backward, and where.

``torch.utils.checkpoint`` (non-reentrant) does the checkpointing: every decoder layer keeps its input [batch, seqlen, hidden]
and runs again in backward. On top of it, per layer:

- keep_attention: (out, lse) of the layer's attention are kept too, and the second run gets them instead of calling the kernel;
- offload: what is kept goes to the host (:mod:`offload`) and comes back one layer ahead of its use.

Which layers, a plan says at the first layer of every forward pass: "auto" counts free bytes, see :meth:`Checkpointing.plan`.
The last layers come first in backward, so they are the ones that stay on the GPU.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from flashmla_hf import host_memory, ops
from flashmla_hf.patches import gradients, memory, offload, structure
from flashmla_hf.patches.offload import Offloaded, Offloader
from flashmla_hf.patches.replacements import Replacements

# What one layer's backward holds per token, in tensors as wide as the hidden states and as the attention's output: residual,
# two norms' results, their gradients and the projections' (8); q, out, dout, dq where the others are gone (4). Llama-3.1-8B
# with LoRA took 8 of both in all at 524,288 tokens, and 6 at 262,144; copies in fp32 that no patch removes come on top.
WORKING_HIDDEN = 8
WORKING_ATTENTION = 4
# Of free memory: the rest "auto" leaves to fragmentation and to whatever else allocates.
USED_SHARE = 0.9
# Of the host's: pinned memory cannot be swapped, and kept attention is worth less than a machine that answers. Inputs are
# worth more: without a place they end the run.
USED_HOST_SHARE = 0.75
USED_HOST_SHARE_FOR_INPUTS = 0.95
# The loss's chunk and the MLP's tile.
WORKING_BYTES = 5 * memory.GIB


@dataclass
class Plan:
    """Of one forward pass. Layers below ``first_on_device`` offload their input; those from ``first_kept`` on keep their
    attention, on the host below ``first_kept_on_device``."""

    first_on_device: int
    first_kept: int
    first_kept_on_device: int
    parked: dict[tuple[int, str], weakref.ref] = field(default_factory=dict)

    def next_needed(self, layer: int, what: str) -> Offloaded | None:
        """What backward asks for after ``what`` of ``layer``: its attention, or the input of the layer below."""
        order = [(layer, "attention")] if what == "input" else []
        order += [(layer - 1, "input"), (layer - 1, "attention")]
        for key in order:
            found = self.parked.get(key)
            if found is not None:
                return found()
        return None


class Checkpointing:
    """All checkpointed layers of one model."""

    def __init__(self, layers: list[structure.Layer], keep_attention, offload, parameters=lambda: ()):
        self.layers, self.parameters = layers, parameters
        self.keep_attention, self.offload = keep_attention, offload
        self._plan: Plan | None = None
        self._offloaders: dict[torch.device, Offloader] = {}

    def run(self, index: int, function, *args):
        """Layer ``index``, checkpointed: what Transformers calls in place of its ``function(hidden_states, ...)``."""
        if not torch.is_grad_enabled():
            return function(*args)
        if torch.compiler.is_compiling():
            return checkpoint(function, *args, use_reentrant=False)
        hidden = args[0]
        if index == 0 or self._plan is None:
            self._plan = self.plan(hidden)
        plan, contexts, hooks = self._plan, noop_context_fn, contextlib.nullcontext()
        if index == 0:
            function = self._with_the_same_adapters(function)
        if index >= plan.first_kept:
            kept = KeptAttention()
            if index < plan.first_kept_on_device:
                kept.park = lambda *tensors: self._park(plan, index, "attention", tensors)
            contexts = kept.contexts
        if index < plan.first_on_device:
            hooks = self._offloading(plan, index, _identity(hidden))
        with hooks:
            return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)

    def _with_the_same_adapters(self, function):
        """``function`` of the first layer, which raises when it runs again after adapters were switched: they are switched in
        all layers, and looking at one costs nothing to speak of."""
        unchanged, is_again = gradients.Unchanged(self.layers[0].module, has_weights=False), False

        def checked(*args):
            nonlocal is_again
            if is_again:
                unchanged.check()
            is_again = True
            return function(*args)

        return checked

    def _offloading(self, plan: Plan, index: int, identity: tuple):
        """Hooks under which the tensor of that identity, when saved, is parked. They live as long as what they saved: they must
        not hold the tensor."""
        return torch.autograd.graph.saved_tensors_hooks(
            lambda x: self._park(plan, index, "input", (x,)) if _identity(x) == identity else x,
            lambda x: x.fetch()[0] if isinstance(x, Offloaded) else x,
        )

    def _park(self, plan: Plan, index: int, what: str, tensors) -> Offloaded:
        device = tensors[0].device
        if device not in self._offloaders:
            self._offloaders[device] = Offloader(device)
        parked = self._offloaders[device].park(*tensors, next_needed=lambda: plan.next_needed(index, what))
        plan.parked[index, what] = weakref.ref(parked)
        return parked

    def plan(self, hidden: torch.Tensor) -> Plan:
        """Who keeps what where, for hidden states [batch, seqlen, hidden] of a pass that begins now.

        The free bytes of the device, less the gradients that backward will make, a share, and what one layer's backward works
        with, are filled with the last layers' inputs, then with the last layers' attention. With "offload", inputs without a
        place go to the host, as far as its free bytes go (the count for the GPU is the more careful one), and kept attention
        too; without it every input stays, whatever the count says. Numbers given by the caller are taken as they are. Without
        a GPU there is nothing to save: all but the last layer go to the host, so that the same code runs.
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
            offloaded = min(self.offload, number)
        elif is_gpu:
            without_place = number - min(max(room // input_bytes, 1), number)
            offloaded = min(without_place, _host_room(host, USED_HOST_SHARE_FOR_INPUTS) // input_bytes)
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
            kept = number if self.keep_attention is True else min(self.keep_attention, number)
        if self.offload is None:
            kept_on_device = kept
        else:  # a number says: so many layers go to the host, with all they keep
            kept_on_device = min(kept, fit if self.offload == "auto" and is_gpu else number - offloaded)
        return Plan(offloaded, number - kept, number - kept_on_device)

    def _host_bytes(self, device: torch.device) -> int:
        """What this process can take of the host's beside others of the machine, and what the arena holds unused."""
        offloader = self._offloaders.get(device)
        unused = len(offloader.arena.free) * offload.BLOCK if offloader else 0
        return host_memory.available_bytes() // memory.host_sharers() + unused


def _host_room(host_bytes: int, share: float) -> int:
    return max(0, int(host_bytes * share) - offload.RESERVE)


def _identity(x: torch.Tensor) -> tuple:
    return x.data_ptr(), x.shape, x.dtype


class KeptAttention:
    """(out, lse) of the attention calls of one layer: put by its first run, taken by every later one."""

    def __init__(self):
        self.park = None
        self._kept: list = []
        self._cursor = 0
        self._is_again = False

    def contexts(self):
        """What ``torch.utils.checkpoint`` runs the layer in: first, and again."""
        return _Keeping(self, is_again=False), _Keeping(self, is_again=True)

    def begin(self, is_again: bool) -> None:
        self._is_again, self._cursor = is_again, 0

    def take(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self._is_again or self._cursor >= len(self._kept):
            return None
        kept = self._kept[self._cursor]
        self._cursor += 1
        out, lse = kept.fetch() if isinstance(kept, Offloaded) else kept
        # New tensors over the same memory: autograd writes its history into the ones it is given.
        return out.detach(), lse.detach()

    def put(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        if not self._is_again:
            out, lse = out.detach(), lse.detach()
            self._kept.append((out, lse) if self.park is None else self.park(out, lse))


class _Keeping:
    """A context that can be entered again (``retain_graph``)."""

    def __init__(self, kept: KeptAttention, is_again: bool):
        self.kept, self.is_again = kept, is_again

    def __enter__(self):
        self.kept.begin(self.is_again)
        self.before, ops.keeper.store = ops.keeper.store, self.kept

    def __exit__(self, *exception):
        ops.keeper.store = self.before


def patch_checkpointing(model: nn.Module, replacements: Replacements, keep_attention, offload) -> None:
    """``keep_attention``, ``offload``: ``None`` for off, "auto", or numbers of layers (``True``: all)."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise structure.refuse(
            model, "checkpointing", type(model).__name__, "supports_gradient_checkpointing", "a model without it"
        )
    layers = structure.decoder_layers(model, "checkpointing")
    if keep_attention is not None:
        implementation = structure.decoder(model, "keep_attention").config._attn_implementation
        if implementation not in structure.OURS:
            raise structure.refuse(
                model, "keep_attention", "attn_implementation", "'flashmla' (its kernel returns what is kept)",
                repr(implementation),
            )  # fmt: skip
        for layer in layers:
            structure.attention_of(model, layer, "keep_attention")
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
    decoder = structure.decoder(model, "checkpointing")
    replacements.on_undo(decoder.register_forward_pre_hook(_refuse_cache(modules), with_kwargs=True).remove)


class _Layer:
    """``checkpointing.run`` of one layer."""

    def __init__(self, checkpointing: Checkpointing, index: int):
        self.checkpointing, self.index = checkpointing, index

    def __call__(self, function, *args):
        return self.checkpointing.run(self.index, function, *args)


def _refuse_cache(layers: list[nn.Module]):
    """Transformers' layers that checkpoint leave a cache out, with a line in the log: a prefix in it would have no effect."""

    def check(decoder, args, kwargs):
        cache = structure.cache_of(kwargs)
        if cache is None or not any(layer.gradient_checkpointing and layer.training for layer in layers):
            return
        if (length := cache.get_seq_length()) > 0:
            raise structure.PatchError(
                f"flashmla_hf.patch: patch 'checkpointing': {type(decoder).__name__} in training: expected past_key_values "
                f"that are empty, got {length} tokens (peft's prefix tuning gives some), which checkpointed layers leave out. "
                "Call model.eval(), or leave it out: patches=[...] without 'checkpointing', 'keep_attention' and 'offload'"
            )

    return check


def _switch(layers: list[nn.Module]):
    """Transformers' on and off switch, which would put its own function in place of ours."""

    def set_gradient_checkpointing(enable: bool = True, gradient_checkpointing_func=None, **kwargs):
        if enable:
            warnings.warn(
                "flashmla_hf.patch: gradient checkpointing is the patch 'checkpointing' of this model and stays as it is; "
                "gradient_checkpointing_enable() and its arguments have no effect (leave gradient_checkpointing=False)",
                stacklevel=3,
            )
        for layer in layers:
            layer.gradient_checkpointing = enable

    return set_gradient_checkpointing
