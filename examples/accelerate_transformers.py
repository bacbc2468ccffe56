"""One line in a transformers script: the same weights and outputs, computed by nemotron_v3.

python examples/accelerate_transformers.py                # a tiny model, made here
python examples/accelerate_transformers.py --model PATH   # a checkpoint of yours
"""

import tempfile
import time

import torch
import tyro
from rich import print
from tiny import write_tiny_checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemotron_v3 import hf


def main(model: str | None = None, tokens: int = 512, steps: int = 3) -> None:
    path = model or write_tiny_checkpoint(tempfile.mkdtemp())
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    ids = torch.randint(2, plain.config.vocab_size, (2, tokens))
    before = look(plain, ids, steps)

    hf.accelerate(plain)  # the one line; hf.undo(plain) takes it back

    after = look(plain, ids, steps)
    far = (after["logits"] - before["logits"]).abs().max() / before["logits"].abs().max()
    print(f"largest difference of a logit: {far:.1e} of the largest logit")
    print(f"greedy tokens equal: {torch.equal(before['greedy'], after['greedy'])}")
    seconds = before["seconds"], after["seconds"]
    print(f"a training step: {seconds[0]:.3f} s before, {seconds[1]:.3f} s after")


def look(model: PreTrainedModel, ids: torch.Tensor, steps: int) -> dict:
    """Logits, 20 greedy tokens, and the best time of a training step."""
    model.eval()
    with torch.no_grad():
        logits = model(ids).logits
        greedy = model.generate(ids[:, :16], max_new_tokens=20, do_sample=False)
    model.train()
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        times.append(time.perf_counter() - started)
        model.zero_grad()
    return {"logits": logits, "greedy": greedy, "seconds": min(times)}


if __name__ == "__main__":
    tyro.cli(main)
