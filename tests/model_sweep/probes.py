"""The probes of one model class: built under ``attn_implementation="flashmla"``, does it equal the eager model?

Each result says whether zeros instead of attention pass here ("not discriminating").
"""

from __future__ import annotations

import contextlib
import inspect
import warnings

import torch
import transformers
from counting import counted_calls, standing_in
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import flashmla_hf
from model_sweep import batches
from model_sweep.building import build, build_eager, copy_state, run
from model_sweep.classes import Candidate
from model_sweep.comparison import TOLERANCE, Pair, difference, zeros
from model_sweep.training import probe_generation, probe_training
from model_sweep.verdicts import Result, first_line, raised, verdict

KERNELS = ("cpu", "sm90", "torch_flash", "flex")


def examine(candidate: Candidate, only_forward: bool = False) -> Result:
    """All probes of one class, in this process."""
    result = Result(candidate.class_name, candidate.model_type)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    try:
        model_class = getattr(transformers, candidate.class_name)
        config_class = getattr(model_class, "config_class", None) or CONFIG_MAPPING[candidate.model_type]
        inspect.signature(model_class.forward)
    except Exception as error:
        result.reason = first_line(error)
        return result
    built = build_eager(model_class, config_class, result)
    if built is None:
        return result
    eager, config, batch = built
    result.inputs = sorted(batch)
    _compare(model_class, eager, config, batch, result, only_forward)
    return result


def _compare(model_class, eager, config, batch, result: Result, only_forward: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            ours = build(model_class, config, result.implementation)
        except Exception as error:
            if result.implementation == "flashmla" and "flash" in str(error) and raised(error).startswith("RAISES"):
                result.implementation = "fmla"  # Transformers itself refuses every name that contains "flash" here
                _compare(model_class, eager, config, batch, result, only_forward)
                return
            result.status, result.reason = "failed", f"load: {raised(error)}"
            if "REFUSED" in result.reason:
                result.status = "refused"
            return
    said = [str(w.message) for w in caught if str(w.message).startswith("flashmla")]
    copy_state(eager, ours)
    pair = Pair(eager, ours, result)
    if result.implementation == "flashmla" and _refuses_flash_names(ours, batch):
        result.implementation = "fmla"
        _compare(model_class, eager, config, batch, result, only_forward)
        return
    report = flashmla_hf.check(ours)
    result.layers = [sum(layer.uses_kernel for layer in report.layers), len(report.layers)]

    with counted_calls() as calls, _callers(ours, report) as called:
        pair.probe("forward", batch)
    result.calls = dict(calls)
    result.probes["check"] = _check_is_true(report, called)
    if not only_forward:
        more_probes(pair, batch)
    _judge(result, ours, pair, batch, said)


def _refuses_flash_names(ours, batch: dict) -> bool:
    """Whether Transformers itself refuses every name that contains "flash" here: our other name is for that."""
    try:
        run(ours, batch)
    except Exception as error:
        return str(error).startswith("Flash attention") or ("flash" in str(error) and "flashmla" not in str(error))
    return False


@contextlib.contextmanager
def _callers(model, report):
    """Which of the layers of ``report`` ran, and how many calls of the kernel each made."""
    ran: dict[str, int] = {}
    stack: list[str] = []
    handles = []
    modules = dict(model.named_modules())
    for layer in report.layers:
        module = modules[layer.name]

        def enter(module, args, name=layer.name):
            ran.setdefault(name, 0)
            stack.append(name)

        def leave(module, args, output):
            stack.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]

    def noting(name, call, run):
        if stack and name in KERNELS:
            ran[stack[-1]] += 1
        return run(call)

    try:
        with standing_in(noting):
            yield ran
    finally:
        for handle in handles:
            handle.remove()


def _check_is_true(report, called: dict[str, int]) -> str:
    """Whether ``flashmla_hf.check`` says of every layer that ran what it did."""
    for layer in report.layers:
        if layer.name in called and layer.uses_kernel != (called[layer.name] > 0):
            said = "uses the kernel" if layer.uses_kernel else f"does not ({layer.reason})"
            return f"UNTRUE: check says {layer.class_name} {said[:120]}, kernel calls {called[layer.name]}"
    return "true"


def more_probes(pair: Pair, batch: dict) -> None:
    """Masks, lengths, causality, training, generation: those that the class takes."""
    eager = pair.eager
    parameters = inspect.signature(eager.forward).parameters
    name = batches.text_mask_name(batch)
    if name == "input_ids" and "attention_mask" in parameters:
        mask_probes(pair, batch)
    elif "attention_mask" in parameters and "input_ids" not in batch:
        frame_mask_probes(pair, batch)
    if "decoder_input_ids" in batch and "decoder_attention_mask" in parameters:
        length = batch["decoder_input_ids"].shape[-1]
        mask = torch.ones(batches.BATCH, length, dtype=torch.long)
        pair.probe("decoder ones", batch | {"decoder_attention_mask": mask})
        mask = mask.clone()
        mask[0, -3:] = 0
        pad = batches.setting(eager.config, "pad_token_id", default=0)
        padded = batch["decoder_input_ids"].clone()
        padded[0, ..., -3:] = pad
        pair.probe("decoder right", batch | {"decoder_input_ids": padded, "decoder_attention_mask": mask}, mask.bool())
    _causality(pair, batch)
    if name == "input_ids" and set(batch) == {"input_ids"}:
        pair.probe("short", {"input_ids": batch["input_ids"][:, :5]})
    probe_training(pair, batch)
    probe_generation(pair, batch)


def mask_probes(pair: Pair, batch: dict) -> None:
    ids = batch["input_ids"]
    if ids.dim() != 2:
        return
    media = len(batch) > 1 and "decoder_input_ids" not in batch
    ones = torch.ones_like(ids)
    pair.probe("ones", batch | {"attention_mask": ones})
    pair.probe("bool ones", batch | {"attention_mask": ones.bool()})
    right, left, hole = ones.clone(), ones.clone(), ones.clone()
    right[0, -7:] = 0
    left[0, : 2 if media else 7] = 0
    hole[0, -9], hole[1, -5] = 0, 0
    pad = batches.setting(pair.eager.config, "pad_token_id", default=0)
    end = batches.setting(pair.eager.config, "eos_token_id", default=0)
    end = end if isinstance(end, int) else end[0]

    def padded(mask):
        """As a tokenizer pads: heads look for the token of padding, or for the one that ends the sequence."""
        tokens = ids.masked_fill(mask == 0, pad)
        last = (mask != 0).long() * torch.arange(1, mask.shape[1] + 1)
        tokens[torch.arange(len(tokens)), last.argmax(1)] = end
        return batch | {"input_ids": tokens, "attention_mask": mask}

    for probe, mask in (("right", right), ("left", left)):
        pair.probe(probe, padded(mask), mask.bool())
    pair.probe("hole", batch | {"attention_mask": hole}, hole.bool())
    pair.probe("bool left", padded(left.bool()), left.bool())
    pair.probe("int32 right", padded(right.int()), right.bool())
    pair.probe("int32 hole", batch | {"attention_mask": hole.int()}, hole.bool())


def frame_mask_probes(pair: Pair, batch: dict) -> None:
    """Padding of sounds and features: the mask is as long as one of the dimensions of the input."""
    name = next((n for n in batch if n.startswith(("input_", "inputs"))), None)
    if name is None:
        return
    for axis in range(1, batch[name].dim()):
        mask = torch.ones(batches.BATCH, batch[name].shape[axis], dtype=torch.long)
        try:
            run(pair.eager, batch | {"attention_mask": mask})
        except Exception:
            continue
        pair.probe("ones", batch | {"attention_mask": mask})
        mask = mask.clone()
        mask[0, -mask.shape[1] // 3 :] = 0
        pair.probe("right", batch | {"attention_mask": mask}, mask.bool())
        pair.probe("bool right", batch | {"attention_mask": mask.bool()}, mask.bool())
        pair.probe("int32 right", batch | {"attention_mask": mask.int()}, mask.bool())
        return


def _causality(pair: Pair, batch: dict) -> None:
    """Outputs before the last token: where eager's do not move when it changes, ours do not."""
    name = "decoder_input_ids" if "decoder_input_ids" in batch else batches.text_mask_name(batch)
    if name is None or batch[name].dim() != 2 or batch[name].is_floating_point():
        return
    other = batch[name].clone()
    other[:, -1] = torch.where(other[:, -1] == 7, 8, 7)
    length = other.shape[1]
    try:
        moves = []
        for model in (pair.eager, pair.ours):
            a, b = run(model, batch), run(model, batch | {name: other})
            moves.append({n: (a[n] - b[n]).abs().flatten(2).amax(-1)[:, :-1] for n in a
                          if a[n].is_floating_point() and a[n].dim() >= 3 and a[n].shape[:2] == (batches.BATCH, length)
                          and a[n].shape == b[n].shape})  # fmt: skip
    except Exception:
        return
    still = {n: moved <= 1e-6 for n, moved in moves[0].items() if not torch.isnan(moved).any()}
    if not any(bool(s.any()) for s in still.values()):
        return
    worst = max(float(moves[1][n][s].max()) for n, s in still.items() if s.any())
    pair.result.probes["causality"] = "equal" if worst <= 1e-4 else f"DIFFERS: earlier outputs move by {worst:.2e}"


def _judge(result: Result, ours, pair: Pair, batch: dict, said: list[str]) -> None:
    if result.calls:
        with counted_calls(wrong=zeros):
            try:
                error, _ = difference(run(ours, batch), run(pair.eager, batch))
            except Exception:
                error = float("inf")
        result.probes["control of zeros"] = "noticed" if error > TOLERANCE else f"PASSES, {error:.1e}"
    result.status, result.reason = verdict(result, said[0] if said else "")
