"""The whole model: loss, heads, hidden states, checkpointing, parameter groups, exact sizes."""

import copy

import pytest
import torch
import torch.nn.functional as F

from nemotron_v3 import (
    NemotronV3Config,
    NemotronV3ForCausalLM,
    SequenceLayout,
    parameter_groups,
)
from nemotron_v3.config import PRESETS
from tests.models import ALL_BLOCKS, labels_of, tiny_config, tiny_model, tokens


def test_the_loss_is_the_mean_over_targets_inside_documents():
    model = tiny_model().double()
    layout = SequenceLayout.from_lengths([5, 1, 9, 2])
    ids = tokens(17)
    labels = ids.clone()
    labels[7] = -100
    out = model(ids, labels=labels, layout=layout)
    logp = F.log_softmax(out.logits, -1)
    ends = {4, 5, 14, 16}
    counted = [t for t in range(16) if t not in ends and labels[t + 1] != -100]
    assert len(counted) == 12
    expected = -sum(logp[t, labels[t + 1]] for t in counted) / 12
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)


def test_no_target_gives_no_loss_and_no_gradient():
    model = tiny_model()
    loss = model(ids := tokens(2, 5), labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.parameters())


def test_labels_do_not_change_the_logits_and_padding_holds_none():
    model = tiny_model()
    ids, mask = tokens(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    with_labels = model(ids, mask, labels=labels_of(ids, mask)).logits
    without = model(ids, mask).logits
    torch.testing.assert_close(with_labels, without)
    assert torch.count_nonzero(with_labels[mask == 0]) == 0
    assert (with_labels[mask == 1].abs().sum(-1) > 0).all()


def test_logits_to_keep():
    model = tiny_model()
    ids = tokens(2, 9)
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    places = torch.tensor([0, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=places).logits, full[:, places])
    kept = model(ids, labels=ids, logits_to_keep=1)
    torch.testing.assert_close(kept.loss, model(ids, labels=ids).loss)
    torch.testing.assert_close(kept.logits, full[:, -1:])


def test_inputs_embeds_stand_for_input_ids():
    model = tiny_model()
    ids = tokens(2, 9)
    embeds = model.model.embeddings(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    packed = model(inputs_embeds=embeds.flatten(0, 1), cu_seqlens=torch.tensor([0, 9, 18]))
    assert torch.equal(packed.logits.unflatten(0, (2, 9)), model(ids).logits)


def test_hidden_states_are_the_stream():
    model = tiny_model()
    ids, mask = tokens(2, 6), torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    out = model(ids, mask, output_hidden_states=True)
    assert len(out.hidden_states) == len(ALL_BLOCKS) + 1
    embedded = model.model.embeddings(ids) * mask[..., None]
    assert torch.equal(out.hidden_states[0], embedded)
    after_first = model.model.layers[0](embedded, attention_mask=mask) * mask[..., None]
    torch.testing.assert_close(out.hidden_states[1], after_first)
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)


@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_checkpointing_changes_no_gradient(residual_in_fp32):
    changes = {"attention_dropout": 0.3, "residual_in_fp32": residual_in_fp32}
    gradients = []
    for asked in (None, {}, {"every": 3}, {"blocks": {1, 4}}):
        model = tiny_model(**changes).train()
        if asked is not None:
            model.gradient_checkpointing_enable(**asked)
        torch.manual_seed(5)
        ids, mask = tokens(2, 40), torch.ones(2, 40)
        mask[1, 20:] = 0
        model(ids, mask, labels=labels_of(ids, mask)).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


def test_a_block_that_is_not_there_is_not_recomputed():
    model = tiny_model()
    with pytest.raises(ValueError, match=r"blocks \[7\] are not there: the model has 7"):
        model.gradient_checkpointing_enable(blocks=(0, 7))
    with pytest.raises(ValueError, match="every is 0"):
        model.gradient_checkpointing_enable(every=0)
    assert not model.model.gradient_checkpointing


def test_checkpointing_keeps_fewer_activations():
    kept = []
    for checkpointing in (False, True):
        model = tiny_model()
        if checkpointing:
            model.gradient_checkpointing_enable()
        saved = 0

        def count(tensor):
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model.model(tokens(2, 64))
        kept.append(saved)
    assert kept[1] < kept[0] / 10


def test_a_tied_head_is_the_embedding_matrix():
    tied = tiny_model(tie_word_embeddings=True)
    assert "lm_head.weight" not in tied.state_dict()
    assert tied.lm_head.weight is tied.model.embeddings.weight
    untied = tiny_model()
    state = tied.state_dict() | {"lm_head.weight": tied.model.embeddings.weight}
    untied.load_state_dict(state)
    ids = tokens(2, 9)
    assert torch.equal(tied(ids).logits, untied(ids).logits)
    tied(ids, labels=ids).loss.backward()
    untied(ids, labels=ids).loss.backward()
    both = untied.model.embeddings.weight.grad + untied.lm_head.weight.grad
    torch.testing.assert_close(tied.model.embeddings.weight.grad, both)


def test_a_tie_survives_copies_casts_and_meta():
    model = copy.deepcopy(tiny_model(tie_word_embeddings=True)).double()
    assert model.lm_head.weight is model.model.embeddings.weight
    with torch.device("meta"):
        empty = NemotronV3ForCausalLM(tiny_config(tie_word_embeddings=True))
    empty.init_weights()
    assert empty.lm_head.weight is empty.model.embeddings.weight


def test_biases_reach_the_output():
    model = tiny_model(use_bias=True, mlp_bias=True, attention_bias=True)
    ids = tokens(1, 9)
    model(ids, labels=ids).loss.backward()
    biases = {n: p for n, p in model.named_parameters() if n.endswith("_proj.bias")}
    assert len(biases) == 2 * 2 + 2 * 4 + 1 * 2 + 2 * 2  # mamba, attention, mlp, shared experts
    assert all(torch.count_nonzero(p.grad) for n, p in biases.items() if "k_proj" not in n)


def test_parameter_groups_decay_matrices_only():
    model = tiny_model(use_bias=True, mlp_bias=True, attention_bias=True)
    model.model.embeddings.weight.requires_grad_(False)
    decayed, kept = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    kept_names = {names[id(p)].rsplit(".", 2)[-1] for p in kept["params"]}
    assert kept_names == {"bias", "weight", "A_log", "D", "dt_bias"}
    assert all(p.dim() == 1 for p in kept["params"])
    assert all(p.dim() > 1 for p in decayed["params"])
    grouped = len(decayed["params"]) + len(kept["params"])
    assert grouped == len(names) - 1  # the frozen one is left out
    with pytest.raises(ValueError, match="-0.1"):
        parameter_groups(model, -0.1)


# Published sizes; the router's correction bias is counted, multi-token prediction is not.
SIZES = {
    "nemotron-h-4b": 4_489_223_040,
    "nemotron-h-8b": 8_100_852_736,
    "nemotron-h-47b": 46_791_554_816,
    "nemotron-h-56b": 56_324_350_464,
    "nemotron-nano-9b-v2": 8_888_227_328,
    "nemotron-nano-12b-v2": 12_310_001_152,
    "nemotron-3-nano-4b": 3_973_556_832,
    "nemotron-3-nano-30b": 31_577_940_288,
    "nemotron-3-super": 120_668_707_840,
    "nemotron-3-ultra": 549_308_993_536,
    "nemotron-3.5-lightning": 31_577_940_288,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_exactly_the_published_number_of_parameters(preset):
    with torch.device("meta"):
        model = NemotronV3ForCausalLM(NemotronV3Config.preset(preset))
    count = sum(t.numel() for t in [*model.parameters(), *model.buffers()])
    assert count == SIZES[preset]


BAD_CALLS = [
    ({}, "exactly one of input_ids and inputs_embeds, got neither"),
    ({"input_ids": (2, 3), "inputs_embeds": (2, 3, 48)}, "got both"),
    ({"inputs_embeds": (2, 3, 40)}, "shape \\(2, 3, 40\\), the model's hidden size is 48"),
    ({"input_ids": (1, 2, 3)}, r"shape \(1, 2, 3\)"),
    ({"input_ids": (2, 3), "attention_mask": (2, 4)}, r"shape \(2, 4\), the tokens \(2, 3\)"),
    ({"input_ids": (2, 3), "labels": (2, 2)}, r"labels have shape \(2, 2\), the tokens \(2, 3\)"),
]


@pytest.mark.parametrize(("shapes", "message"), BAD_CALLS)
def test_bad_calls_are_refused(shapes, message):
    arguments = {
        name: torch.randn(*shape) if name == "inputs_embeds" else torch.ones(shape).long()
        for name, shape in shapes.items()
    }
    with pytest.raises(ValueError, match=message):
        tiny_model()(**arguments)


BAD_KINDS = [
    ({"input_ids": [[1, 2]]}, "input_ids is a list"),
    ({"input_ids": torch.ones(1, 2)}, "input_ids are torch.float32: give token ids"),
    ({"inputs_embeds": [[0.0] * 48]}, "inputs_embeds is a list"),
    (
        {"input_ids": torch.ones(1, 2).long(), "labels": torch.ones(1, 2)},
        "labels are torch.float32",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_KINDS)
def test_other_kinds_of_tokens_are_refused(arguments, message):
    with pytest.raises(TypeError, match=message):
        tiny_model()(**arguments)


def test_foreign_caches_and_unknown_arguments_are_refused():
    model = tiny_model()
    with pytest.raises(TypeError, match="give a nemotron_v3.NemotronHybridCache"):
        model(tokens(1, 3), past_key_values=object())
    with pytest.raises(TypeError, match="token_type_ids"):
        model(tokens(1, 3), token_type_ids=tokens(1, 3))
