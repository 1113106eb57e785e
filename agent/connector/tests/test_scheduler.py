"""Plans become holds and pulls, and only while agent and workers are in one session."""

from types import SimpleNamespace

import pytest
from baton_connector import protocol
from baton_connector.protocol import Cancel, Content, ContentKeys, Hold, MultimodalItem, Pull
from baton_connector.scheduler import MOST_WAITS, Scheduler
from baton_connector.worker import NEVER, WantedHold
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


def finished(tokens, params, **more):
    return request(tokens, params, **{"outputs": 1, "num_computed_tokens": tokens} | more)


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
    (pull,) = scheduler.take_step().pulls
    assert (pull.request_id, pull.block_ids, pull.deadline_s) == ("r", [100, 101, 102, 103], 10.0)
    (message,) = protocol.FrameReader(protocol.ToAgent).feed(pull.frame)
    assert isinstance(message, Pull)
    assert message.content == Content(protocol.token_bytes(range(100)), ContentKeys())
    assert (message.first_block, message.block_ids) == (0, [100, 101, 102, 103])
    assert (message.source.engine_id, message.source.epoch, message.deadline_ms) == ("p0", 9, 10000)
    assert scheduler.take_step().pulls == []
    # A failed load comes back with nothing computed: now the engine computes.
    assert scheduler.matched_tokens(r, 0) == (0, False)


def test_what_the_engine_has_is_not_pulled(scheduler):
    r = request(100, pull_plan(100))
    assert scheduler.matched_tokens(r, 64) == (36, True)
    scheduler.allocated(r, blocks(100), 36)
    (pull,) = scheduler.take_step().pulls
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
    (pull,) = scheduler.take_step().pulls
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


def test_a_finished_request_is_held(scheduler, link):
    lora = SimpleNamespace(lora_name="l")
    item = SimpleNamespace(identifier="i", mm_position=SimpleNamespace(offset=3, length=7))
    r = finished(70, hold_plan(), lora_request=lora, cache_salt="s", mm_features=[item])
    assert scheduler.matched_tokens(r, 0) == (0, False)
    held, params = scheduler.finished(r, blocks(71), True)
    assert (held, params) == (True, {"baton": {"transfer_id": ID, "epoch": 5, "num_tokens": 70}})
    keys = ContentKeys(lora="l", salt="s", multimodal=[MultimodalItem("i", 3, 7)])
    content = Content(protocol.token_bytes(range(70)), keys)
    assert link.sent == [Hold("r", ID, 30000, content, [100, 101, 102])]
    assert scheduler.take_step().holds == [WantedHold("r", 5)]
    assert scheduler.take_step().holds == []


def test_blocks_behind_the_prompt_are_not_held(scheduler, link):
    r = finished(64, hold_plan())
    assert scheduler.finished(r, [1, 2, 3, 4], True)[0]
    assert link.sent[0].block_ids == [1, 2]


@pytest.mark.parametrize(
    ("r", "ids", "normally"),
    [
        (finished(70, hold_plan()), blocks(70), False),
        (finished(70, hold_plan(), num_computed_tokens=64), blocks(70), True),
        (finished(70, hold_plan(), num_computed_tokens=71, num_in_flight_tokens=2), blocks(70), True),
        (finished(70, hold_plan()), [], True),
        (finished(70, hold_plan(), prompt_token_ids=None), blocks(70), True),
        (finished(70, pull_plan(70)), blocks(70), True),
    ],
    ids=["aborted", "not computed", "in flight", "blocks gone", "no tokens", "pulled"],
)
def test_what_is_not_held(scheduler, link, r, ids, normally):
    assert scheduler.finished(r, ids, normally) == (False, None)
    assert link.sent == []
    assert scheduler.take_step().holds == []


def test_without_a_session_nothing_is_held_or_pulled(scheduler, link):
    link.lose()
    assert scheduler.matched_tokens(request(100, pull_plan(100)), 0) == (0, False)
    assert scheduler.finished(finished(70, hold_plan(), name="s"), blocks(70), True) == (False, None)


def test_the_first_request_of_a_session_waits_for_the_workers_word(link):
    scheduler = Scheduler(link, 2, BLOCK)
    for plan in (pull_plan(100), hold_plan()):
        scheduler.heard({0: 0, 1: 0})
        r = request(100, plan, name=str(plan))
        assert scheduler.matched_tokens(r, 0) == (None, False)
        assert scheduler.take_step().believed == {0: 0, 1: 0}
        scheduler.heard({0: 5})
        assert scheduler.matched_tokens(r, 0) == (None, False)
        scheduler.heard({1: 5})
        assert scheduler.matched_tokens(r, 0)[0] is not None
    assert scheduler.take_step().believed == {0: 5, 1: 5}


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
        r = finished(70, hold_plan(), name=f"h{i}")
        scheduler.matched_tokens(r, 0)
        scheduler.finished(r, blocks(70), True)
    assert scheduler._requests == {}
