"""Faults seen in other implementations of the model, one test each, by number.

Each test states what is right; an implementation that has the fault fails it. Expected values come
from the same model asked in another way, from the step-by-step reference, or from transformers.

Those about caches and generation are in `test_cache_faults.py`. 16 is about running the
multi-token-prediction head and 22 about context parallelism, which are not built.
"""

import copy
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM

from nemotron_v3 import (
    BackendConfig,
    MoEConfig,
    NemotronV3ForCausalLM,
    from_pretrained,
    save_pretrained,
)
from nemotron_v3.layers import NemotronV3Attention, NemotronV3Block, NemotronV3Mamba2Mixer
from tests.accuracy import relative_error
from tests.model.test_against_transformers import ours_of, transformers_model
from tests.models import disturb, tiny_config, tiny_model, tokens

BIASES = {"use_bias": True, "mlp_bias": True, "attention_bias": True}


def assert_near(measured: Tensor, expected: Tensor) -> None:
    """The rule for layouts: within 1e-5 of the largest value in fp32."""
    assert (measured - expected).abs().max() <= 1e-5 * expected.abs().max()


def left_padded(lengths: list[int], width: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Ids with other tokens at the padding, their mask, and the documents."""
    ids, mask = tokens(len(lengths), width), torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, width - length :] = 1
    return ids, mask, [row[m == 1] for row, m in zip(ids, mask, strict=True)]


# --- masks and layouts --------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[9], [9, 20], [20, 1, 17]])
def test_04_left_padding_leaks_through_the_conv_bias_and_the_attention_mask(lengths):
    model = tiny_model(**BIASES)  # the conv bias is what leaks
    ids, mask, documents = left_padded(lengths, 24)
    logits = model(ids, attention_mask=mask).logits
    for row, document in enumerate(documents):
        assert_near(logits[row, mask[row] == 1], model(document[None]).logits[0])


def test_05_a_lone_left_padded_row_is_cut_at_the_number_of_ones():
    model = tiny_model()
    ids, mask, [document] = left_padded([7], 12)
    logits = model(ids, attention_mask=mask).logits
    assert_near(logits[:, 5:], model(document[None]).logits)


def test_05_document_numbers_in_a_mask_are_added_up():
    """A mask of 1 1 1 2 2 is no mask of seven tokens: it is refused, and said as seq_idx it is
    two documents."""
    model, ids, numbers = tiny_model(), tokens(1, 5), torch.tensor([[1, 1, 1, 2, 2]])
    with pytest.raises(ValueError, match="got 2: give document numbers as seq_idx"):
        model(ids, attention_mask=numbers)
    packed = model(ids, seq_idx=numbers).logits
    assert_near(packed[:, :3], model(ids[:, :3]).logits)
    assert_near(packed[:, 3:], model(ids[:, 3:]).logits)


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int32])
def test_12_a_float_mask_turns_bf16_activations_into_fp32(mask_dtype):
    model = tiny_model().bfloat16()
    ids, mask, _ = left_padded([9, 20], 24)
    expected = model(ids, attention_mask=mask).logits
    logits = model(ids, attention_mask=mask.to(mask_dtype)).logits
    assert logits.dtype == torch.bfloat16 and torch.equal(logits, expected)


def test_13_padding_is_routed_to_experts():
    model = tiny_model()
    ids, mask, _ = left_padded([9, 20], 24)
    routed = []
    for module in model.modules():
        if type(module).__name__ == "NemotronV3Router":
            module.register_forward_pre_hook(lambda _, args: routed.append(args[0].shape[0]))
    model(ids, attention_mask=mask)
    assert routed == [29, 29]
    # A block called alone as well: rows of its mixer are 0 at padding, and nothing there is read.
    block = model.model.layers[1]
    x = torch.randn(2, 24, 48)
    expected = block(x, attention_mask=mask)
    assert torch.equal(expected[mask == 0], x[mask == 0])
    poisoned = x.masked_fill(mask[..., None] == 0, torch.nan)
    assert torch.equal(block(poisoned, attention_mask=mask)[mask == 1], expected[mask == 1])


# --- dtypes -------------------------------------------------------------------------------------


def test_11_an_fp32_stream_breaks_in_the_second_bf16_block():
    ids = tokens(1, 40)
    truth = tiny_model().bfloat16().double()(ids).logits
    errors = {}
    for flag in (True, False):
        model = tiny_model(residual_in_fp32=flag).bfloat16()
        out = model(ids, labels=ids, output_hidden_states=True)
        out.loss.backward()
        errors[flag] = relative_error(out.logits, truth)
        stream = {h.dtype for h in out.hidden_states[1:-1]}
        assert stream == {torch.float32 if flag else torch.bfloat16}
        assert out.logits.dtype == torch.bfloat16
    assert errors[True] <= 2 * errors[False] + torch.finfo(torch.bfloat16).eps / 2


# --- the router ---------------------------------------------------------------------------------


def test_14_a_group_that_was_not_chosen_beats_negative_scores():
    """transformers excludes such groups with -inf; scores of 0 would win over biases of -3."""
    theirs = transformers_model(n_group=4, topk_group=2)
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.sub_(3)
    ours, ids = ours_of(theirs), tokens(1, 60)
    a, b = ours(ids).logits, theirs(ids).logits
    assert (a - b).abs().max() <= 2e-5 * b.abs().max()


def test_23_more_shared_experts_are_quietly_one():
    sizes = {
        "dim": 48,
        "n_routed_experts": 4,
        "n_activated_experts": 2,
        "moe_inter_dim": 16,
        "shared_expert_inter_dim": 20,
    }
    assert MoEConfig(n_shared_experts=2, **sizes).n_shared_experts == 2  # as wide as two
    with pytest.raises(ValueError, match="n_shared_experts"):
        tiny_config(n_shared_experts=2)


# --- heads and checkpoints ----------------------------------------------------------------------


def test_15_a_tied_head_is_refused():
    tied, untied = tiny_model(tie_word_embeddings=True), tiny_model()
    table = tied.model.embeddings.weight
    untied.load_state_dict(tied.state_dict() | {"lm_head.weight": table.detach().clone()})
    ids = tokens(2, 9)
    assert torch.equal(tied(ids).logits, untied(ids).logits)
    for model in (tied, untied):
        model(ids, labels=ids).loss.backward()
    both = untied.model.embeddings.weight.grad + untied.lm_head.weight.grad
    torch.testing.assert_close(table.grad, both)


def test_17_a_dense_model_with_a_prediction_head_cannot_be_read(tmp_path):
    model = tiny_model("M*-", num_nextn_predict_layers=1)
    model.mtp = {"mtp.layers.0.eh_proj.weight": torch.randn(48, 96)}
    save_pretrained(model, tmp_path)
    again = from_pretrained(tmp_path)
    ids = tokens(1, 9)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.mtp.keys() == model.mtp.keys()
    assert torch.equal(*(m.mtp["mtp.layers.0.eh_proj.weight"] for m in (again, model)))


# --- foreign configs ----------------------------------------------------------------------------


def test_18_a_dense_config_of_transformers_is_taken_for_a_mixture():
    """Its class has 8 experts by default, whatever the blocks are."""
    theirs = transformers_model(layers_block_type=["mamba", "attention", "mlp"], n_routed_experts=8)
    assert theirs.config.n_routed_experts == 8
    ours = ours_of(theirs)
    assert not [name for name, _ in ours.named_modules() if "expert" in name or "gate" in name]
    ids = tokens(1, 20)
    a, b = ours(ids).logits, theirs(ids).logits
    assert (a - b).abs().max() <= 2e-5 * b.abs().max()


def test_19_block_types_of_newer_configs_are_unknown():
    """transformers renames them, and its pattern is a property that no stored attribute backs."""
    theirs = transformers_model()
    assert {"linear_attention", "full_attention"} <= set(theirs.config.layers_block_type)
    assert "hybrid_override_pattern" not in vars(theirs.config)
    ours = NemotronV3ForCausalLM(theirs.config)
    ours.load_state_dict(theirs.state_dict())
    ids = tokens(1, 20)
    a, b = ours(ids).logits, theirs(ids).logits
    assert (a - b).abs().max() <= 2e-5 * b.abs().max()
    for name in ("linear_attention", "full_attention"):
        NemotronV3Block(theirs.config, 0, block_type=name)


# --- where it runs ------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [True, False])
def test_20_the_mixer_needs_cuda_packages_even_for_evaluation(train):
    mixer = NemotronV3Mamba2Mixer(tiny_config(), 0).train(train)
    disturb(mixer, torch.Generator().manual_seed(0))
    slow = NemotronV3Mamba2Mixer(
        tiny_config(dtype=torch.float64), 0, backend=BackendConfig(impl="reference")
    )
    slow.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 40, 48)
    assert_near(mixer(x), slow(x.double()))
    assert not {"mamba_ssm", "causal_conv1d", "transformer_engine", "flash_attn"} & set(sys.modules)


class LowRank(nn.Module):
    """A projection with an update of rank 2 beside it, as adapters put it there."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features) / 10)
        self.b = nn.Parameter(torch.randn(base.out_features, 2) / 10)

    @property
    def weight(self) -> Tensor:
        """What a layer gets that takes the weight instead of calling the module."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T

    def merged(self) -> Tensor:
        return self.base.weight + self.b @ self.a


PROJECTIONS = {
    "mamba": ["in_proj", "out_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "mlp": ["up_proj", "down_proj"],
    "moe": ["fc1_latent_proj", "fc2_latent_proj", "shared_experts.up_proj"],
}


@pytest.mark.parametrize(
    ("block_type", "name"), [(t, n) for t in PROJECTIONS for n in PROJECTIONS[t]]
)
def test_21_a_projections_wrapper_is_bypassed(block_type, name):
    block = NemotronV3Block(tiny_config(moe_latent_size=28), 0, block_type=block_type)
    disturb(block, torch.Generator().manual_seed(0))
    merged = copy.deepcopy(block)
    parent, _, child = f"mixer.{name}".rpartition(".")
    wrapper = LowRank(block.get_submodule(f"mixer.{name}"))
    setattr(block.get_submodule(parent), child, wrapper)
    with torch.no_grad():
        merged.get_submodule(f"mixer.{name}").weight.copy_(wrapper.merged())
    x = torch.randn(1, 20, 48)
    assert_near(block(x), merged(x))
    block(x).square().mean().backward()
    assert torch.count_nonzero(wrapper.a.grad) and torch.count_nonzero(wrapper.b.grad)


def test_25_weights_cannot_be_drawn_without_cuda():
    """`buffer_device=None` is where the parameters are; from the meta device, the CPU."""
    with torch.device("meta"):
        models = [NemotronV3ForCausalLM(tiny_config()) for _ in range(2)]
    for model, device in zip(models, (None, torch.device("cpu")), strict=True):
        torch.manual_seed(3)
        model.init_weights(buffer_device=device)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    layer = NemotronV3Attention(tiny_config())
    layer.init_weights(num_hidden_layers=7)
    assert layer.q_proj.weight.device.type == "cpu" and torch.isfinite(layer.q_proj.weight).all()


# --- faults of transformers, past and present ---------------------------------------------------


def test_hf_dt_is_clamped_at_time_step_min():
    """`time_step_min` is about drawing weights; `time_step_limit` is the clamp."""
    ids = tokens(1, 40)
    low, high = tiny_model(time_step_min=0.001), tiny_model(time_step_min=0.05)
    high.load_state_dict(low.state_dict())
    assert torch.equal(low(ids).logits, high(ids).logits)
    # Where transformers is told the floor that is meant, it agrees; where it is not, it is far off.
    meant = transformers_model(time_step_min=1e-9)
    floored = NemotronHForCausalLM(
        NemotronHConfig(**meant.config.to_dict() | {"time_step_min": 0.9})
    )
    floored.load_state_dict(meant.state_dict())
    expected = ours_of(meant)(ids).logits
    distance = [(m.eval()(ids).logits - expected).abs().max() for m in (meant, floored)]
    assert distance[0] <= 2e-5 * expected.abs().max() < distance[1]


def test_hf_the_limits_of_dt_are_ignored():
    limited = tiny_model("M", time_step_limit=(0.3, 0.6))
    slow = NemotronV3ForCausalLM(limited.config, BackendConfig(impl="reference")).double()
    slow.load_state_dict(limited.state_dict())
    ids = tokens(1, 40)
    assert_near(limited(ids).logits, slow(ids).logits)
    free = tiny_model("M")
    assert (free(ids).logits - limited(ids).logits).abs().max() > 1e-3


def test_hf_states_pass_between_chunks_along_the_wrong_axis():
    """The chunk is a matter of speed: longer than the text, or a fifth of it, changes nothing."""
    ids = tokens(2, 80)
    whole = tiny_model(chunk_size=128)(ids).logits
    for chunk_size in (16, 32, 7):
        assert_near(tiny_model(chunk_size=chunk_size)(ids).logits, whole)
