"""An accelerated model beside the plain one, both against the fp64 reference."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nemotron_v3 import BackendConfig
from nemotron_v3.hf import accelerate, is_accelerated, report, undo
from tests.hf.models import (
    LATENT,
    accelerated,
    by_the_rule,
    close,
    documents,
    gradients,
    ours_of,
    right_padded,
    tokens,
    transformers_model,
)

LENGTHS = (41, 1, 83, 25)
DRAWS = 6  # the smallest tensors have 12 elements in two layers; 64 are wanted (docs/numerics.md)


def alone(model: nn.Module, docs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits of each document by itself, the loss over all targets, and every gradient."""
    model.zero_grad()
    outputs = [model(input_ids=doc, labels=doc, use_cache=False) for doc in docs]
    targets = [doc.shape[1] - 1 for doc in docs]
    # A document of one token has no target; its loss is 0/0 in a plain model.
    losses = [o.loss * n for o, n in zip(outputs, targets, strict=True) if n]
    loss = sum(losses) / sum(targets)
    loss.backward()
    logits = torch.cat([output.logits[0] for output in outputs]).detach()
    return {"logits": logits, "loss": loss.detach(), **gradients(model)}


def together(model: nn.Module, docs: list[torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    """The same from one call, padded or packed."""
    model.zero_grad()
    if how in ("left", "right"):
        batch = right_padded(docs, left=how == "left")
        out = model(**batch)
        logits = out.logits[batch["attention_mask"] == 1]
        assert not out.logits[batch["attention_mask"] == 0].any()
    else:
        ids = torch.cat(docs, 1)
        out = model(input_ids=ids, labels=ids, **packing(docs, how))
        logits = out.logits[0]
    out.loss.backward()
    return {"logits": logits.detach(), "loss": out.loss.detach(), **gradients(model)}


def packing(docs: list[torch.Tensor], how: str) -> dict:
    lengths = [doc.shape[1] for doc in docs]
    if how == "position_ids":
        return {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    if how == "seq_idx":
        numbers = [torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)]
        return {"seq_idx": torch.cat(numbers)[None]}
    offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    return {
        "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets,
        "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


@pytest.mark.parametrize("how", ["plain", "left", "right", "position_ids"])
@pytest.mark.parametrize("changes", [{}, LATENT], ids=["all blocks", "latent and biases"])
def test_logits_loss_and_every_gradient(changes, how):
    theirs = transformers_model(**changes)
    ours = accelerated(theirs)
    truth = ours_of(theirs, BackendConfig(impl="reference")).double()
    lengths = (150,) if how == "plain" else LENGTHS

    def draws():
        for seed in range(DRAWS):
            docs = documents(lengths, seed)
            results = {
                "ours": together(ours, docs, "position_ids" if how == "plain" else how),
                "theirs": alone(theirs, docs),
                "truth": alone(truth, docs),
            }
            assert close(results["ours"]["logits"], results["theirs"]["logits"])
            yield results

    by_the_rule(draws(), torch.float32)


@pytest.mark.parametrize("how", ["seq_idx", "cu_seq_lens"])
def test_every_way_to_say_where_documents_lie_gives_the_same(how):
    model, docs = accelerated(transformers_model()), documents(LENGTHS)
    expected, found = together(model, docs, "position_ids"), together(model, docs, how)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("additive", [False, True])
def test_a_pack_with_a_4d_mask_is_one_in_the_scans_too(additive):
    """The mask speaks of attention; where a document starts, the positions say."""
    model, lengths = accelerated(transformers_model()), (20, 1, 30)
    docs = documents(lengths)
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = ((number[:, None] == number) & torch.ones(51, 51, dtype=torch.bool).tril())[None, None]
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    ids = torch.cat(docs, 1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    found = model(ids, labels=ids, position_ids=positions, attention_mask=mask)
    expected = together(model, docs, "position_ids")
    assert close(found.logits[0], expected["logits"])
    assert close(found.loss, expected["loss"])


def test_one_document_does_not_see_another():
    model = accelerated(transformers_model())
    a, b, c = documents((20, 30, 10))
    before = together(model, [a, b, c], "position_ids")["logits"]
    after = together(model, [a, (b + 1) % 97, c], "position_ids")["logits"]
    assert torch.equal(before[:20], after[:20])
    # The experts' products see other row counts behind a document that is routed anew.
    assert close(after[50:], before[50:], 1e-5)
    assert not close(after[20:50], before[20:50], 1e-2)


# Rounding before a router lets equally good computations choose other experts: one block alone.
BF16_BLOCKS = {"dense": ["mamba", "attention", "mlp", "mamba"], "experts": ["moe"]}


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 model", "autocast"])
@pytest.mark.parametrize("blocks", BF16_BLOCKS.values(), ids=BF16_BLOCKS)
def test_bf16_is_as_exact_as_theirs(blocks, autocast):
    theirs = transformers_model(layers_block_type=blocks)
    if not autocast:
        theirs = theirs.to(torch.bfloat16)
    ours = accelerated(theirs)
    truth = ours_of(theirs, BackendConfig(impl="reference")).double()
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    def draws():
        for seed in range(DRAWS):
            docs = documents((80,), seed)
            with context:
                results = {"ours": alone(ours, docs), "theirs": alone(theirs, docs)}
            yield results | {"truth": alone(truth, docs)}

    by_the_rule(draws(), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_our_own_model_does(dtype):
    """Bit for bit, a residual stream in fp32 (which transformers does not obey) included."""
    theirs = transformers_model(residual_in_fp32=True)
    ours = ours_of(theirs).to(dtype)
    model = accelerate(theirs, loss="linear").to(
        dtype
    )  # what is fp32 for a reason stays so in both
    assert {n: p.dtype for n, p in model.named_parameters()} == {
        n: p.dtype for n, p in ours.named_parameters()
    }
    docs = documents(LENGTHS)
    ids = torch.cat(docs, 1)
    packed = {"input_ids": ids, "labels": ids}
    said = packing(docs, "cu_seq_lens")
    padded = right_padded(docs)
    for theirs_said, ours_said in (
        (packed | said, packed | {"cu_seqlens": said["cu_seq_lens_q"]}),
        (padded, padded),
    ):
        found, expected = model.train()(**theirs_said), ours.train()(**ours_said)
        assert torch.equal(found.loss, expected.loss)
        for loss in (found.loss, expected.loss):
            loss.backward()
        # Norms see the padding here, as rows whose gradient is 0 among those of their sum.
        allowed = 1e-6 if theirs_said is padded else 0.0
        true = gradients(ours)
        differ = [n for n, g in gradients(model).items() if not close(g, true[n], allowed)]
        assert not differ
        logits = model.eval()(**theirs_said).logits  # transformers' are fp32
        assert torch.equal(logits.to(dtype), expected.logits)
        for either in (model, ours):
            either.zero_grad()


def test_parameters_names_and_dtypes_stay():
    model = transformers_model().to(torch.bfloat16)
    before = {name: (id(tensor), tensor.dtype) for name, tensor in tensors(model)}
    modules = {name: id(module) for name, module in model.named_modules()}
    assert accelerate(model) is model
    assert {name: (id(tensor), tensor.dtype) for name, tensor in tensors(model)} == before
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert type(model).__name__ == "NemotronHForCausalLM"
    assert {type(layer).__name__ for layer in model.model.layers} == {"NemotronHBlock"}


def tensors(model: nn.Module):
    yield from model.named_parameters()
    yield from model.named_buffers()


def test_undo_is_bit_identical():
    plain = transformers_model()
    model, docs = copy.deepcopy(plain), documents((60,))
    undo(accelerate(model))
    assert not is_accelerated(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in plain.modules()]
    expected, found = alone(plain, docs), alone(model, docs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    accelerate(model)  # and again
    assert close(alone(model, docs)["logits"], expected["logits"])


def test_copies_and_pickles_are_accelerated_too():
    model, ids = accelerated(transformers_model()), tokens(1, 20)
    expected = model(ids).logits
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert is_accelerated(other) and other is not model
        assert torch.equal(other(ids).logits, expected)


def test_what_is_fp32_stays_so():
    model = accelerated(transformers_model()).to(torch.bfloat16)
    kept = {n.rsplit(".", 1)[-1] for n, t in tensors(model) if t.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_bias", "e_score_correction_bias"}
    narrow = accelerate(transformers_model().to(torch.bfloat16)).to(torch.float16)
    assert {t.dtype for n, t in tensors(narrow) if n.endswith("A_log")} == {torch.float16}


def test_the_step_limit_is_the_configs_not_the_floor():
    """A plain model clamps dt at time_step_min; the checkpoints say time_step_limit."""
    theirs = transformers_model(time_step_min=0.09)
    truth = ours_of(theirs, BackendConfig(impl="reference")).double()
    docs = documents((40,))
    true, found = alone(truth, docs)["logits"], alone(accelerated(theirs), docs)["logits"]
    assert close(found, true)
    assert not close(alone(theirs, docs)["logits"], true, 1e-3)


# --- what is refused, with the model as it was -----------------------------------------------


def refused(model: nn.Module, kind: type[Exception], message: str, **options) -> None:
    classes = [type(module) for module in model.modules()]
    contents = [set(vars(module)) for module in model.modules()]
    with pytest.raises(kind, match=message):
        accelerate(model, **options)
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == contents


def test_another_model_is_refused():
    config = LlamaConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    refused(LlamaForCausalLM(config), TypeError, r"no NemotronHForCausalLM .*LlamaForCausalLM")
    with pytest.raises(TypeError, match="a str is no model"):
        accelerate("nvidia/NVIDIA-Nemotron-Nano-9B-v2")
    two = nn.ModuleList([transformers_model(), transformers_model()])
    refused(two, TypeError, "2 language models")


def test_twice_is_refused_and_undo_of_nothing():
    model = accelerated(transformers_model())
    refused(model, ValueError, "accelerated already")
    with pytest.raises(ValueError, match="not accelerated"):
        undo(undo(model))


def test_options_that_are_not_offered():
    model = transformers_model()
    refused(model, ValueError, "loss='fast'", loss="fast")
    for field in ("attn", "linear", "rms_norm"):
        backend = BackendConfig(**{field: "te"})
        refused(model, ValueError, f"{field}='te' is not offered", backend=backend)
    even = BackendConfig(fake_balanced_gate=True)
    refused(model, ValueError, "fake_balanced_gate=True is not offered", backend=even)


def test_a_config_that_asks_for_more_is_refused():
    model = transformers_model()
    model.config.sliding_window = 16
    refused(model, ValueError, "sliding_window")


def test_a_patched_model_is_refused():
    model = transformers_model()
    model.model.layers[2].forward = lambda *args, **kwargs: None
    refused(model, ValueError, "forward of a NemotronHBlock has been replaced")
    del model.model.layers[2].forward

    class Own(type(model.model.layers[0].mixer)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model.model.layers[0].mixer.__class__ = Own
    refused(model, TypeError, "Own is a subclass.*the forward of .*Own computes")


def test_an_adapter_that_would_have_no_effect_is_refused():
    model = accelerated(transformers_model())
    mixer = model.model.layers[0].mixer
    mixer.conv1d.base_layer = nn.Identity()
    with pytest.raises(TypeError, match="Conv1d stands in the place"):
        model(tokens(1, 5))


def test_a_model_inside_another_is_found():
    model = transformers_model()
    wrapper = nn.Sequential(model)
    assert accelerate(wrapper) is wrapper and is_accelerated(wrapper) and is_accelerated(model)
    assert undo(wrapper) is wrapper and not is_accelerated(model)


def test_the_report_says_what_runs():
    model = transformers_model()
    with pytest.raises(ValueError, match="holds nothing accelerated"):
        report(model)
    accelerate(model, backend=BackendConfig(impl="reference"), loss="linear")
    rows = report(nn.Sequential(model)).rows
    forms = {row.computes: row.uses for row in rows if "Identity" not in row.uses}
    assert forms == {
        "rms_norm": "reference", "mamba2": "reference", "mamba2_step": "reference",
        "attention": "reference", "cached_attention": "reference", "router": "reference",
        "experts": "reference", "cross_entropy": "none", "linear_cross_entropy": "reference",
        "relu2": "reference",
        "projections": "torch Linear",
    }  # fmt: skip
    assert {row.layer for row in rows if row.computes == "mamba2"} == {
        "0.model.layers.0.mixer", "0.model.layers.4.mixer",
    }  # fmt: skip
    assert "reference" in str(report(model))


@pytest.mark.parametrize("impl", ["reference", "portable"])
def test_the_backend_decides_which_form_runs(impl):
    plain, ids = transformers_model(), tokens(1, 20)
    model = accelerated(plain, backend=BackendConfig(impl=impl))
    assert close(model(ids).logits, plain(ids).logits)
    with pytest.raises(RuntimeError, match="cannot run"):  # kernels compute in fp32 at most
        accelerated(plain.double(), backend=BackendConfig(impl="triton", rms_norm="torch"))(ids)
