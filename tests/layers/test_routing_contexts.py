"""Recording and replaying belong to who asks: threads, tasks and generators beside each other."""

import asyncio
import contextvars
import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nemotron_v3.layers import record_routing, replay_routing
from nemotron_v3.layers.moe.router import routers
from tests.models import tiny_model, tokens

MODEL = tiny_model().requires_grad_(False)
MINE, OTHER = tokens(1, 9), tokens(1, 12, seed=1)
FREE = {"mine": MODEL(MINE).logits, "other": MODEL(OTHER).logits}


def shifted(model=MODEL):
    """Where another bias sends the tokens of MINE: a record that changes the logits."""
    other = copy.deepcopy(model)
    for router in routers(other).values():
        router.e_score_correction_bias.add_(
            torch.randn(8, generator=torch.Generator().manual_seed(3))
        )
    with record_routing(other) as record:
        other(MINE)
    return record


RECORD = shifted()
with replay_routing(MODEL, RECORD):
    FORCED = MODEL(MINE).logits
assert not torch.equal(FORCED, FREE["mine"])


def in_thread(run):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def calls(record) -> set[int]:
    return {len(each) for each in record.indices.values()}


def test_a_thread_beside_a_record_is_not_recorded():
    with record_routing(MODEL) as record:
        assert torch.equal(in_thread(lambda: MODEL(OTHER).logits), FREE["other"])
        MODEL(MINE)
    assert calls(record) == {1}
    assert all(len(each[0]) == 9 for each in record.indices.values())


def test_a_thread_beside_a_replay_routes_as_always_and_uses_no_call_up():
    with replay_routing(MODEL, RECORD):
        assert torch.equal(in_thread(lambda: MODEL(MINE).logits), FREE["mine"])
        assert torch.equal(MODEL(MINE).logits, FORCED)
    assert torch.equal(MODEL(MINE).logits, FREE["mine"])


def test_two_threads_record_and_replay_at_once():
    meet = threading.Barrier(2, timeout=30)

    def record():
        with record_routing(MODEL) as record:
            meet.wait()
            MODEL(OTHER)
            meet.wait()
        return record

    def replay():
        with replay_routing(MODEL, RECORD):
            meet.wait()
            logits = MODEL(MINE).logits
            meet.wait()
        return logits

    with ThreadPoolExecutor(2) as pool:
        recorded, logits = pool.submit(record), pool.submit(replay)
        assert torch.equal(logits.result(), FORCED)
        assert calls(recorded.result()) == {1}
        assert all(len(each[0]) == 12 for each in recorded.result().indices.values())


def test_two_threads_replay_different_records_at_once():
    with record_routing(MODEL) as free:
        MODEL(MINE)
    meet = threading.Barrier(2, timeout=30)

    def replay(record):
        with replay_routing(MODEL, record):
            meet.wait()
            logits = MODEL(MINE).logits
            meet.wait()
        return logits

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(replay, [RECORD, free])
    assert torch.equal(first, FORCED) and torch.equal(second, FREE["mine"])


def test_a_pool_that_was_started_inside_is_another_caller_and_a_copied_context_is_not():
    with replay_routing(MODEL, RECORD), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: MODEL(MINE).logits).result(), FREE["mine"])
        here = contextvars.copy_context()
        inside = pool.submit(here.run, lambda: MODEL(MINE).logits).result()
        assert torch.equal(inside, FORCED)
    outside = here.run(lambda: MODEL(MINE).logits)  # the copy outlives the replay, which is over
    assert torch.equal(outside, FREE["mine"])


def test_async_tasks_beside_each_other():
    async def replaying(ready, go):
        with replay_routing(MODEL, RECORD):
            ready.set()
            await go.wait()
            return MODEL(MINE).logits

    async def serving(ready, go):
        await ready.wait()
        logits = MODEL(MINE).logits
        go.set()
        return logits

    async def both():
        ready, go = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(replaying(ready, go), serving(ready, go))

    forced, free = asyncio.run(both())
    assert torch.equal(forced, FORCED) and torch.equal(free, FREE["mine"])


def test_a_task_that_is_made_inside_is_inside_as_long_as_that_lasts():
    async def story():
        early, over = asyncio.Event(), asyncio.Event()

        async def late():
            first = await asyncio.to_thread(lambda: MODEL(MINE).logits)
            early.set()
            await over.wait()
            return first, MODEL(MINE).logits

        with replay_routing(MODEL, RECORD):
            task = asyncio.create_task(late())
            await early.wait()
        over.set()
        return await task

    forced, free = asyncio.run(story())
    assert torch.equal(forced, FORCED) and torch.equal(free, FREE["mine"])


def router_scopes():
    return [each for router in routers(MODEL).values() for each in router.scoped]


def test_a_record_inside_a_replay_and_a_record_inside_a_record():
    with (
        record_routing(MODEL) as outer,
        replay_routing(MODEL, RECORD),
        record_routing(MODEL) as inner,
    ):
        MODEL(MINE)
    for record in (outer, inner):
        pairs = ((record.indices[n][0], RECORD.indices[n][0]) for n in record.indices)
        assert all(torch.equal(*pair) for pair in pairs)


def test_a_replay_inside_a_replay_is_refused_and_leaves_the_outer_one():
    with replay_routing(MODEL, RECORD):
        again = replay_routing(MODEL, RECORD)
        with pytest.raises(ValueError, match="is being replayed already"), again:
            pass
        assert torch.equal(MODEL(MINE).logits, FORCED)


def generator(manager):
    with manager:
        yield MODEL(MINE).logits
        yield None


def test_generators_that_are_left_early_in_any_order_and_any_thread():
    with record_routing(MODEL) as record:
        first = generator(replay_routing(MODEL, RECORD))
        assert torch.equal(next(first), FORCED)
        first.close()  # entered after the record, left before it
        assert torch.equal(MODEL(MINE).logits, FREE["mine"])
    assert calls(record) == {2}
    one = generator(replay_routing(MODEL, RECORD))
    next(one)
    in_thread(one.close)  # as the collector may
    assert torch.equal(MODEL(MINE).logits, FREE["mine"])
    two = generator(record_routing(MODEL))
    next(two)
    del two
    gc.collect()
    assert router_scopes() == [] and not any(r.observed for r in routers(MODEL).values())


def test_scopes_that_overlap_instead_of_nesting():
    first, second = record_routing(MODEL), record_routing(MODEL)
    one, two = first.__enter__(), second.__enter__()
    MODEL(MINE)
    first.__exit__(None, None, None)
    MODEL(MINE)
    second.__exit__(None, None, None)
    MODEL(MINE)
    assert calls(one) == {1} and calls(two) == {2}
    assert router_scopes() == []


def test_an_error_inside_ends_the_replay_for_all():
    with pytest.raises(KeyError), replay_routing(MODEL, RECORD):
        raise KeyError
    assert router_scopes() == [] and torch.equal(MODEL(MINE).logits, FREE["mine"])


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_checkpoint_recomputes_what_was_forced_in_whatever_thread(left, elsewhere):
    """Autograd runs a GPU's backward pass in a thread that has nobody's context."""
    gradients = []
    for checkpointed in (False, True):
        model = tiny_model()
        if checkpointed:
            model.gradient_checkpointing_enable()
        with replay_routing(model, RECORD):
            loss = model(MINE, labels=MINE).loss
            if not left:
                (in_thread if elsewhere else lambda run: run())(loss.backward)
        if left:
            (in_thread if elsewhere else lambda run: run())(loss.backward)
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_a_recomputation_of_another_caller_is_neither_recorded_nor_forced():
    expected = tiny_model()
    expected(MINE, labels=MINE).loss.backward()
    model = tiny_model()
    model.gradient_checkpointing_enable()
    loss = model(MINE, labels=MINE).loss
    with record_routing(model) as record:
        loss.backward()
        in_thread(lambda: model(OTHER, labels=OTHER).loss.backward())
    assert calls(record) == {0}
    model.zero_grad()
    with replay_routing(model, RECORD):
        in_thread(lambda: model(MINE, labels=MINE).loss.backward())
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_generate_beside_a_replay():
    options = {"max_new_tokens": 3, "eos_token_id": []}
    expected = MODEL.generate(MINE, **options).new_tokens
    with replay_routing(MODEL, RECORD):
        assert in_thread(lambda: MODEL.generate(MINE, **options)).new_tokens == expected
        assert torch.equal(MODEL(MINE).logits, FORCED)


def test_what_was_recorded_in_inference_mode_is_ordinary():
    with record_routing(MODEL) as record, torch.inference_mode():
        MODEL(MINE)
    assert not any(t.is_inference() for each in record.indices.values() for t in each)


def test_a_compiled_model_is_recorded_for_its_caller_alone():
    """A compiler leaves its graph to ask who calls; the portable experts do that anyhow."""
    torch._dynamo.reset()
    router = copy.deepcopy(next(iter(routers(MODEL).values())))
    compiled = torch.compile(router, backend="eager")
    x = torch.randn(5, 48)
    expected = router(x)[1]
    with record_routing(router) as record:
        compiled(x)
        in_thread(lambda: compiled(x))
    assert [len(each) for each in record.indices.values()] == [1]
    forced = expected.flip(0)
    with replay_routing(router, {"": [forced]}):
        assert torch.equal(in_thread(lambda: compiled(x))[1], expected)
        assert torch.equal(compiled(x)[1], forced)
    assert torch.equal(compiled(x)[1], expected)
