"""Conversions that are killed or interrupted, and how much memory one takes."""

import os
import shutil
import sys
import warnings

import pytest

from nemotron_v3.checkpoint import CheckpointError, convert, open_checkpoint, save_pretrained
from tests.checkpoint.files import contents
from tests.checkpoint.test_crash import OPERATIONS, fork
from tests.checkpoint.test_memory import MAKE, nano, run, size_of
from tests.models import tiny_model

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

OPTIONS = {"experts": "fused", "prefix": "model.", "max_shard_size": "40KB"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A source, another checkpoint that may stand in the target, and the whole result."""
    root = tmp_path_factory.mktemp("made")
    save_pretrained(tiny_model("ME-"), root / "source")
    save_pretrained(tiny_model("M", seed=1), root / "old")
    convert(root / "source", root / "whole", **OPTIONS)
    return root


def die_at(moment, *arguments, **options):
    count = [0]

    def counted(operation):
        def run(*args, **kwargs):
            count[0] += 1
            if count[0] == moment:
                os._exit(9)
            return operation(*args, **kwargs)

        return run

    for name in OPERATIONS:
        setattr(os, name, counted(getattr(os, name)))
    convert(*arguments, **options)


@needs_fork
@pytest.mark.parametrize("standing", ["nothing", "another checkpoint"])
def test_killed_before_any_of_its_file_operations_it_leaves_nothing_or_all(
    tmp_path, made, monkeypatch, standing
):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    whole, old = contents(made / "whole"), contents(made / "old")
    seen = []
    for moment in range(1, 1000):
        target = tmp_path / str(moment)
        if standing != "nothing":
            shutil.copytree(made / "old", target)
        child = fork(
            lambda at=moment, to=target: die_at(
                at, made / "source", to, overwrite=standing != "nothing", **OPTIONS
            )
        )
        finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        seen.append(what_opens(target, made))
        if seen[-1] is None:
            assert not (target / "config.json").exists()
        if finished:
            assert contents(target) == whole and not list(target.glob(".*"))
            break
        # The next conversion finishes or removes what is left.
        convert(made / "source", target, overwrite=True, **OPTIONS)
        kept = {} if standing == "nothing" else old.keys() - whole.keys() - {"model.safetensors"}
        assert contents(target).keys() == whole.keys() | set(kept)
        assert not list(target.glob(".*"))
        shutil.rmtree(target)
    first = None if standing == "nothing" else "old"
    assert finished and len(seen) > 30
    assert set(seen) == {first, "whole"} and seen == sorted(seen, key=lambda s: s == "whole")


def what_opens(target, made) -> str | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = open_checkpoint(target)
    except CheckpointError:
        return None
    held = contents(checkpoint.directory)
    for side in ("old", "whole"):
        expected = contents(made / side)
        if {name: held.get(name) for name in expected} == expected:
            return side
    raise AssertionError(f"{target} opens, and is neither")


@pytest.mark.parametrize("after", [1, 20, 40])
def test_interrupted_it_leaves_no_trace(tmp_path, made, after):
    count = [0]

    def interrupt(doing, done, total):
        count[0] += 1
        if count[0] == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(made / "source", tmp_path / "new" / "target", **OPTIONS, progress=interrupt)
    assert not (tmp_path / "new" / "target").exists()
    shutil.copytree(made / "old", tmp_path / "old")
    count[0] = 0
    with pytest.raises(KeyboardInterrupt):
        convert(made / "source", tmp_path / "old", **OPTIONS, overwrite=True, progress=interrupt)
    assert contents(tmp_path / "old") == contents(made / "old")
    assert not list((tmp_path / "old").glob(".*"))


CONVERT = """
from nemotron_v3.checkpoint import convert
made, out = sys.argv[1:]
convert(made, out + "/stacked", experts="fused", prefix="model.")
convert(out + "/stacked", out + "/apart", experts="per_expert", dtype=torch.float32)
convert(made, out + "/merged", max_shard_size="30MB", adapter=out + "/adapter")
print(json.dumps([peak() - before]))
"""
ADAPTER = """
from pathlib import Path
from safetensors.torch import save_file
out = Path(sys.argv[1])
out.mkdir()
D = int(sys.argv[2])
name = "base_model.model.model.layers.0.mixer.out_proj"
save_file(
    {f"{name}.lora_A.weight": torch.randn(8, 4096), f"{name}.lora_B.weight": torch.randn(D, 8)},
    out / "adapter_model.safetensors",
)
settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
(out / "adapter_config.json").write_text(json.dumps(settings))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_below_the_largest_tensor(tmp_path):
    """0.28 GB, of which a tensor takes at most 84 MB: stacked and split, cast, merged."""
    config = nano(experts=32, hidden_size=512, vocab_size=81920, moe_intermediate_size=1024)
    config.to_json(tmp_path / "config.json")
    run(MAKE, str(tmp_path / "made"), str(tmp_path / "config.json"), "100MB")
    run(ADAPTER, str(tmp_path / "adapter"), "512")
    size, largest = size_of(tmp_path / "made"), 2 * 81920 * 512
    assert size > 250e6
    (peak,) = run(CONVERT, str(tmp_path / "made"), str(tmp_path))
    print(f"{size / 1e9:.3f} GB, largest tensor {largest / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB")
    assert peak < largest
    assert size_of(tmp_path / "apart") > 1.9 * size
    assert size_of(tmp_path / "stacked") < 1.01 * size < 1.02 * size_of(tmp_path / "merged")
