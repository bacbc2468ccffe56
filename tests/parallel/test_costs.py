"""What `inspect --plan` tells of a plan: what is known of Nano-30B, and what processes do."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from nemotron_v3.cli import main as cli
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.parallel import Plan, collectives, parallelize
from nemotron_v3.parallel.costs import (
    gathered_keys,
    mixer_bytes,
    plan_costs,
)
from tests.models import tiny_model
from tests.parallel.heads import all_to_all_over_heads
from tests.parallel.processes import run

ROOT = Path(__file__).parents[2]
NANO = "nemotron-3-nano-30b"


def test_nano_on_two_gpus():
    """44 MB of tokens each way and layer; 31.58 B parameters, half of them on each GPU."""
    config = NemotronV3Config.preset(NANO)
    costs = plan_costs(config, Plan(ep=2).over(2), tokens=8192)
    one_way = 8192 * 2688 * 2
    assert costs.experts == 23 * 4 * one_way
    assert costs.embeddings == 2 * one_way
    assert costs.weights == pytest.approx(31.578e9, rel=1e-3) == costs.gradients
    assert costs.moments == pytest.approx(4 * costs.weights, rel=1e-6)
    whole = plan_costs(config, Plan().over(2), tokens=8192)
    assert whole.experts == 0 and whole.dense > 15 * costs.dense
    with pytest.raises(ValueError, match="ep = 3 does not divide the 128 experts"):
        plan_costs(config, Plan(ep=3).over(3), tokens=1)


def test_weights_that_stay_gathered_travel_once_less(monkeypatch):
    """Two processes: each sends half of what is gathered, for the weights and for the sums."""
    config = NemotronV3Config.preset(NANO)
    kept = plan_costs(config, Plan(ep=2).over(2), tokens=8192)
    assert kept.dense == pytest.approx(kept.gathered, rel=1e-5)  # but for the final norm
    monkeypatch.setattr("nemotron_v3.parallel.costs.KEPT_BYTES", 0)
    again = plan_costs(config, Plan(ep=2).over(2), tokens=8192)
    head = 2 * config.vocab_size * config.hidden_size  # which stays in either case
    assert again.dense - kept.dense == pytest.approx((kept.gathered - head) / 2, rel=1e-5)


def test_the_table_of_what_a_layer_sends_is_counted():
    """Of the page about long sequences: MB of Nano in bf16, forward and backward."""
    config, page = NemotronV3Config.preset(NANO), ROOT / "docs" / "long-sequences.md"
    found = re.findall(r"^\| (\d) \| ([\d ]+) \|(.+)\|$", page.read_text(), re.MULTILINE)
    assert len(found) == 6
    for processes, tokens, numbers in found:
        R, T = int(processes), int(tokens.replace(" ", ""))
        states = mixer_bytes(config, 2)
        counted = (
            states.sent(R, 1),
            states.sent(R, 2),
            all_to_all_over_heads(config, T, 2, R),
            2 * gathered_keys(config, T, R),
        )
        assert [float(n) for n in numbers.split("|")] == [round(n / 1e6, 1) for n in counted]


def told(capsys, *args: str) -> str:
    cli.main(["inspect", NANO, *args])
    text = capsys.readouterr()
    return text.out or text.err


def test_inspect_tells_of_a_plan(capsys):
    plan = json.loads(told(capsys, "--plan", "gpus=2,ep=2", "--json"))["plan"]
    assert plan["ep"] == plan["gpus"] == 2 and plan["experts_bytes"] == 23 * 4 * 4096 * 2688 * 2
    assert "left for activations" in told(capsys, "--plan", "gpus=8,ep=8", "--device", "h200")
    shared = json.loads(told(capsys, "--plan", "gpus=8,ep=8,cp=4", "--json"))["plan"]
    states = mixer_bytes(NemotronV3Config.preset(NANO), 2)
    assert shared["mixers_bytes"] == 23 * states.sent(4, 1) and shared["cp"] == 4
    assert shared["attention_bytes"] == 6 * 2 * 3 * 4096 * 1024 > plan["attention_bytes"] == 0
    assert "whatever the tokens" in told(capsys, "--plan", "gpus=8,cp=4")
    for text, why in (
        ("gpus=8,cp=3", "cp = 3 times dp_replicate = 1 does not divide the 8 processes"),
        ("ep=2", "give gpus"),
        ("gpus=2,tp=2", "give gpus"),
        ("gpus=two", "every size is an integer"),
        ("gpus=6,ep=4", "ep = 4 does not divide dp_shard = 6"),
    ):
        assert why in told(capsys, "--plan", text)


def as_counted(rank: int) -> None:
    """Bytes that a process holds, and sends for tokens, in a forward and a backward pass."""
    model = tiny_model("ME*E", moe_latent_size=28, vocab_size=96)
    T, sent = 24, []
    costs = plan_costs(model.config, Plan(ep=2).over(2), tokens=T, dtype=torch.float32)
    parallelize(model, Plan(ep=2))
    held = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in model.parameters())
    # The router's bias is a buffer here, and a process may have a row more than another.
    assert held == pytest.approx(costs.weights, rel=0.01)
    send = collectives._UnderWay.send

    def counting(self, x, exchange):
        out = send(self, x, exchange)
        sent.append((x.shape[1:], out.nbytes // 2))  # the other half stays here
        return out

    collectives._UnderWay.send = counting
    ids = torch.arange(T)
    model(ids, labels=ids).loss.backward()
    collectives._UnderWay.send = send
    # The gradients of embeddings are gathered as their rows were sent.
    by_width = {width: sum(b for shape, b in sent if shape == (width,)) for width in (28, 48)}
    assert by_width == {28: costs.experts, 48: costs.embeddings}


@pytest.mark.integration
def test_processes_hold_and_send_what_is_counted():
    run([as_counted], 2)
