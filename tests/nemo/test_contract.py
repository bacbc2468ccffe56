"""What the rest of NeMo AutoModel reads from Nemotron's layers, and sets on them, in place."""

import copy
from types import SimpleNamespace

import pytest
import torch
from nemo_automodel.components._peft.lora import PeftConfig, apply_lora_to_linear_modules
from nemo_automodel.components._peft.lora_experts import GroupedExpertsLoRA
from nemo_automodel.components.models.nemotron_v3 import layers as theirs
from nemo_automodel.components.moe import load_balance_metrics as metrics
from nemo_automodel.components.moe.experts import GroupedExperts
from nemo_automodel.components.moe.layers import Gate, MoE
from nemo_automodel.components.moe.parallelizer import _get_moe_module
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from nemotron_v3.nemo import accelerate, undo
from nemotron_v3.nemo.classes import Accelerated
from tests.models import tokens
from tests.nemo.models import CPU, HOLDER, tensors, their_backend, their_model

NO_SCAN = ("moe", "attention", "mlp", "moe")


@pytest.fixture
def model():
    return accelerate(their_model())


def of_type(model: nn.Module, kind: str) -> list[nn.Module]:
    return [block for block in model.model.layers.values() if block.block_type == kind]


# --- the block ------------------------------------------------------------------------------------


def test_a_block_says_what_it_is(model):
    blocks = list(model.model.layers.values())
    assert [block.block_type for block in blocks] == [
        "mamba", "moe", "attention", "mlp", "mamba", "attention", "moe",
    ]  # fmt: skip
    for block in blocks:
        kind = block.block_type
        assert block.layer_type == ("full_attention" if kind == "attention" else kind)
        assert block.self_attn is block.mixer
        assert _get_moe_module(block) is (block.mixer if kind == "moe" else None)
        assert (block.mlp is block.mixer and isinstance(block.mlp, MoE)) == (kind == "moe")
        block.norm.reset_parameters()
        assert torch.equal(block.norm.weight, torch.ones(48))


def test_names_of_blocks_are_those_of_the_state_dict(model):
    names = set(model.state_dict())
    assert {f"model.layers.0.mixer.{HOLDER}{n}" for n in ("A_log", "D", "dt_bias")} <= names
    assert "model.layers.1.mixer.experts.gate_and_up_projs" in names
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names


def test_weights_are_drawn_in_place(model):
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    was = tensors(model)
    for block in model.model.layers.values():
        block.init_weights(buffer_device=CPU)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    drawn = model.model.layers["1"].mixer.gate.weight
    assert not torch.equal(drawn, was["model.layers.1.mixer.gate.weight"])


def test_a_checkpointed_block_gives_the_same_gradients(model):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    plain = copy.deepcopy(model)
    layers = model.model.layers
    for key in list(layers):
        layers[key] = checkpoint_wrapper(layers[key])
    assert layers["0"].block_type == "mamba"
    for each in (model, plain):
        each(ids, attention_mask=mask, labels=ids).loss.backward()
    wrapped = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert torch.equal(wrapped[name].grad, parameter.grad), name


def test_their_own_checkpointing_of_a_model(model):
    ids = tokens(2, 9)
    plain = copy.deepcopy(model)
    model.gradient_checkpointing_enable()
    assert torch.equal(model(ids).logits, plain(ids).logits)
    model.gradient_checkpointing_disable()
    assert isinstance(model.model.layers["0"], theirs.NemotronV3Block)


# --- the mamba mixer ------------------------------------------------------------------------------


def test_a_mixer_has_the_sizes_and_tensors_that_context_parallelism_slices(model):
    mixer = of_type(model, "mamba")[0].mixer
    assert (mixer.num_heads, mixer.head_dim, mixer.n_groups, mixer.ssm_state_size) == (6, 10, 2, 16)
    assert mixer.conv1d.weight.shape == (60 + 2 * 2 * 16, 1, 4)
    assert mixer.conv1d.bias.shape == (124,)
    assert mixer.A_log.shape == mixer.D.shape == mixer.dt_bias.shape == (6,)
    assert mixer.A_log is mixer.get_parameter(f"{HOLDER}A_log")


def test_a_cp_of_one_process_is_none_and_one_without_its_processes_is_refused(model):
    """tests/nemo/shared_tokens.py has those of several."""
    mixer = of_type(model, "mamba")[0].mixer
    x = torch.randn(1, 5, 48)
    assert mixer.cp is None
    expected = mixer(x)
    mixer.cp = SimpleNamespace(cp_size=1)
    assert torch.equal(mixer(x), expected)
    mixer.cp = SimpleNamespace(cp_size=2)
    with pytest.raises(ValueError, match="of 2 processes, whose cp_group is a .*NoneType"):
        model(tokens(1, 5))


@pytest.mark.skipif(not HOLDER, reason="version 0.5 has no holder")
def test_the_fp32_tensors_come_through_their_holder(model):
    """A sharder gathers them by hooks on a call of the holder."""
    mixer, calls = of_type(model, "mamba")[0].mixer, []
    mixer._fp32_params.register_forward_hook(lambda *_: calls.append(1))
    model(tokens(1, 5)).logits.sum().backward()
    assert calls == [1]
    assert all(p.grad is not None for p in mixer._fp32_params.parameters())


@pytest.mark.skipif(not HOLDER, reason="version 0.5 has no holder")
def test_a_narrow_model_keeps_its_fp32_holder_and_computes_with_it():
    model = accelerate(their_model(dtype=torch.bfloat16, torch_dtype="bfloat16"))
    holder = of_type(model, "mamba")[0].mixer._fp32_params
    assert {p.dtype for p in holder.parameters()} == {torch.float32}
    out = model(tokens(2, 9), labels=tokens(2, 9))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16 and holder.A_log.grad.dtype == torch.float32


def test_a_stream_in_fp32_around_narrow_layers():
    model = accelerate(their_model(dtype=torch.bfloat16, torch_dtype="bfloat16"))
    for block in model.model.layers.values():
        block.residual_in_fp32 = True
    stream = model.model.layers["0"](torch.randn(1, 5, 48, dtype=torch.bfloat16))
    assert stream.dtype == torch.float32
    assert model.model.layers["1"](stream).dtype == torch.float32


# --- attention ------------------------------------------------------------------------------------


def test_attention_has_no_module_of_transformer_engine_and_a_door_for_a_mesh(model):
    layer = of_type(model, "attention")[0].mixer
    assert layer.attn_module is None
    with pytest.raises(ValueError, match="cp_mesh is 'a mesh': give a DeviceMesh"):
        layer.setup_cp_attention("a mesh")


def test_attention_of_another_backend_stays_theirs():
    plain = their_model(("attention", "mlp"), backend=their_backend(attn="flex"))
    layer = accelerate(copy.deepcopy(plain)).model.layers["0"].mixer
    assert isinstance(layer, Accelerated)
    layer.attn_func = plain.model.layers["0"].mixer.attn_func = lambda q, k, v, **_: q
    x = torch.randn(1, 5, 48)
    assert torch.equal(layer(x), plain.model.layers["0"].mixer(x))


# --- mixture of experts ---------------------------------------------------------------------------


def test_experts_and_routers_are_theirs_to_whoever_asks(model):
    moe = of_type(model, "moe")[0].mixer
    assert isinstance(moe.gate, Gate) and isinstance(moe.experts, GroupedExperts)
    assert moe.experts.gate_and_up_projs.shape == (8, 48, 24)
    assert moe.experts.down_projs.shape == (8, 24, 48)
    moe.cp_mesh = None


def test_load_metrics_count_the_tokens(model):
    plain = undo(accelerate(their_model(NO_SCAN)))
    ours = accelerate(copy.deepcopy(plain))
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    for each in (plain, ours):
        metrics.enable_load_balance_tracking(each)
        each(ids, attention_mask=mask)
    expected, found = (metrics.collect_expert_loads(each) for each in (plain, ours))
    assert found.keys() == expected.keys() and len(found) == 2
    for name, row in found.items():
        assert torch.equal(row["expert_load"], expected[name]["expert_load"])
    mask[1, 3:] = 0  # padding is no token
    ours(ids, attention_mask=mask)
    assert {int(r["expert_load"].sum()) for r in metrics.collect_expert_loads(ours).values()} == {
        int(mask.sum()) * 3
    }


def test_the_bias_is_moved_by_the_loads():
    model = accelerate(their_model(("moe", "mlp"))).train()
    gate = model.model.layers["0"].mixer.gate
    gate.bias_update_factor = 0.1
    before = gate.e_score_correction_bias.clone()
    loads = torch.zeros(8)

    def count(_, __, routed):
        loads.add_(torch.bincount(routed[1].flatten(), minlength=8))

    gate.register_forward_hook(count)
    for seed in range(2):
        model(tokens(2, 9, seed=seed))
    assert torch.equal(gate._cumulative_expert_load.float(), loads)
    gate.update_bias()
    moved = gate.e_score_correction_bias - before
    assert torch.equal(moved.sign(), (loads.mean() - loads).sign())


def test_lora_finds_its_layers_and_trains_them(model):
    adapted = PeftConfig(
        target_modules=["*_proj", "*in_proj", "*out_proj", "*experts"], dim=4, alpha=8
    )
    ids = tokens(2, 9)
    before = model(ids).logits
    assert apply_lora_to_linear_modules(model, adapted) > 0
    torch.testing.assert_close(model(ids).logits, before)  # B is zero
    experts = of_type(model, "moe")[0].mixer.experts
    assert type(experts) is GroupedExpertsLoRA  # theirs computes them
    out_proj = of_type(model, "mamba")[0].mixer.out_proj
    model(ids, labels=ids).loss.backward()
    assert out_proj.lora_B.weight.grad.abs().sum() > 0
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora" in n for n in trained)


def test_lora_that_is_there_before(model):
    before = their_model()
    apply_lora_to_linear_modules(
        before, PeftConfig(target_modules=["*out_proj", "*experts"], dim=4, alpha=8)
    )
    with torch.no_grad():
        for name, p in before.named_parameters():
            if "lora_B" in name or "lora_down_B" in name:
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    ids = tokens(2, 9)
    told = accelerate(before)(ids, labels=ids)
    told.loss.backward()
    assert type(of_type(before, "moe")[0].mixer.experts) is GroupedExpertsLoRA
    assert not torch.allclose(told.logits, model(ids).logits)
    assert of_type(before, "mamba")[0].mixer.out_proj.lora_A.weight.grad.abs().sum() > 0


# --- the model ------------------------------------------------------------------------------------


def test_the_adapter_of_checkpoints_goes_back_and_forth(model):
    state = tensors(model)
    exported = model.state_dict_adapter.to_hf(dict(state))
    assert "backbone.layers.0.mixer.A_log" in exported
    assert "backbone.layers.1.mixer.experts.7.down_proj.weight" in exported
    back = model.state_dict_adapter.from_hf(dict(exported))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("told", ["cu_seqlens", "padded", "seq_idx", "_packed_seq_ids"])
def test_documents_of_a_pack_are_separate(model, told):
    """In attention too, which theirs passes by."""
    lengths = (4, 7, 2)
    ids, offsets = tokens(1, 16), torch.tensor([0, 4, 11, 13])
    numbers = torch.repeat_interleave(torch.arange(3) + 1, torch.tensor(lengths))
    numbers = torch.cat([numbers, torch.zeros(3, dtype=torch.int64)])[None]  # a tail of padding
    packing = {
        "cu_seqlens": {"cu_seqlens": torch.tensor([[*offsets.tolist(), -1000]])},
        "padded": {"cu_seqlens": offsets, "cu_seqlens_padded": torch.tensor([0, 4, 11, 16])},
        "seq_idx": {"seq_idx": numbers},
        "_packed_seq_ids": {"_packed_seq_ids": numbers},
    }[told]
    packed = model(ids, **packing).logits[0]
    for start, end in zip(offsets[:-1], offsets[1:], strict=True):
        torch.testing.assert_close(packed[start:end], model(ids[:, start:end]).logits[0])


def test_offsets_made_of_a_mask_say_what_the_mask_says(model):
    ids, mask = tokens(1, 9), torch.ones(1, 9, dtype=torch.int64)
    mask[:, :3] = 0
    told = model(ids, attention_mask=mask).logits[0, 3:]
    torch.testing.assert_close(told, model(ids[:, 3:]).logits[0])


def test_a_batch_of_rows_with_offsets_has_a_document_a_row(model):
    ids, mask = tokens(2, 6), torch.ones(2, 6, dtype=torch.int64)
    told = model(ids, attention_mask=mask, cu_seqlens=torch.tensor([0, 6, 12])).logits
    assert torch.equal(told, model(ids).logits)


def test_a_layer_takes_tokens_without_a_batch_dimension(model):
    """Theirs fails there, but for Transformer Engine's attention."""
    x, told = torch.randn(11, 48), {"cu_seqlens": torch.tensor([0, 4, 11])}
    for block in model.model.layers.values():
        expected = block(x[None], **told)[0]
        torch.testing.assert_close(block(x, **told), expected)


def test_dropout_of_attention_acts_in_training_alone(model):
    layer = of_type(model, "attention")[0].mixer
    layer.attention_dropout, x = 0.5, torch.randn(1, 9, 48)
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.allclose(layer.train()(x), layer(x))


def test_numbers_of_documents_win_over_offsets(model):
    """As in AutoModel's own order of precedence, where both are given and differ."""
    ids, numbers = tokens(1, 9), torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2]])
    told = model(ids, seq_idx=numbers, cu_seqlens=torch.tensor([0, 3, 9])).logits
    assert torch.equal(told, model(ids, seq_idx=numbers).logits)
    padded = model(
        ids, cu_seqlens=torch.tensor([0, 3, 7]), cu_seqlens_padded=torch.tensor([0, 5, 9])
    )
    torch.testing.assert_close(padded.logits[0, 5:9], model(ids[:, 5:]).logits[0])
