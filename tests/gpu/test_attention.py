"""Attention's kernels on a GPU: every case and dtype, determinism, lengths that are new."""

import pytest
import torch

from nemotron_v3 import NemotronV3Config, NemotronV3ForCausalLM, ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.attention import cases
from nemotron_v3.ops.common import long_attention as long
from tests.accuracy import relative_error
from tests.kernels.holding import hold, results

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.heavy,
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NANO = (32, 2, 128)
CASES = (
    *(case for case in cases.CASES if case.mask is None and sum(case.lengths)),
    cases.Case("nano", (300, 1, 129, 64), *NANO, strided=True),
    cases.Case("wide", (150, 70), 4, 2, 256),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_accuracy(case, dtype):
    hold("attention", case, dtype, "cuda")


def drawn(lengths, dtype=torch.bfloat16):
    case = cases.Case("drawn", lengths, *NANO)
    return cases.make_inputs(case, dtype, "cuda", torch.Generator().manual_seed(0))


@pytest.mark.parametrize("lengths", [(300, 700, 129), (9000, 40)], ids=str)
def test_gradients_are_bit_identical_over_runs(lengths, monkeypatch):
    """Of long documents where PyTorch is asked for it: cuDNN's backward is another in each run."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    inputs = drawn(lengths)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (results("attention", inputs, impl="auto") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_other_documents_are_bit_identical_beside_nan():
    inputs = drawn((300, 700, 129))
    before = results("attention", inputs)
    for tensor in inputs.tensors.values():
        tensor[:300] = torch.nan
    after = results("attention", inputs)
    assert all(torch.equal(a[300:], b[300:]) for a, b in zip(before, after, strict=True))


def test_a_long_document_at_a_fixed_size():
    inputs = drawn((long.LONG + 5, 77))
    auto, kernels = (results("attention", inputs, impl=impl) for impl in ("auto", "triton"))
    for a, b in zip(auto, kernels, strict=True):
        assert relative_error(a, b) < 1e-2


def test_no_length_compiles_waits_or_reads_back():
    """A training step of a small model with lengths never seen: no compilation, no wait."""
    config = NemotronV3Config(
        layers_block_type="ME*-", vocab_size=512, hidden_size=256, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, mamba_num_heads=8, n_groups=2, ssm_state_size=64,
        n_routed_experts=8, moe_intermediate_size=64, intermediate_size=256,
        moe_shared_expert_intermediate_size=64, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("cuda"):
        model = NemotronV3ForCausalLM(config)

    def step(lengths):
        layout = SequenceLayout.from_lengths(lengths, "cuda")
        ids = torch.zeros(sum(lengths), dtype=torch.int64, device="cuda")
        model(input_ids=ids, labels=ids, layout=layout).loss.backward()

    step([64, 64])
    step([1, 900])
    from triton import knobs

    compiled = []
    knobs.runtime.jit_post_compile_hook = lambda **info: compiled.append(info["repr"])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lengths in ([3, 17, 200], [1], [5, 5, 90, 1, 33], [1024], [640, 3]):
            step(lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        knobs.runtime.jit_post_compile_hook = None
    assert compiled == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_behind_a_cache(dtype):
    starts, new = (205, 130, 400), (140, 0, 233)
    needed = max(a + b for a, b in zip(starts, new, strict=True))
    buffers = [torch.randn(3, 2, 700, 128, device="cuda") for _ in range(2)]
    q = torch.randn(sum(new), 32, 128, device="cuda")
    found = []
    for impl, kind in (("portable", torch.float64), ("portable", dtype), ("triton", dtype)):
        leaves = [t.to(dtype).to(kind).requires_grad_() for t in (q, *buffers)]
        y = ops.cached_attention(
            leaves[0],
            *(t[:, :, :needed] for t in leaves[1:]),
            layout=SequenceLayout.from_lengths(list(new), "cuda"),
            starts=starts,
            positions=torch.tensor(starts, device="cuda"),
            impl=impl,
        )
        dy = torch.ones_like(y).cumsum(0).cos()
        found.append([y, *torch.autograd.grad(y, leaves, dy)])
    roundoff = torch.finfo(dtype).eps / 2
    for true, plain, ours in zip(*found, strict=True):
        assert relative_error(ours, true) <= 2 * relative_error(plain, true) + roundoff
