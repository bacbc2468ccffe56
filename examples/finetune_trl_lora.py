"""Fine-tune with TRL: LoRA on every projection, out_proj included, and packed documents.

    python examples/finetune_trl_lora.py                          # a tiny model, made here
    python examples/finetune_trl_lora.py --model PATH --out DIR   # a checkpoint of yours

DIR/adapter loads in PEFT; DIR/merged is a checkpoint of its own.
"""

from pathlib import Path

import torch
import tyro
from datasets import Dataset
from rich import print
from tiny import write_tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from nemotron_v3 import hf
from nemotron_v3.adapters import coverage
from nemotron_v3.checkpoint import convert
from nemotron_v3.hf.peft import add_lora, lora_config

TEXTS = [f"{a} plus {b} is {a + b}." for a in range(20) for b in range(20)]


def main(model: str | None = None, out: Path = Path("runs/sft"), steps: int = 60) -> None:
    path = model or write_tiny_checkpoint(out / "base")
    tokenizer = AutoTokenizer.from_pretrained(path)
    loaded = hf.accelerate(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    adapted = add_lora(loaded, lora_config(loaded, r=16))
    print(coverage(adapted))

    trainer = SFTTrainer(
        adapted,
        SFTConfig(
            output_dir=str(out / "trainer"),
            max_steps=steps,
            learning_rate=1e-2,
            per_device_train_batch_size=4,
            packing=True,  # documents share a row and never see each other
            max_length=128,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=Dataset.from_list([{"text": text} for text in TEXTS]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(out / "adapter"))

    merged = convert(path, out / "merged", adapter=out / "adapter", overwrite=True)
    print(f"merged {merged.merged} tensors into {out / 'merged'}")
    prompt = tokenizer("7 plus 8 is", return_tensors="pt")
    written = adapted.eval().generate(**prompt, max_new_tokens=5, do_sample=False)
    print(tokenizer.decode(written[0]))


if __name__ == "__main__":
    tyro.cli(main)
