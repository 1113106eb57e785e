"""Plans become holds and pulls, and only while agent and workers are in one session."""

from types import SimpleNamespace

import pytest
from baton_connector import protocol
from baton_connector.protocol import Cancel, Content, ContentKeys, Hold, MultimodalItem, Pull
from baton_connector.scheduler import MOST_WAITS, Scheduler
from baton_connector.worker import NEVER, ComputedBlocks
from fake_link import FakeLink

ID = "000000000000000000000000000000a1"
BLOCK = 32
SOURCE = {"engine_id": "p0", "address": "10.0.0.7:7420", "epoch": 9}


def hold_plan(**more):
    return {"baton": {"version": 1, "transfer_id": ID, "action": "hold", "lease_ms": 30000} | more}


def pull_plan(tokens, **more):
    plan = {"version": 1, "transfer_id": ID, "action": "pull", "num_tokens": tokens, "deadline_ms": 10000}
    return {"baton": plan | {"source": SOURCE} | more}


def request(tokens, params, name="r", outputs=0, **more):
    fields = {
        "request_id": name,
        "kv_transfer_params": params,
        "prompt_token_ids": list(range(tokens)),
        "prompt_embeds": None,
        "num_prompt_tokens": tokens,
        "num_tokens": tokens + outputs,
        "num_computed_tokens": 0,
        "num_in_flight_tokens": 0,
        "lora_request": None,
        "cache_salt": None,
        "mm_features": [],
    }
    return SimpleNamespace(**fields | more)


def output(scheduled=(), preempted=(), cached=False):
    """What vLLM hands to the connector: of each request how many tokens the step computes. `cached`: none is new."""
    places = [SimpleNamespace(req_id=r.request_id, num_computed_tokens=r.num_computed_tokens) for r, _ in scheduled]
    tables = {r.request_id: (blocks(r.num_computed_tokens + tokens),) for r, tokens in scheduled}
    return SimpleNamespace(
        scheduled_new_reqs=[] if cached else places,
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[place.req_id for place in places if cached],
            num_computed_tokens=[place.num_computed_tokens for place in places if cached],
        ),
        num_scheduled_tokens={r.request_id: tokens for r, tokens in scheduled},
        preempted_req_ids=set(preempted),
        kv_connector_block_state=SimpleNamespace(get_block_ids=tables.get),
    )


def step(scheduler, *scheduled, preempted=()):
    """A step that computes so many tokens of each request, as vLLM has it: counted when it is under way."""
    new = all(r.num_computed_tokens == 0 for r, _ in scheduled)
    plan = scheduler.take_step(output(scheduled, preempted, cached=not new))
    for r, tokens in scheduled:
        r.num_computed_tokens += tokens
    return plan


def begun(scheduler, tokens, first, name="r", **more):
    """A request with a hold plan, behind its first step, which computes so many tokens."""
    r = request(tokens, hold_plan(), name, **more)
    assert scheduler.matched_tokens(r, 0) == (0, False)
    step(scheduler, (r, first))
    return r


def finish(scheduler, r, normally=True):
    return scheduler.finished(r, blocks(r.num_computed_tokens), normally)


HELD = {"baton": {"transfer_id": ID, "epoch": 5, "num_tokens": 70}}


def blocks(tokens):
    return list(range(100, 100 + -(-tokens // BLOCK)))


@pytest.fixture
def link():
    return FakeLink()


@pytest.fixture
def scheduler(link):
    scheduler = Scheduler(link, 1, BLOCK)
    scheduler.heard({0: link.epoch})
    return scheduler


def test_a_request_without_a_plan_costs_nothing(scheduler, link):
    for params in (None, {}, {"do_remote_prefill": True}):
        r = request(100, params)
        assert scheduler.matched_tokens(r, 0) == (0, False)
        assert scheduler.finished(r, blocks(100), True) == (False, None)
    assert link.sent == []


def test_a_pull_goes_to_the_workers_once(scheduler):
    r = request(100, pull_plan(100))
    assert scheduler.matched_tokens(r, 0) == (100, True)
    # Asking has no effect: the engine may find no room and ask again.
    assert scheduler.matched_tokens(r, 0) == (100, True)
    scheduler.allocated(r, blocks(100), 100)
    (pull,) = step(scheduler).pulls
    assert (pull.request_id, pull.block_ids, pull.deadline_s) == ("r", [100, 101, 102, 103], 10.0)
    (message,) = protocol.FrameReader(protocol.ToAgent).feed(pull.frame)
    assert isinstance(message, Pull)
    assert message.content == Content(protocol.token_bytes(range(100)), ContentKeys())
    assert (message.first_block, message.block_ids) == (0, [100, 101, 102, 103])
    assert (message.source.engine_id, message.source.epoch, message.deadline_ms) == ("p0", 9, 10000)
    assert step(scheduler).pulls == []
    # A failed load comes back with nothing computed: now the engine computes.
    assert scheduler.matched_tokens(r, 0) == (0, False)


def test_what_the_engine_has_is_not_pulled(scheduler):
    r = request(100, pull_plan(100))
    assert scheduler.matched_tokens(r, 64) == (36, True)
    scheduler.allocated(r, blocks(100), 36)
    (pull,) = step(scheduler).pulls
    (message,) = protocol.FrameReader(protocol.ToAgent).feed(pull.frame)
    assert (message.first_block, message.block_ids) == (2, [102, 103])
    assert len(message.content.tokens) == 400


def test_up_to_one_block_is_sooner_computed_than_fetched(scheduler):
    assert scheduler.matched_tokens(request(100, pull_plan(100)), 96) == (0, False)
    assert scheduler.matched_tokens(request(96, pull_plan(96), "s"), 64) == (0, False)
    assert scheduler.matched_tokens(request(97, pull_plan(97), "t"), 64) == (33, True)


def test_the_beginning_of_a_prompt_is_pulled_and_the_rest_left_to_the_engine(scheduler):
    r = request(150, pull_plan(128))
    assert scheduler.matched_tokens(r, 32) == (96, True)
    # As vLLM has it: blocks for what is there then, none yet for the tail.
    scheduler.allocated(r, blocks(128), 96)
    (pull,) = step(scheduler).pulls
    assert pull.block_ids == [101, 102, 103]
    (message,) = protocol.FrameReader(protocol.ToAgent).feed(pull.frame)
    assert message.content == Content(protocol.token_bytes(range(128)), ContentKeys())
    assert (message.first_block, message.block_ids) == (1, [101, 102, 103])
    assert scheduler.matched_tokens(r, 32) == (0, False)


def test_a_beginning_that_the_engine_has_but_for_a_block_is_not_pulled(scheduler):
    assert scheduler.matched_tokens(request(150, pull_plan(128)), 96) == (0, False)
    assert scheduler.matched_tokens(request(150, pull_plan(96), "s"), 128) == (0, False)
    assert scheduler.matched_tokens(request(150, pull_plan(128), "t"), 64) == (64, True)


def test_a_pull_of_another_prompt_is_none(scheduler):
    assert scheduler.matched_tokens(request(100, pull_plan(99)), 0) == (0, False)
    assert scheduler.matched_tokens(request(100, pull_plan(101), "s"), 0) == (0, False)
    assert scheduler.matched_tokens(request(100, pull_plan(128), "v"), 0) == (0, False)
    embeds = request(100, pull_plan(100), "t", prompt_embeds=object())
    assert scheduler.matched_tokens(embeds, 0) == (0, False)
    preempted = request(100, pull_plan(100), "u", outputs=3)
    assert scheduler.matched_tokens(preempted, 0) == (0, False)


def test_a_malformed_plan_is_none_and_one_line(scheduler, caplog):
    r = request(100, pull_plan(100, version=3))
    for _ in range(3):
        assert scheduler.matched_tokens(r, 0) == (0, False)
    assert scheduler.finished(r, blocks(100), True) == (False, None)
    assert sum("kv_transfer_params.baton" in record.message for record in caplog.records) == 1


def test_a_hold_begins_with_the_first_step(scheduler, link):
    lora = SimpleNamespace(lora_name="l")
    item = SimpleNamespace(identifier="i", mm_position=SimpleNamespace(offset=3, length=7))
    r = request(70, hold_plan(), lora_request=lora, cache_salt="s", mm_features=[item])
    assert scheduler.matched_tokens(r, 0) == (0, False)
    # Not before: vLLM may ask many times.
    assert step(scheduler).computed == []
    assert link.sent == []
    step(scheduler, (r, 70))
    keys = ContentKeys(lora="l", salt="s", multimodal=[MultimodalItem("i", 3, 7)])
    assert link.sent == [Hold("r", ID, 30000, Content(protocol.token_bytes(range(70)), keys), [])]


def test_a_prompt_computed_at_once_is_held_with_its_last_block_partly_filled(scheduler, link):
    r = request(70, hold_plan())
    scheduler.matched_tokens(r, 0)
    assert step(scheduler, (r, 70)).computed == [ComputedBlocks("r", 5, 0, [100, 101, 102])]
    assert finish(scheduler, r) == (True, HELD)
    assert [type(message) for message in link.sent] == [Hold]
    assert step(scheduler).holds == ["r"]
    assert step(scheduler).holds == []


def test_a_hold_grows_by_the_blocks_that_each_chunk_completes(scheduler, link):
    r = request(150, hold_plan())
    scheduler.matched_tokens(r, 0)
    assert step(scheduler, (r, 40)).computed == [ComputedBlocks("r", 5, 0, [100])]
    assert step(scheduler, (r, 20)).computed == []
    assert step(scheduler).computed == []
    assert step(scheduler, (r, 60)).computed == [ComputedBlocks("r", 5, 1, [101, 102])]
    assert step(scheduler, (r, 30)).computed == [ComputedBlocks("r", 5, 3, [103, 104])]
    # What is computed behind the prompt is not held.
    r.num_tokens += 1
    assert step(scheduler, (r, 30)).computed == []
    assert finish(scheduler, r)[0]
    assert len(link.sent) == 1


def test_what_is_computed_behind_the_prompt_in_its_last_step_is_not_held(scheduler):
    r = request(64, hold_plan())
    scheduler.matched_tokens(r, 0)
    assert step(scheduler, (r, 100)).computed == [ComputedBlocks("r", 5, 0, [100, 101])]


def test_cached_blocks_are_named_with_those_of_the_first_step(scheduler):
    r = request(150, hold_plan(), num_computed_tokens=64)
    scheduler.matched_tokens(r, 64)
    assert step(scheduler, (r, 40)).computed == [ComputedBlocks("r", 5, 0, [100, 101, 102])]
    assert step(scheduler, (r, 46)).computed == [ComputedBlocks("r", 5, 3, [103, 104])]


def test_a_first_chunk_of_less_than_a_block_begins_the_hold_all_the_same(scheduler, link):
    r = request(70, hold_plan())
    scheduler.matched_tokens(r, 0)
    assert step(scheduler, (r, 20)).computed == [ComputedBlocks("r", 5, 0, [])]
    assert len(link.sent) == 1
    assert step(scheduler, (r, 50)).computed == [ComputedBlocks("r", 5, 0, [100, 101, 102])]
    assert finish(scheduler, r) == (True, HELD)


@pytest.mark.parametrize("computed", [40, 70])
def test_the_hold_of_an_aborted_request_is_cancelled_and_its_blocks_stay_until_released(scheduler, link, computed):
    r = begun(scheduler, 70, computed)
    assert finish(scheduler, r, normally=False) == (True, None)
    assert link.sent[1:] == [Cancel("r")]
    assert step(scheduler).holds == ["r"]


@pytest.mark.parametrize(
    ("computed", "change"),
    [(64, {}), (70, {"num_in_flight_tokens": 1}), (70, {"num_prompt_tokens": 80, "num_computed_tokens": 80})],
    ids=["not computed", "in flight", "another prompt"],
)
def test_a_prompt_that_is_not_computed_to_the_end_is_not_handed_over(scheduler, link, computed, change):
    r = begun(scheduler, 70, computed)
    vars(r).update(change)
    assert finish(scheduler, r) == (True, None)
    assert link.sent[1:] == [Cancel("r")]


def test_a_request_that_never_ran_is_not_held(scheduler, link):
    r = request(70, hold_plan())
    scheduler.matched_tokens(r, 0)
    assert scheduler.finished(r, [], False) == (False, None)
    assert step(scheduler).holds == []
    assert link.sent == []


def test_a_prompt_without_tokens_is_not_held(scheduler, link):
    r = begun(scheduler, 70, 70, prompt_token_ids=None)
    assert finish(scheduler, r) == (False, None)
    assert link.sent == []


def test_a_request_with_a_pull_is_not_held(scheduler, link):
    r = request(70, pull_plan(70))
    scheduler.matched_tokens(r, 0)
    assert step(scheduler, (r, 70)).computed == []
    assert finish(scheduler, r) == (False, None)
    assert link.sent == []


def test_a_hold_too_large_to_send_is_not_made(scheduler, link, monkeypatch, caplog):
    monkeypatch.setattr(protocol, "MAX_MESSAGE", 200)
    r = begun(scheduler, 70, 40)
    assert step(scheduler, (r, 30)).computed == []
    assert finish(scheduler, r) == (False, None)
    assert link.sent == []
    assert sum("over the limit" in record.message for record in caplog.records) == 1


def test_a_preempted_request_is_cancelled_and_never_held_again(scheduler, link):
    r = begun(scheduler, 150, 40)
    r.num_computed_tokens = 0
    plan = step(scheduler, preempted=["r", "stranger"])
    assert (plan.preempted, plan.computed) == (["r"], [])
    assert link.sent[1:] == [Cancel("r")]
    assert scheduler.matched_tokens(r, 0) == (0, False)
    plan = step(scheduler, (r, 150))
    assert (plan.preempted, plan.computed) == ([], [])
    assert finish(scheduler, r) == (False, None)
    assert step(scheduler).holds == []
    assert len(link.sent) == 2


def test_a_request_that_resumes_in_the_step_of_its_preemption_is_not_held(scheduler, link):
    r = begun(scheduler, 150, 40)
    r.num_computed_tokens = 0
    plan = step(scheduler, (r, 40), preempted=["r"])
    assert (plan.preempted, plan.computed) == (["r"], [])


def test_a_request_that_ends_before_the_step_that_tells_of_its_preemption(scheduler, link):
    r = begun(scheduler, 150, 40)
    r.num_computed_tokens = 0
    # Its blocks are gone: vLLM waits for no word about it, but the workers do.
    assert finish(scheduler, r, normally=False) == (False, None)
    plan = step(scheduler, preempted=["r"])
    assert (plan.preempted, plan.holds) == (["r"], [])
    assert link.sent[1:] == [Cancel("r")]


def test_what_is_computed_once_more_is_held_no_longer(scheduler, link):
    r = begun(scheduler, 150, 70)
    r.num_computed_tokens = 32
    plan = step(scheduler, (r, 40))
    assert (plan.preempted, plan.computed) == (["r"], [])
    assert link.sent[1:] == [Cancel("r")]


@pytest.mark.parametrize("epoch", [0, 6])
def test_a_hold_whose_session_ended_is_left_to_the_workers(scheduler, link, epoch):
    r = begun(scheduler, 70, 40)
    link.lose()
    link.epoch = epoch
    step(scheduler, (r, 30))
    # A worker that has not heard of it yet keeps the blocks until it does.
    assert finish(scheduler, r) == (True, None)
    assert step(scheduler).holds == ["r"]
    assert len(link.sent) == 1


def test_a_request_preempted_behind_the_end_of_its_session_is_left_to_the_workers(scheduler, link):
    begun(scheduler, 70, 40)
    link.lose()
    assert step(scheduler, preempted=["r"]).preempted == ["r"]
    assert len(link.sent) == 1


def test_a_hold_does_not_begin_in_the_middle_of_a_prompt(scheduler, link):
    r = request(70, hold_plan())
    scheduler.matched_tokens(r, 0)
    link.lose()
    step(scheduler, (r, 40))
    link.epoch = 5
    assert step(scheduler, (r, 30)).computed == []
    assert finish(scheduler, r) == (False, None)
    assert link.sent == []


def test_without_a_session_nothing_is_held_or_pulled(scheduler, link):
    link.lose()
    assert scheduler.matched_tokens(request(100, pull_plan(100)), 0) == (0, False)
    assert finish(scheduler, begun(scheduler, 70, 70, "s")) == (False, None)


def test_the_first_request_of_a_session_waits_for_the_workers_word(link):
    scheduler = Scheduler(link, 2, BLOCK)
    for plan in (pull_plan(100), hold_plan()):
        scheduler.heard({0: 0, 1: 0})
        r = request(100, plan, name=str(plan))
        assert scheduler.matched_tokens(r, 0) == (None, False)
        assert step(scheduler).believed == {0: 0, 1: 0}
        scheduler.heard({0: 5})
        assert scheduler.matched_tokens(r, 0) == (None, False)
        scheduler.heard({1: 5})
        assert scheduler.matched_tokens(r, 0)[0] is not None
    assert step(scheduler).believed == {0: 5, 1: 5}


def test_workers_that_stay_in_another_session_are_not_waited_for_long(link):
    scheduler = Scheduler(link, 1, BLOCK)
    scheduler.heard({0: 4})
    r = request(100, pull_plan(100))
    for _ in range(MOST_WAITS):
        assert scheduler.matched_tokens(r, 0) == (None, False)
    assert scheduler.matched_tokens(r, 0) == (0, False)
    scheduler.heard({0: 5})
    # The request is on its way to be computed; a late word does not change it back.
    assert scheduler.matched_tokens(r, 0) == (0, False)


def test_workers_that_cannot_share_memory_are_not_waited_for(link):
    scheduler = Scheduler(link, 1, BLOCK)
    scheduler.heard({0: NEVER})
    assert scheduler.matched_tokens(request(100, pull_plan(100)), 0) == (0, False)


def test_aborting_a_request_cancels_its_pull(scheduler, link):
    r = request(100, pull_plan(100))
    scheduler.matched_tokens(r, 0)
    scheduler.allocated(r, blocks(100), 100)
    assert scheduler.finished(r, blocks(100), False) == (False, None)
    assert link.sent == [Cancel("r")]


def test_a_pull_that_is_over_is_not_cancelled(scheduler, link):
    r = request(100, pull_plan(100))
    scheduler.matched_tokens(r, 0)
    scheduler.allocated(r, blocks(100), 100)
    scheduler.received("r")
    assert scheduler.finished(r, blocks(100), True) == (False, None)
    assert link.sent == []


def test_nothing_is_kept_of_finished_requests(scheduler):
    for i in range(10):
        finish(scheduler, begun(scheduler, 70, 40, f"h{i}"), normally=False)
        finish(scheduler, begun(scheduler, 70, 70, f"g{i}"))
    assert (scheduler._requests, scheduler._growing) == ({}, {})
