"""Peak memory of loading and saving, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_v3 import NemotronV3Config
from nemotron_v3.model.cost import parameters

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

ROOT = Path(__file__).parents[2]
PRELUDE = """
import json, os, sys, time
import torch
import torch._refs  # what building on the meta device loads
from nemotron_v3 import NemotronV3Config, NemotronV3ForCausalLM
from nemotron_v3.checkpoint import from_pretrained, save_pretrained

def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

with torch.device("meta"):
    NemotronV3ForCausalLM(NemotronV3Config.preset("nemotron-3-nano-30b"))
before, started = peak(), time.monotonic()
"""
LOAD = "model = from_pretrained(sys.argv[1], **eval(sys.argv[3]))\n"
SAVE = "save_pretrained(model, sys.argv[2])\n"
TOLD = "print(json.dumps([peak() - before, time.monotonic() - started]))"
MAKE = """
config = NemotronV3Config.from_json(sys.argv[2])
with torch.device("meta"):
    model = NemotronV3ForCausalLM(config)
model = model.to(torch.bfloat16).to_empty(device="cpu")
with torch.no_grad():
    for tensor in [*model.parameters(), *model.buffers()]:
        flat, block = tensor.view(-1), torch.randn(2**20)
        for part in flat.split(2**20):
            part.copy_(block[: part.numel()])
save_pretrained(model, sys.argv[1], max_shard_size=sys.argv[3])
"""


def run(script: str, *arguments: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, *arguments],
        cwd=ROOT, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout or "[]")


NARROW = """
from safetensors.torch import save_file
path, config, shard = sys.argv[1], NemotronV3Config.from_json(sys.argv[2]), int(sys.argv[3])
with torch.device("meta"):
    tensors = NemotronV3ForCausalLM(config).state_dict()
os.makedirs(path)
config.to_json(path)
places, held, size = {}, {}, 0
def flush():
    global held, size
    file = f"model-{len(set(places.values())) + 1:05}-of-99999.safetensors"
    save_file(held, f"{path}/{file}")
    places.update(dict.fromkeys(held, file))
    held, size = {}, 0
for name, tensor in tensors.items():
    name = name.replace("model.", "backbone.", 1)
    stacked = ".experts." in name
    parts = range(tensor.shape[0]) if stacked else [None]
    for e in parts:
        shape = tensor.shape[1:] if stacked else tensor.shape
        base = name.replace(".experts.", f".experts.{e}.") if stacked else name[: -len(".weight")]
        if stacked or name == "lm_head.weight":
            rows, columns = shape
            held[f"{base}.weight"] = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8)
            ones = torch.ones(rows, columns // 16)
            held[f"{base}.weight_scale"] = ones.to(torch.float8_e4m3fn)
            held[f"{base}.weight_scale_2"] = torch.tensor(1e-3)
        else:
            held[name] = torch.randn(shape).to(torch.bfloat16)
        size = sum(t.nbytes for t in held.values())
        if size > shard:
            flush()
flush()
with open(f"{path}/model.safetensors.index.json", "w") as index:
    json.dump({"metadata": {}, "weight_map": places}, index)
"""


def nano(experts: int, **changes) -> NemotronV3Config:
    """Nano's layout, a few layers of it."""
    return NemotronV3Config.preset("nemotron-3-nano-30b").replace(
        hybrid_override_pattern="MEM*", n_routed_experts=experts, **changes
    )


def size_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


ACTIONS = {
    "load": (LOAD, "{}"),
    "load in fp32": (LOAD, "{'dtype': torch.float32}"),
    "load and save": (LOAD + SAVE, "{}"),
}


def measure(
    tmp_path: Path, config: NemotronV3Config, shard: str, actions: list[str]
) -> tuple[int, dict[str, float]]:
    """The checkpoint's size, and for each action its peak above an idle process, in bytes."""
    config.to_json(tmp_path / "config.json")
    made, saved = tmp_path / "made", tmp_path / "saved"
    run(MAKE, str(made), str(tmp_path / "config.json"), shard)
    size = size_of(made)
    peaks = {}
    for action in actions:
        script, options = ACTIONS[action]
        peaks[action], seconds = run(script + TOLD, str(made), str(saved), options)
        print(f"{action}: {size / 1e9:.3f} GB, peak {peaks[action] / 1e9:.3f} GB, {seconds:.2f} s")
    assert sorted(p.name for p in saved.iterdir()) == sorted(p.name for p in made.iterdir())
    for path in saved.iterdir():
        same = subprocess.run(["cmp", path, made / path.name], check=False)
        assert same.returncode == 0, path.name
    return size, peaks


def test_the_peak_is_the_model_and_its_largest_tensor(tmp_path):
    config = nano(experts=16, hidden_size=512, vocab_size=32768, moe_intermediate_size=1024)
    size, peaks = measure(tmp_path, config, "60MB", ["load and save"])
    assert size > 120e6
    largest = 2 * config.vocab_size * config.hidden_size
    assert peaks["load and save"] < size + largest + 20e6


@pytest.mark.heavy
def test_the_peak_of_a_narrow_load_is_the_wide_model_and_a_shard(tmp_path):
    shard = 20_000_000
    config = nano(experts=16, hidden_size=512, vocab_size=32768, moe_intermediate_size=1024)
    config.replace(dtype="bfloat16").to_json(tmp_path / "config.json")
    run(NARROW, str(tmp_path / "made"), str(tmp_path / "config.json"), str(shard))
    wide = 2 * parameters(config).total
    assert size_of(tmp_path / "made") < 0.7 * wide
    peak, seconds = run(LOAD + TOLD, str(tmp_path / "made"), "", "{}")
    print(f"narrow load: {wide / 1e9:.3f} GB wide, peak {peak / 1e9:.3f} GB, {seconds:.2f} s")
    assert peak < wide + shard + 20e6


RUN = """
ids = torch.arange(64)[None]
with torch.inference_mode():
    model(input_ids=ids)
"""


@pytest.mark.heavy
def test_the_peak_of_a_model_held_narrow_is_the_file_and_a_layer(tmp_path):
    config = nano(experts=64, hidden_size=512, vocab_size=4096, moe_intermediate_size=1024)
    config.replace(dtype="bfloat16").to_json(tmp_path / "config.json")
    run(NARROW, str(tmp_path / "made"), str(tmp_path / "config.json"), "20000000")
    size = size_of(tmp_path / "made")
    layer = 2 * 2 * 64 * 512 * 1024
    script = "import nemotron_v3.layers.narrow as n; n.AT_ONCE = 2**20\n" + LOAD + RUN + TOLD
    made = str(tmp_path / "made")
    (wide, _), (peak, _) = (run(script, made, "", f"{{'narrow': {n}}}") for n in (False, True))
    # What a forward pass takes beside weights, code that is loaded for it included.
    rest = wide - 2 * parameters(config).total
    told = {"file": size, "layer": layer, "a forward pass of any model": rest, "peak": peak}
    print({name: f"{count / 1e9:.3f} GB" for name, count in told.items()})
    assert peak < size + layer + rest + 20e6


@pytest.mark.heavy
def test_3_gb_of_nanos_layout_load_and_save_with_a_peak_below_the_model_and_a_shard(tmp_path):
    config = nano(experts=128, vocab_size=24576)
    size, peaks = measure(tmp_path, config, "1GB", list(ACTIONS))
    assert size > 3e9
    assert peaks["load"] < size + 1e9
    assert peaks["load in fp32"] < 2 * size + 1e9
    assert peaks["load and save"] < size + 1e9
