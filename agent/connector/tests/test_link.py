"""The link against an agent over a real socket."""

import os
import socket
import threading
import time

import pytest
from baton_connector import link as link_module
from baton_connector import protocol
from baton_connector.link import LOST, Link, Registration
from baton_connector.memory import SharedStorage
from baton_connector.protocol import Cancel, Hello, Layout, Piece, Released
from loopback_agent import LoopbackAgent


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(link_module, "RETRY_FIRST_S", 0.005)
    monkeypatch.setattr(link_module, "RETRY_MOST_S", 0.02)
    monkeypatch.setattr(link_module, "RETRY_REFUSED_S", 0.02)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "agent.sock")


@pytest.fixture
def links():
    made = []
    yield made.append
    for link in made:
        link.close()


def hello(side="scheduler"):
    return Hello(instance="i", side=side, tp_size=1, model="m", block_size=32, num_blocks=4, chunk_tokens=0)


def registration(size=4096):
    fd = os.memfd_create("kv")
    os.ftruncate(fd, size)
    layout = Layout(facts={"block_size": "32"}, order={}, pieces=[Piece(0, 0, size // 4, size // 4)])
    return Registration([SharedStorage(fd, size)], layout)


def agent_at(path):
    agent = LoopbackAgent()
    agent.listen("e", path)
    return agent


def until(link, wanted, timeout=10.0):
    """Everything polled up to and with the first event for which `wanted` holds."""
    events, deadline = [], time.monotonic() + timeout
    while time.monotonic() < deadline:
        for event in link.poll():
            events.append(event)
            if wanted(event):
                return events
        time.sleep(0.001)
    raise AssertionError(f"not within {timeout} s: {events}")


def up(link, timeout=10.0):
    deadline = time.monotonic() + timeout
    while link.epoch == 0:
        assert time.monotonic() < deadline, "no session"
        assert LOST not in link.poll()
        time.sleep(0.001)
    return link.epoch


def test_it_waits_for_an_agent_that_comes_later(path, links):
    link = Link(path, hello())
    links(link)
    assert list(link.poll()) == []
    assert not link.send(protocol.frame(Cancel("r")))
    agent = agent_at(path)
    assert up(link) == agent.engines["e"].epoch
    assert link.send(protocol.frame(Cancel("r")))
    agent.wait("cancel", request="r")
    agent.close()


def test_a_worker_registers_its_memory_and_again_with_the_next_agent(path, links):
    memory = registration()
    os.pwrite(memory.storages[0].fd, b"first", 0)
    agent = agent_at(path)
    link = Link(path, hello({"worker": 0}), memory)
    links(link)
    first = up(link)
    storages, layout = agent.engines["e"].memory[0]
    assert layout == memory.layout
    assert storages[0][:5] == b"first"
    storages[0][:5] = b"again"
    assert os.pread(memory.storages[0].fd, 5, 0) == b"again"

    agent.close()
    until(link, lambda event: event is LOST)
    assert link.epoch == 0
    agent = agent_at(path)
    assert up(link) != first
    assert agent.engines["e"].memory[0][0][0][:5] == b"again"
    agent.close()


def test_what_was_sent_before_the_hang_up_comes_before_lost(path, links):
    agent = agent_at(path)
    link = Link(path, hello({"worker": 0}), registration())
    links(link)
    up(link)
    agent.send("e", Released(["a"]))
    agent.send("e", Released(["b"]))
    agent.close()
    time.sleep(0.05)
    assert until(link, lambda event: event is LOST) == [Released(["a"]), Released(["b"]), LOST]


def test_an_idle_engine_has_its_link_back_after_agents_came_and_went(path, links):
    link = Link(path, hello())
    links(link)
    agent = agent_at(path)
    up(link)
    for _ in range(3):
        agent.close()
        agent = agent_at(path)
        agent.wait("hello")
    # Not one hook ran meanwhile: the loss is seen now, once, and then the newest session.
    assert until(link, lambda event: event is LOST) == [LOST]
    deadline = time.monotonic() + 10
    while link.epoch != agent.engines["e"].epoch:
        assert time.monotonic() < deadline
        link.poll()
        time.sleep(0.001)
    assert link.send(protocol.frame(Cancel("r")))
    agent.wait("cancel")
    agent.close()


def test_a_refused_engine_goes_on_alone_and_asks_again(path, links, caplog):
    agent = agent_at(path)
    agent.refuse = "block size 32 differs"
    link = Link(path, hello())
    links(link)
    deadline = time.monotonic() + 10
    while not any("block size 32 differs" in record.message for record in caplog.records):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.1)
    assert link.epoch == 0
    assert sum("refused" in record.message for record in caplog.records) == 1
    agent.refuse = None
    up(link)
    agent.close()


def test_more_than_the_socket_takes_arrives_whole_and_in_order(path, links):
    agent = agent_at(path)
    link = Link(path, hello())
    links(link)
    up(link)
    # Stops the agent's reading: its thread waits for this lock in the first of the messages.
    agent._lock.acquire()
    names = [f"{i}" * (1 << 18) for i in range(8)]
    for name in names:
        assert link.send(protocol.frame(Cancel(name)))
    agent._lock.release()
    agent.wait("cancel", request=names[-1])
    assert [event["request"] for event in agent.events if event["event"] == "cancel"] == names
    agent.close()


def test_an_agent_that_does_not_read_is_given_up_and_lost_only_when_it_closes(path, links, monkeypatch):
    monkeypatch.setattr(link_module, "MAX_QUEUED", 1 << 20)
    agent = agent_at(path)
    link = Link(path, hello())
    links(link)
    up(link)
    agent._lock.acquire()
    try:
        frame = protocol.frame(Cancel("x" * (1 << 19)))
        assert any(not link.send(frame) for _ in range(32))
        assert link.epoch == 0
        time.sleep(0.05)
        assert list(link.poll()) == []
    finally:
        agent._lock.release()
    until(link, lambda event: event is LOST)
    up(link)
    agent.close()


def test_after_rubbish_the_agent_is_heard_no_more_but_waited_for(path, links, caplog):
    agent = agent_at(path)
    link = Link(path, hello({"worker": 0}), registration())
    links(link)
    up(link)
    agent.send("e", b"\xff\xff\xff\xff", rank=None)
    assert until(link, lambda event: event is LOST) == [LOST]
    assert any("over the limit" in record.message for record in caplog.records)
    up(link)
    agent.close()


def test_an_agent_that_never_answers_does_not_hold_the_engine(path, links, monkeypatch):
    monkeypatch.setattr(link_module, "HANDSHAKE_S", 0.05)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen()
    accepted = []
    threading.Thread(target=lambda: accepted.extend(listener.accept() for _ in range(2)), daemon=True).start()
    link = Link(path, hello())
    links(link)
    deadline = time.monotonic() + 10
    while len(accepted) < 2:
        assert time.monotonic() < deadline, "it did not try again"
        assert list(link.poll()) == []
        time.sleep(0.001)
    assert link.epoch == 0
    listener.close()


def test_behind_lost_the_next_session_is_taken_up_at_once(path, links):
    link = Link(path, hello())
    links(link)
    agent = agent_at(path)
    up(link)
    agent.close()
    agent = agent_at(path)
    agent.wait("hello")
    time.sleep(0.05)
    assert list(link.poll()) == [LOST]
    assert list(link.poll()) == []
    assert link.epoch == agent.engines["e"].epoch
    agent.close()


def test_waiting_ends_with_the_agents_word(path, links):
    agent = agent_at(path)
    link = Link(path, hello({"worker": 0}), registration())
    links(link)
    link.wait(1)
    up(link)
    link.wait(1)
    agent.send("e", Released(["a"]))
    link.wait(60_000)
    assert list(link.poll()) == [Released(["a"])]
    agent.close()
    link.wait(60_000)
    assert list(link.poll()) == [LOST]
