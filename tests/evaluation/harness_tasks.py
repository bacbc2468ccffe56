"""A checkpoint and local tasks of lm-evaluation-harness, one of each kind of request."""

import json
from pathlib import Path

from tests.adapters.tiny import byte_tokenizer, transformers_model

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CHOICES = ["a red one", "a blue one", "a green one", "none of them"]

QUESTIONS = """\
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
fewshot_config: {{sampler: first_n}}
num_fewshot: 5
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
ROLLING = """\
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{story}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
metadata: {{version: 1.0}}
"""
ANSWERS = """\
task: local_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
output_type: generate_until
test_split: test
fewshot_split: test
fewshot_config: {{sampler: first_n}}
num_fewshot: 2
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: {until}, max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def write_tasks(folder: Path, questions: int, until: list[str]) -> Path:
    """Three tasks on the same questions."""
    with (folder / "questions.jsonl").open("w") as file:
        for number in range(questions):
            row = {
                "question": f"which of the {number + 3} cars is number {7 * number % 10}?",
                "choices": CHOICES,
                "answer": number % 4,
                "story": f"There were {number} cars. " * (1 + number % 5),
            }
            file.write(json.dumps(row) + "\n")
    for name, text in (("choices", QUESTIONS), ("rolling", ROLLING), ("answers", ANSWERS)):
        written = text.format(folder=folder, until=json.dumps(until))
        (folder / f"{name}.yaml").write_text(written)
    return folder


def write_checkpoint(folder: Path) -> Path:
    """A transformers model that follows the same equations, with a tokenizer and a template."""
    model, tokenizer = transformers_model(seed=3), byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
