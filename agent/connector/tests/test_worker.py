"""Each pull and each hold is reported to the engine exactly once, whatever the agent does."""

import random

import pytest
from baton_connector import protocol
from baton_connector import worker as worker_module
from baton_connector.link import LOST
from baton_connector.protocol import Cancel, Computed, PullDone, Released, Welcome
from baton_connector.worker import NEVER, ComputedBlocks, Done, WantedPull, Worker
from fake_link import FakeLink


def pull(name, *blocks):
    return WantedPull(name, protocol.frame(Cancel(name)), list(blocks), 1.0)


def blocks(name, first, *ids, epoch=5):
    return ComputedBlocks(name, epoch, first, list(ids))


@pytest.fixture
def link():
    return FakeLink()


@pytest.fixture
def worker(link):
    return Worker(link)


def step(worker, pulls=(), holds=(), computed=()):
    worker.begin_step(pulls, holds, computed)
    worker.say_computed()
    return worker.end_step()


def test_a_pull_that_went_well(worker, link):
    assert step(worker, [pull("r", 3, 4)]) == Done()
    assert worker.waits
    assert link.sent == [Cancel("r")]
    link.come(PullDone("r", [], ""))
    assert step(worker) == Done(received={"r"})
    assert step(worker) == Done()
    assert not worker.waits


def test_failed_blocks_are_named_in_the_same_step(worker, link):
    step(worker, [pull("r", 3, 4, 5)])
    link.come(PullDone("r", [4], "corrupt"))
    assert step(worker) == Done(received={"r"}, bad_blocks={4})


@pytest.mark.parametrize("answer", [PullDone("r", [], "no route"), PullDone("r", [9], "odd")])
def test_where_the_agent_does_not_say_which_blocks_all_are_bad(worker, link, answer):
    step(worker, [pull("r", 3, 4)])
    link.come(answer)
    assert step(worker) == Done(received={"r"}, bad_blocks={3, 4})


def test_without_an_agent_a_pull_fails_at_once(worker, link):
    link.epoch = 0
    assert step(worker, [pull("r", 3)]) == Done(received={"r"}, bad_blocks={3})
    passive = Worker(None)
    assert passive.epoch == NEVER
    assert step(passive, [pull("r", 3)], computed=[blocks("h", 0, 3)]) == Done(received={"r"}, bad_blocks={3})
    assert step(passive, holds=["h"]) == Done(sent={"h"})


def test_a_pull_too_large_to_send_fails(worker):
    assert step(worker, [WantedPull("r", b"", [1], 1.0)]) == Done(received={"r"}, bad_blocks={1})


def test_blocks_are_named_behind_the_pass_that_computes_them(worker, link):
    worker.begin_step([], [], [blocks("h", 0, 3, 4)])
    assert link.sent == []
    worker.say_computed()
    assert link.sent == [Computed("h", 0, [3, 4])]
    assert step(worker, computed=[blocks("h", 2, 9)]) == Done()
    assert step(worker) == Done()
    assert link.sent[1:] == [Computed("h", 2, [9])]


def test_a_hold_without_blocks_yet_is_begun_and_nothing_said(worker, link):
    step(worker, computed=[blocks("h", 0)])
    assert link.sent == []
    assert step(worker, holds=["h"]) == Done()
    link.come(Released(["h"]))
    assert step(worker) == Done(sent={"h"})


def test_a_hold_ends_with_its_release(worker, link):
    step(worker, computed=[blocks("h", 0, 3)])
    assert step(worker, holds=["h"]) == Done()
    link.come(Released(["h", "unknown"]))
    assert step(worker) == Done(sent={"h"})
    link.come(Released(["h"]))
    assert step(worker) == Done()


def test_a_release_before_the_request_is_over_waits_for_its_end(worker, link):
    step(worker, computed=[blocks("h", 0, 3)])
    link.come(Released(["h"]))
    assert step(worker, computed=[blocks("h", 1, 4)]) == Done()
    # Nobody asks for these any more.
    assert link.sent == [Computed("h", 0, [3])]
    assert step(worker, holds=["h"]) == Done(sent={"h"})
    assert step(worker) == Done()


def test_a_release_that_overtakes_the_first_step(worker, link):
    link.come(Released(["h"]))
    assert step(worker) == Done()
    assert step(worker, computed=[blocks("h", 0, 3)]) == Done()
    assert link.sent == []
    assert step(worker, holds=["h"]) == Done(sent={"h"})


def test_a_release_is_not_forgotten_among_many_of_strangers(worker, link):
    step(worker, computed=[blocks("h", 0, 3)])
    link.come(Released(["h"]), Released([f"r{i}" for i in range(10_000)]))
    assert step(worker, holds=["h"]) == Done(sent={"h"})


def test_a_hold_of_another_session_is_over_and_nothing_said_of_it(worker, link):
    assert step(worker, computed=[blocks("h", 0, 3, epoch=4)]) == Done()
    assert link.sent == []
    assert step(worker, holds=["h"]) == Done(sent={"h"})


def test_a_hold_begun_in_a_session_that_was_lost_is_over(worker, link):
    step(worker, computed=[blocks("h", 0, 3), blocks("g", 0, 4)])
    link.lose()
    assert step(worker, holds=["g"], computed=[blocks("h", 1, 5)]) == Done(sent={"g"})
    link.epoch = 6
    assert step(worker, computed=[blocks("h", 2, 6)]) == Done()
    assert link.sent == [Computed("h", 0, [3]), Computed("g", 0, [4])]
    assert step(worker, holds=["h"]) == Done(sent={"h"})


def test_a_session_that_is_given_up_may_still_copy_until_it_is_lost(worker, link):
    step(worker, computed=[blocks("h", 0, 3)])
    link.epoch = 0
    assert step(worker, holds=["h"]) == Done()
    link.come(LOST)
    assert step(worker) == Done(sent={"h"})


def test_preempted_blocks_are_overwritten_only_when_they_are_released(worker, link):
    step(worker, computed=[blocks("h", 0, 3), blocks("g", 0, 4), blocks("k", 0, 5)])
    link.meanwhile = [[Released(["g"])], [], [Released(["h"])], [Released(["k"])]]
    worker.preempted(["h", "g"])
    assert (link.waits, link.meanwhile) == (3, [[Released(["k"])]])
    # vLLM has their blocks; there is nothing to report.
    assert step(worker) == Done()
    assert list(worker._begun) == ["k"]


def test_a_preempted_request_that_was_released_before_is_not_waited_for(worker, link):
    step(worker, computed=[blocks("h", 0, 3), blocks("g", 0, 4)])
    link.come(Released(["h"]))
    step(worker)
    link.come(Released(["g"]))
    worker.preempted(["h", "g"])
    assert link.waits == 0
    assert (worker._begun, worker._early) == ({}, {})


def test_preempted_requests_that_are_no_holds_here_are_not_waited_for(worker, link):
    step(worker, computed=[blocks("h", 0, 3, epoch=4)])
    worker.preempted(["h", "never"])
    Worker(None).preempted(["h"])
    assert link.waits == 0


def test_a_lost_agent_copies_nothing_of_preempted_requests(worker, link):
    step(worker, computed=[blocks("h", 0, 3)])
    link.meanwhile = [[], [LOST]]
    worker.preempted(["h"])
    assert link.waits == 2
    assert step(worker) == Done()


def test_an_agent_that_does_not_release_a_preempted_request_is_named_once(worker, link, monkeypatch, caplog):
    monkeypatch.setattr(worker_module, "OVERDUE_S", -1.0)
    step(worker, computed=[blocks("h", 0, 3)])
    link.meanwhile = [[], [], [], [Released(["h"])]]
    worker.preempted(["h"])
    assert link.waits == 4
    assert sum("restart the agent if it hangs" in record.message for record in caplog.records) == 1


def test_when_the_agent_is_gone_pulls_have_failed_and_holds_are_free(worker, link):
    step(worker, [pull("r", 1), pull("s", 2)], computed=[blocks("h", 0, 3), blocks("g", 0, 4)])
    step(worker, holds=["h"])
    link.come(PullDone("s", [], ""))
    link.lose()
    assert step(worker) == Done(sent={"h"}, received={"r", "s"}, bad_blocks={1})
    link.epoch = 6
    link.come(PullDone("r", [], ""), Released(["h"]))
    assert step(worker) == Done()


def test_only_an_idle_step_with_something_open_waits(worker, link):
    def idle_step(pulls=(), holds=()):
        worker.begin_step(pulls, holds, [])
        return worker.end_step(idle=True)

    idle_step()
    assert link.waits == 0
    step(worker, [pull("r", 1)])
    assert link.waits == 0
    idle_step()
    assert link.waits == 1
    link.come(PullDone("r", [], ""))
    # What is known already is not made to wait.
    assert idle_step().received == {"r"}
    idle_step()
    assert link.waits == 1
    step(worker, computed=[blocks("h", 0, 3)])
    idle_step(holds=["h"])
    assert link.waits == 2


def test_words_of_the_agent_about_strangers_change_nothing(worker, link):
    link.come(PullDone("never", [1], "x"), Welcome(1, 9), Released([f"r{i}" for i in range(10_000)]))
    assert step(worker) == Done()
    assert len(worker._early) <= 4096


@pytest.mark.parametrize("seed", range(200))
def test_reported_exactly_once_under_any_order(seed):
    rng = random.Random(seed)
    link = FakeLink()
    worker = Worker(link)
    # Of requests: those that run, those that are over and not reported, and those the agent holds.
    running, open_pulls, open_holds, unreleased = set(), set(), set(), set()
    pulls, holds, computed = [], [], []
    for i in range(80):
        match rng.randrange(9):
            case 0:
                pulls.append(pull(f"p{i}", i))
                open_pulls.add(f"p{i}")
            case 1 if link.epoch:
                computed.append(blocks(f"h{i}", 0, i, epoch=link.epoch))
                running.add(f"h{i}")
                unreleased.add(f"h{i}")
            case 2 if unreleased:
                link.come(Released([unreleased.pop()]))
            case 3 if worker._pulls:
                link.come(PullDone(rng.choice(list(worker._pulls)), [], ""))
            case 4 if rng.random() < 0.3:
                link.lose()
                unreleased.clear()
            case 5:
                link.epoch = link.epoch or 100 + i
            case 6 if running:
                holds.append(running.pop())
                open_holds.add(holds[-1])
            case 7 if running and not computed:
                # The agent releases it while the engine waits.
                name = running.pop()
                link.meanwhile = [[Released([name])]] if name in unreleased else []
                unreleased.discard(name)
                worker.preempted([name])
                link.meanwhile = []
            case _:
                done = step(worker, pulls, holds, computed)
                pulls, holds, computed = [], [], []
                assert done.sent <= open_holds
                assert done.received <= open_pulls
                open_holds -= done.sent
                open_pulls -= done.received
    link.lose()
    done = step(worker, pulls, holds, computed)
    assert (done.sent, done.received) == (open_holds, open_pulls)
    assert worker._begun == {}
