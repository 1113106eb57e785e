"""Each pull and each hold is reported to the engine exactly once, whatever the agent does."""

import random

import pytest
from baton_connector import protocol
from baton_connector.protocol import Cancel, PullDone, Released, Welcome
from baton_connector.worker import NEVER, Done, WantedHold, WantedPull, Worker
from fake_link import FakeLink


def pull(name, *blocks):
    return WantedPull(name, protocol.frame(Cancel(name)), list(blocks), 1.0)


@pytest.fixture
def link():
    return FakeLink()


@pytest.fixture
def worker(link):
    return Worker(link)


def step(worker, pulls=(), holds=()):
    worker.begin_step(pulls, holds)
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
    assert step(passive, [pull("r", 3)], [WantedHold("h", 5)]) == Done(sent={"h"}, received={"r"}, bad_blocks={3})


def test_a_pull_too_large_to_send_fails(worker):
    assert step(worker, [WantedPull("r", b"", [1], 1.0)]) == Done(received={"r"}, bad_blocks={1})


def test_a_hold_ends_with_its_release(worker, link):
    assert step(worker, holds=[WantedHold("h", 5)]) == Done()
    link.come(Released(["h", "unknown"]))
    assert step(worker) == Done(sent={"h"})
    link.come(Released(["h"]))
    assert step(worker) == Done()


def test_a_release_that_overtakes_its_hold(worker, link):
    link.come(Released(["h"]))
    assert step(worker) == Done()
    assert step(worker, holds=[WantedHold("h", 5)]) == Done(sent={"h"})


def test_a_hold_of_another_session_is_over(worker):
    assert step(worker, holds=[WantedHold("h", 4)]) == Done(sent={"h"})


def test_when_the_agent_is_gone_pulls_have_failed_and_holds_are_free(worker, link):
    step(worker, [pull("r", 1), pull("s", 2)], [WantedHold("h", 5)])
    link.come(PullDone("s", [], ""))
    link.lose()
    assert step(worker) == Done(sent={"h"}, received={"r", "s"}, bad_blocks={1})
    link.epoch = 6
    link.come(PullDone("r", [], ""), Released(["h"]))
    assert step(worker) == Done()


def test_only_an_idle_step_with_something_open_waits(worker, link):
    def idle_step(pulls=(), holds=()):
        worker.begin_step(pulls, holds)
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
    idle_step(holds=[WantedHold("h", 5)])
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
    open_pulls, open_holds, unreleased = set(), set(), set()
    pulls, holds = [], []
    for i in range(60):
        match rng.randrange(7):
            case 0:
                pulls.append(pull(f"p{i}", i))
                open_pulls.add(f"p{i}")
            case 1 if link.epoch:
                holds.append(WantedHold(f"h{i}", link.epoch))
                open_holds.add(f"h{i}")
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
            case _:
                done = step(worker, pulls, holds)
                pulls, holds = [], []
                assert done.sent <= open_holds
                assert done.received <= open_pulls
                open_holds -= done.sent
                open_pulls -= done.received
    link.lose()
    done = step(worker, pulls, holds)
    assert (done.sent, done.received) == (open_holds, open_pulls)
