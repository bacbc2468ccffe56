"""The accelerated mamba layer against its equations in fp64: theirs has no form for a CPU."""

import pytest
import torch
import torch.nn.functional as F
from nemo_automodel.components.models.nemotron_v3.layers import NemotronV3Mamba2Mixer
from torch import Tensor, nn

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.nemo import accelerate
from nemotron_v3.ops.mamba2.reference import mamba2
from tests.accuracy import PlainPyTorch, Report, three_ways
from tests.nemo.models import HOLDER, their_config
from tests.nemo.rule import as_function, drawn
from tests.nemo.test_layers import pick

CHUNKS, EACH = 2, 30
HOW = ("plain", "left", "right", "seq_idx", "cu_seqlens", "packed")


def equations(mixer: nn.Module, layout: SequenceLayout):
    """The layer's formulas (arXiv 2405.21060) on its tensors by name."""

    def function(*, x: Tensor, fixed: dict, dtype=torch.float64, **tensors: Tensor) -> Tensor:
        del fixed
        t = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        packed = layout.pack(x.to(dtype))
        y, _, _ = mamba2(
            F.linear(packed, t["in_proj.weight"], t.get("in_proj.bias")),
            t["conv1d.weight"][:, 0],
            t.get("conv1d.bias"),
            t[f"{HOLDER}dt_bias"],
            t[f"{HOLDER}A_log"],
            t[f"{HOLDER}D"],
            t["norm.weight"],
            n_groups=mixer.n_groups,
            head_dim=mixer.head_dim,
            state_size=mixer.ssm_state_size,
            dt_limit=mixer.time_step_limit,
            eps=mixer.norm.variance_epsilon,
            layout=layout,
            return_final_states=False,
            dtype=dtype,
        )
        return layout.unpack(F.linear(y, t["out_proj.weight"], t.get("out_proj.bias")))

    return function


def tokens(how: str, generator: torch.Generator) -> tuple[tuple[int, ...], dict, SequenceLayout]:
    """A grid, the keyword arguments that say where its documents lie, and the same as a layout."""
    B, S = pick(generator, 1, 3), pick(generator, 1, 5, 18, 33)
    if how in ("plain", "left", "right"):
        mask = torch.ones(B, S, dtype=torch.int64)
        if how != "plain":
            n = int(torch.randint(0, S, (), generator=generator))
            mask[0, slice(n) if how == "left" else slice(S - n, S)] = 0
        told = {} if how == "plain" else {"attention_mask": mask}
        return (B, S), told, SequenceLayout.from_padding_mask(mask)
    lengths = [int(torch.randint(1, 20, (), generator=generator)) for _ in range(3)]
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    shape = (total,) if how == "packed" else (1, total)
    layout = SequenceLayout.from_cu_seqlens(offsets, shape)
    if how == "seq_idx":
        return shape, {"seq_idx": layout.seq_idx[None]}, layout
    return shape, {"cu_seqlens": offsets}, layout


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_the_mixer_computes_its_equations(chunk):
    report = Report(factor=2.5)  # of long decays
    for seed in range(chunk * EACH, (chunk + 1) * EACH):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        groups = pick(generator, 1, 2)
        config = their_config(
            mamba_num_heads=groups * pick(generator, 2, 3),
            mamba_head_dim=pick(generator, 4, 10),
            n_groups=groups,
            ssm_state_size=pick(generator, 4, 16),
            conv_kernel=pick(generator, 2, 4),
            use_conv_bias=pick(generator, True, False),
            use_bias=pick(generator, True, False),
            time_step_limit=pick(generator, (0.0, float("inf")), (0.01, 0.2)),
            hidden_size=pick(generator, 16, 48),
        )
        config.use_bias = config.mamba_proj_bias = pick(generator, True, False)
        mixer = accelerate(NemotronV3Mamba2Mixer(config, layer_idx=0))
        shape, told, layout = tokens(pick(generator, *HOW), generator)
        call = as_function(mixer, lambda layer, x, told=told: layer(x, **told))
        truth = equations(mixer, layout)
        inputs = drawn(mixer, torch.empty(*shape, config.hidden_size), generator)
        plain = PlainPyTorch(truth, torch.float32)
        report.add(*three_ways(call, truth, plain, inputs, generator))
    report.assert_allowed()


@torch.no_grad()
def test_left_padding_beside_a_bias_is_nothing():
    """Theirs masks the input alone: the biases of projection and convolution run in."""
    config = their_config()
    config.use_bias = True
    mixer = accelerate(NemotronV3Mamba2Mixer(config, layer_idx=0))
    mixer.in_proj.bias.normal_()
    x, mask = torch.randn(1, 12, 48), torch.ones(1, 12, dtype=torch.int64)
    mask[:, :5] = 0
    padded = mixer(x, attention_mask=mask)
    torch.testing.assert_close(padded[:, 5:], mixer(x[:, 5:]))
    assert not padded[:, :5].any()


@torch.no_grad()
def test_a_watched_or_replaced_norm_and_convolution_are_called():
    mixer = accelerate(NemotronV3Mamba2Mixer(their_config(), layer_idx=0))
    x, calls = torch.randn(2, 9, 48), []
    expected = mixer(x)
    mixer.norm.register_forward_hook(lambda *_: calls.append("norm"))
    torch.testing.assert_close(mixer(x), expected)
    mixer.conv1d.register_forward_hook(lambda *_: calls.append("conv1d"))
    torch.testing.assert_close(mixer(x), expected)
    assert calls == ["norm", "conv1d", "norm"]
