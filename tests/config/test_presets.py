"""The released models: their values, as their own files have them."""

import pytest

from nemotron_v3.config import PRESETS, NemotronV3Config
from tests.config import released

pytestmark = pytest.mark.filterwarnings("ignore:.*rotary embedding")

FILES = {
    "nemotron-h-56b": "Nemotron-H-56B-Base-8K",
    "nemotron-3-nano-30b": "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    "nemotron-3-super": "NVIDIA-Nemotron-3-Super-120B-A12B-FP8",
    "nemotron-3-ultra": "NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
    "nemotron-3.5-lightning": "NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4",
}

# Blocks of each type (mamba, mlp, moe, attention), and the width of in_proj.
SHAPES = {
    "nemotron-h-4b": (24, 24, 0, 4, 16496),
    "nemotron-h-8b": (24, 24, 0, 4, 18560),
    "nemotron-h-47b": (45, 48, 0, 5, 37120),
    "nemotron-h-56b": (54, 54, 0, 10, 37120),
    "nemotron-nano-9b-v2": (27, 25, 0, 4, 22656),
    "nemotron-nano-12b-v2": (28, 28, 0, 6, 22656),
    "nemotron-3-nano-4b": (21, 17, 0, 4, 17504),
    "nemotron-3-nano-30b": (23, 0, 23, 6, 10304),
    "nemotron-3-super": (40, 0, 40, 8, 18560),
    "nemotron-3-ultra": (48, 0, 48, 12, 35072),
    "nemotron-3.5-lightning": (23, 0, 23, 6, 10304),
}


@pytest.mark.parametrize(("name", "stem"), FILES.items())
def test_a_preset_is_its_released_file(name, stem):
    path = released.folder() / f"{stem}.json"
    assert NemotronV3Config.preset(name) == NemotronV3Config.from_json(path)


def test_there_are_eleven():
    assert list(PRESETS) == list(SHAPES)


@pytest.mark.parametrize(("name", "shape"), SHAPES.items())
def test_blocks_and_widths(name, shape):
    config = NemotronV3Config.preset(name)
    letters = config.hybrid_override_pattern
    assert (*(letters.count(letter) for letter in "M-E*"), config.in_proj_size) == shape


def test_changes_to_a_preset():
    config = NemotronV3Config.preset("nemotron-h-8b", layers_block_type="M*", dtype=None)
    assert (config.num_hidden_layers, config.hidden_size, config.dtype) == (2, 4096, None)


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ValueError, match="did you mean 'nemotron-3-ultra'") as caught:
        NemotronV3Config.preset("nemotron3-ultra")
    assert all(name in str(caught.value) for name in PRESETS)
