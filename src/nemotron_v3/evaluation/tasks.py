"""Tasks of lm-evaluation-harness, and its figures as this package keeps them."""

import contextlib
import difflib
import math
from typing import TYPE_CHECKING, Any

from nemotron_v3.chat import ChatTemplate
from nemotron_v3.chat.template import template_folder
from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.evaluation.options import Candidate, TaskOptions
from nemotron_v3.evaluation.result import CheckpointResult, TaskMetric
from nemotron_v3.evaluation.texts import Circumstances, Interrupted
from nemotron_v3.model.model import NemotronV3ForCausalLM

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def open_tasks(options: TaskOptions) -> "TaskManager":
    """The harness's list of tasks, in which those that are asked for can be read.

    Raises:
        ValueError: the harness is not installed; a task that it does not know, or cannot read.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(
            f"tasks need lm-evaluation-harness ({error}): pip install 'nemotron-v3[eval]'"
        ) from None
    folder, names = options.include_path, list(options.names)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"include_path {folder} is no folder")
    if folder is not None:
        # Listing the harness's own tasks takes ten seconds: only where they are needed.
        alone = TaskManager(include_path=folder, include_defaults=False)
        with contextlib.suppress(Exception):  # definitions may build on the harness's own
            if all(alone.match_tasks([name]) for name in names):
                alone.load(names)
                return alone
    manager = TaskManager(include_path=folder)
    for name in names:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            told = f"; the nearest are {', '.join(near)}" if near else ""
            raise ValueError(f"the harness has no task {name!r}{told}")
    try:
        manager.load(names)
    except Exception as error:  # whatever a task's own code, or the loading of its data, raises
        told = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"the tasks {', '.join(names)} cannot be read: {told}") from error
    return manager


def run_tasks(
    model: NemotronV3ForCausalLM,
    candidate: Candidate,
    options: TaskOptions,
    manager: "TaskManager",
    window: int,
    result: CheckpointResult,
    number: int,
    around: Circumstances,
) -> None:
    """Put the figures of the tasks into a checkpoint's result, on the first process.

    Args:
        model: of the candidate.
        candidate: whose tokenizer and chat template are taken.
        options: the tasks.
        manager: what `open_tasks` gives.
        window: tokens of a pass.
        result: of the checkpoint.
        number: of the checkpoint in the evaluation.
        around: processes and journal.

    Raises:
        Interrupted: it was to end; what was answered is in the journal.
        ValueError: requests that cannot be obeyed.
    """
    from lm_eval.evaluator import simple_evaluate

    from nemotron_v3.evaluation.harness import NemotronV3LM

    def go_on() -> None:
        if around.stopped():
            raise Interrupted

    tokenizer = PretrainedTokenizer.load(candidate.path)
    template = None
    if options.chat_template:
        folder = template_folder(candidate.path, candidate.adapter)
        template = ChatTemplate.load(folder).with_special_tokens(tokenizer.special_tokens)
    harness_model = NemotronV3LM(
        model,
        tokenizer,
        folder=candidate.path,
        template=template,
        window=window,
        batch_size=options.batch_size,
        world=around.world,
        before_pass=go_on,
        tell=lambda kind, done, total: around.tell(f"{result.name}: {kind}", done, total),
    )
    limit = options.limit
    found = simple_evaluate(
        harness_model,
        tasks=list(options.names),
        num_fewshot=options.fewshot,
        limit=int(limit) if limit is not None and limit >= 1 else limit,
        system_instruction=options.system,
        apply_chat_template=options.chat_template,
        fewshot_as_multiturn=options.fewshot_as_multiturn,
        fewshot_random_seed=options.seed,
        use_cache=around.journal.answers(number),
        task_manager=manager,
        log_samples=False,
    )
    answers = harness_model.cache_hook.dbdict
    if answers is not None:
        answers.close()
    counts = around.world.gather([harness_model.asked, harness_model.computed])
    result.tokens_asked, result.tokens_computed = (sum(each) for each in zip(*counts, strict=True))
    if found is not None:
        result.tasks = task_metrics(found)


def task_metrics(found: Any) -> list[TaskMetric]:
    """The figures of what `simple_evaluate` gives, those of groups behind those of tasks."""
    made = []
    groups = found.get("groups", {})
    for task, values in [*found["results"].items(), *groups.items()]:
        is_group = task in groups
        if is_group and values is not groups[task]:
            continue  # the harness names a group among its tasks too
        better = found.get("higher_is_better", {}).get(task) or {}
        samples = found.get("n-samples", {}).get(task, {}).get("effective")
        version = found.get("versions", {}).get(task)
        for key, value in values.items():
            name, comma, filter_name = key.partition(",")
            if not comma or name.endswith("_stderr"):
                continue
            made.append(
                TaskMetric(
                    task=task,
                    name=name,
                    filter=filter_name,
                    value=_number(value),
                    stderr=_number(values.get(f"{name}_stderr,{filter_name}")),
                    higher_is_better=better.get(name),
                    samples=None if is_group else samples,
                    fewshot=None if is_group else found.get("n-shot", {}).get(task),
                    task_version=None if version is None else str(version),
                )
            )
    return made


def _number(value: Any) -> float | None:
    """The harness writes `N/A` where it has none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None
