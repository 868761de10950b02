"""Training and inference features of Transformers, PEFT and Trainer around the attention, each against eager."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import families
import hf_support
import pytest
import torch
import transformers
from counting import counted_calls
from families import FAMILY
from hf_support import DEVICE, close, dispatch, kernel_calls

from flashmla_hf import notices
from flashmla_hf.hf import forward

pytestmark = hf_support.needs_kernel

# On a GPU the attention is FlexAttention, which exists compiled by inductor only.
BACKEND = "aot_eager" if DEVICE.type == "cpu" else "inductor"


def pair(name="Llama"):
    eager = families.build(FAMILY[name], "eager", DEVICE)
    return eager, families.build(FAMILY[name], FAMILY[name].impl, DEVICE, eager.state_dict())


def step(model, **batch):
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want, tolerance=1e-3):
    assert close(got[0].loss, want[0].loss, tolerance)
    assert got[1].keys() == want[1].keys()
    largest = max(float(g.abs().max()) for g in want[1].values())
    for name, gradient in want[1].items():
        assert close(got[1][name] / largest, gradient / largest, tolerance), name


def ids(*shape, seed=0):
    return torch.randint(3, 60, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# ---- packing ------------------------------------------------------------------------------------------------------


LENGTHS = (5, 9, 4)


def packed_batch():
    x = ids(1, sum(LENGTHS))
    starts = [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    labels = x.clone()
    labels[:, starts[:-1]] = -100  # nothing predicts the first token of a sequence
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].to(DEVICE)
    boundaries = torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    return x, labels, positions, boundaries


def unpacked_step(model):
    """The same sequences as a right-padded batch."""
    x, labels, _, _ = packed_batch()
    rows = [torch.nn.utils.rnn.pad_sequence(t[0].split(LENGTHS), batch_first=True, padding_value=p)
            for t, p in ((x, 0), (labels, -100))]  # fmt: skip
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n, dtype=torch.long) for n in LENGTHS], batch_first=True)
    return step(model, input_ids=rows[0], labels=rows[1], attention_mask=mask.to(DEVICE), use_cache=False)


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("route", ["cu_seq_lens", "position_ids", "positions and ones", "both"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_packed_sequences_equal_padded_ones(name, route, use_cache):
    eager, ours = pair(name)
    x, labels, positions, boundaries = packed_batch()
    batch = {"input_ids": x, "labels": labels, "position_ids": positions, "use_cache": use_cache}
    if route in ("cu_seq_lens", "both"):
        batch |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 9, "max_length_k": 9}
    if route == "positions and ones":
        batch["attention_mask"] = torch.ones_like(x)
    with counted_calls() as calls:
        got = step(ours, **batch)
    assert kernel_calls(calls) == 2
    assert_same(got, unpacked_step(eager))


def test_maximal_lengths_may_be_tensors():
    _, ours = pair()
    x, labels, positions, boundaries = packed_batch()
    batch = {"input_ids": x, "labels": labels, "position_ids": positions}
    lengths = {"cu_seq_lens_q": boundaries.long(), "cu_seq_lens_k": boundaries.long(), "max_length_q": torch.tensor(9),
               "max_length_k": torch.tensor(9)}  # fmt: skip
    assert_same(step(ours, **batch, **lengths), step(ours, **batch))


@pytest.mark.parametrize("flash_kwargs", [False, True])
def test_trainer_with_flattening_collator_equals_unpacked(tmp_path, flash_kwargs):
    pytest.importorskip("accelerate")
    eager, ours = pair()
    x, _, _, _ = packed_batch()
    data = [{"input_ids": row.tolist()} for row in x[0].cpu().split(LENGTHS)]
    losses = []
    for model, flatten in ((ours, True), (eager, False)):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=3, max_steps=2, learning_rate=1e-2, report_to=[],
            logging_steps=1, save_strategy="no", use_cpu=DEVICE.type == "cpu", disable_tqdm=True, seed=0,
            remove_unused_columns=False, optim="sgd", max_grad_norm=0.0,
        )  # fmt: skip
        collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=flash_kwargs) if flatten else _pad
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator)
        with counted_calls() as calls:
            trainer.train()
        assert kernel_calls(calls) == (4 if flatten else 0)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def _pad(examples):
    rows = [torch.tensor(example["input_ids"]) for example in examples]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    labels = [torch.cat([torch.tensor([-100]), row[1:]]) for row in rows]
    return {"input_ids": pad(rows), "attention_mask": pad([torch.ones_like(row) for row in rows]),
            "labels": pad(labels, padding_value=-100)}  # fmt: skip


# ---- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_eagers_gradients(use_reentrant):
    eager, ours = pair("Mistral")
    batch = families.inputs(FAMILY["Mistral"], "left", DEVICE)
    want = step(eager.train(), **batch)
    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        ours.enable_input_require_grads()
    with counted_calls() as calls:
        got = step(ours.train(), **batch)
    assert kernel_calls(calls) == 4, "each layer runs twice"
    assert_same(got, want)


def test_selective_checkpointing_keeps_the_operator_s_output():
    """TRL's rule: keep what is named flash_attn, recompute the rest of the layer."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    if DEVICE.type != "cpu":
        pytest.skip("flex is no operator of ours")

    class Count(TorchDispatchMode):
        """Outside of the checkpoint, so it sees what really runs."""

        forwards = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.forwards += "flash_attn_forward" in str(func)
            return func(*args, **(kwargs or {}))

    def policy(keep, ctx, op, *args, **kwargs):
        is_kept = keep and "flash_attn" in str(op)
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    _, ours = pair()
    batch = {"input_ids": ids(1, 12), "labels": ids(1, 12), "use_cache": False}
    want = step(ours, **batch)
    layer = ours.model.layers[0]
    forward = layer.forward
    for keep, forwards in ((True, 2), (False, 3)):
        contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(policy, keep))
        layer.forward = functools.partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
        with Count() as count:
            got = step(ours, **batch)
        assert_same(got, want)
        assert count.forwards == forwards


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj"], ["k_proj", "o_proj"], "all-linear"])
def test_lora_gradients_equal_eager(targets):
    peft = pytest.importorskip("peft")
    batch = families.inputs(FAMILY["Llama"], "right", DEVICE)
    results = []
    for model in pair():
        torch.manual_seed(0)
        config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False, task_type="CAUSAL_LM")
        results.append(step(peft.get_peft_model(model, config), **batch))
    assert results[0][1]
    assert_same(results[1], results[0])


def test_prefix_tuning_equals_eager():
    peft = pytest.importorskip("peft")
    batch = families.inputs(FAMILY["Llama"], "left", DEVICE)
    results = []
    for model in pair():
        torch.manual_seed(0)
        config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
        results.append(step(model.to(DEVICE), **batch))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma2", "DeepSeek-V3", "GPT-OSS"])
def test_autocast_reaches_the_kernel_with_one_dtype(name, use_cache):
    _, ours = pair(name)
    batch = families.inputs(FAMILY[name], "left", DEVICE)
    dtypes = []

    def noting(call, run):
        dtypes.append(call.q.dtype)
        return run(call)

    with counted_calls() as calls, torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        for key, item in list(dispatch.IMPLEMENTATIONS.items()):
            dispatch.IMPLEMENTATIONS[key] = replace(item, run=functools.partial(noting, run=item.run))
        out = ours(**batch, use_cache=use_cache)
    out.loss.backward()
    assert kernel_calls(calls) == 2
    assert set(dtypes) == {torch.bfloat16}
    assert torch.isfinite(out.loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in ours.parameters())


def test_mixed_dtypes_without_autocast_follow_the_value():
    q, k, v = (torch.randn(1, 2, 6, 8, device=DEVICE) for _ in range(3))
    out, _ = forward.attention_forward(torch.nn.Module(), q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16


def test_dropout_is_computed_and_random():
    config = FAMILY["Llama"].config()
    config.attention_dropout = 0.5
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="flashmla").to(DEVICE)
    families._spread(model)
    x = ids(1, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not torch.equal(model.train()(x).logits, model(x).logits)
    assert torch.equal(model.eval()(x).logits, model(x).logits)


# ---- weights ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["Llama", "Mistral", "Gemma2", "GPT-OSS", "BERT", "BART", "Whisper", "ModernBERT", "T5", "Qwen2-VL", "GPT-2"],
)
def test_attention_weights_are_those_of_eager(name, monkeypatch):
    eager, ours = pair(name)
    padding = next(p for p in ("right", "left", "none") if p in FAMILY[name].paddings)
    batch = families.inputs(FAMILY[name], padding, DEVICE)
    monkeypatch.setattr(notices, "_warned", set())
    with pytest.warns(UserWarning, match="output_attentions=True is computed exactly"), torch.no_grad():
        got = ours(**batch, output_attentions=True)
    with torch.no_grad():
        want = eager(**batch, output_attentions=True)
    fields = [
        field
        for field in ("attentions", "decoder_attentions", "cross_attentions", "encoder_attentions")
        if want.get(field)
    ]
    assert fields
    # Rows of padding queries differ (0 here, a mean in eager) and count for nobody.
    queries = batch.get("attention_mask", torch.ones(1, device=DEVICE)).bool()
    for field in fields:
        assert len(got[field]) == len(want[field])
        for a, b in zip(got[field], want[field], strict=True):
            if a.shape[2] == queries.shape[-1] and field != "cross_attentions":
                a, b = a * queries[:, None, :, None], b * queries[:, None, :, None]
            assert close(a, b, 1e-4), field
    assert close(got.loss, want.loss)


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3 text"])
def test_a_decoder_can_be_made_bidirectional(name, padding):
    """Also under a window, where Transformers' flash path sees one key less on each side than eager."""
    eager, ours = pair(name)
    batch = families.inputs(FAMILY[name], padding, DEVICE)
    with torch.no_grad(), counted_calls() as calls:
        want, got = (model(**batch, is_causal=False).logits for model in (eager, ours))
        causal = eager(**batch).logits
    mask = batch["attention_mask"][..., None]
    assert kernel_calls(calls) == 2
    assert close(got * mask, want * mask)
    assert not close(causal * mask, want * mask)


# ---- generation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3 text", "GPT-OSS"])
def test_a_static_cache_without_a_mask_is_exact(name):
    """HF's own flash mask reads the unused rows of the cache here."""
    eager, ours = pair(name)
    x = ids(2, 9)
    logits = []
    for model in (eager, ours):
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            parts = [model(part, past_key_values=cache, use_cache=True).logits for part in x.split([5, 3, 1], dim=1)]
        logits.append(torch.cat(parts, dim=1))
    assert close(logits[1], logits[0])


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma3 text", "GPT-OSS", "Cohere2"])
def test_prefill_in_chunks_with_sliding_caches_is_exact(name):
    eager, ours = pair(name)
    x = ids(2, 24)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    logits = []
    for model in (eager, ours):
        cache = transformers.DynamicCache(config=model.config)
        parts, seen = [], 0
        with torch.no_grad():
            for part in x.split([10, 7, 1, 6], dim=1):
                seen += part.shape[1]
                out = model(part, past_key_values=cache, attention_mask=mask[:, :seen], use_cache=True)
                parts.append(out.logits)
        logits.append(torch.cat(parts, dim=1) * mask[..., None])
    assert close(logits[1], logits[0])


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"do_sample": True, "num_return_sequences": 2}])
def test_other_ways_to_generate_give_eagers_tokens(options):
    eager, ours = pair()
    x = ids(1, 6).repeat(1, 3)
    tokens = []
    for model in (eager, ours):
        torch.manual_seed(0)
        tokens.append(model.generate(x, max_new_tokens=10, **{"do_sample": False, **options}))
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GPT-OSS"])
def test_continuous_batching_equals_generate(name):
    eager, ours = pair(name)
    prompts = [ids(1, n, seed=n)[0].tolist() for n in (5, 9, 3)]
    want = [
        eager.generate(torch.tensor([p], device=DEVICE), max_new_tokens=6, do_sample=False)[0, len(p) :].tolist()
        for p in prompts
    ]
    config = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    options = {}
    if hasattr(transformers, "ContinuousBatchingConfig"):
        options["continuous_batching_config"] = transformers.ContinuousBatchingConfig(
            num_blocks=32, max_batch_tokens=64, use_cuda_graph=False
        )
    with counted_calls() as calls:
        outputs = ours.generate_batch(inputs=prompts, generation_config=config, progress_bar=False, **options)
    got = [list(outputs[key].generated_tokens) for key in sorted(outputs, key=lambda k: int(k.rsplit("_", 1)[-1]))]
    assert kernel_calls(calls) > 0
    assert got == want


# ---- torch.compile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "BERT"])
def test_compiled_training_without_graph_breaks(name):
    """fullgraph: masks, boundaries and operator, forward and backward; Llama's positions make every row "packed"."""
    torch._dynamo.reset()
    _, ours = pair(name)
    compiled = torch.compile(ours, fullgraph=True, backend=BACKEND)
    for padding in ("left", "none", "right"):
        batch = families.inputs(FAMILY[name], padding, DEVICE)
        batch |= {"use_cache": False} if name != "BERT" else {}
        want = step(ours, **batch)
        ours.zero_grad()
        out = compiled(**batch)
        out.loss.backward()
        got = (out, {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None})
        assert_same(got, want)


def test_compiled_packed_rows_are_separate():
    torch._dynamo.reset()
    eager, ours = pair()
    x, labels, positions, _ = packed_batch()
    compiled = torch.compile(ours, fullgraph=True, backend=BACKEND)
    for use_cache in (False, True):
        out = compiled(input_ids=x, labels=labels, position_ids=positions, use_cache=use_cache)
        assert close(out.loss, unpacked_step(eager)[0].loss)


def test_compiled_model_refuses_a_mask_with_holes():
    if DEVICE.type != "cpu":
        pytest.skip("a device assertion would end the process")
    torch._dynamo.reset()
    _, ours = pair()
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 5] = 0
    compiled = torch.compile(ours, fullgraph=True, backend=BACKEND)
    with pytest.raises(RuntimeError, match="not one range per row"):
        compiled(input_ids=ids(1, 12), attention_mask=mask, use_cache=False)


@pytest.mark.parametrize("impl", ["flashmla", "fmla"])
def test_generate_compiles_its_static_decoding(impl):
    """``generate`` itself, with a padded batch, where it compiles the decoding step (GPUs do by default)."""
    torch._dynamo.reset()
    eager, ours = pair()
    ours.set_attn_implementation(impl)
    x = ids(2, 7)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    compile_config = transformers.CompileConfig(mode=None, backend=BACKEND, fullgraph=False)
    compile_config._compile_all_devices = True
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    want = eager.generate(x, **options)
    for kept in (options, {**options, "attention_mask": torch.ones_like(x)}):
        want = eager.generate(x, **kept)
        got = ours.generate(x, cache_implementation="static", compile_config=compile_config, **kept)
        assert torch.equal(got, want)


def test_compiled_static_decoding_equals_eager():
    torch._dynamo.reset()
    eager, ours = pair()
    x = ids(2, 7)
    want = eager.generate(x, max_new_tokens=6, do_sample=False)
    cache = transformers.StaticCache(config=ours.config, max_cache_len=16)
    forward = torch.compile(ours.forward, backend=BACKEND)
    tokens = x
    with torch.no_grad():
        logits = ours(x, past_key_values=cache).logits
        for _ in range(6):
            new = logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, new], dim=1)
            logits = forward(new, past_key_values=cache).logits
    assert torch.equal(tokens, want)
