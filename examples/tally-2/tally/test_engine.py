"""Unit tests of tally: run `pytest` in this directory; no kernel is needed."""

from pathlib import Path

from snap.modules.testing import EngineHarness, crash, load_engine, upgrade

HERE = Path(__file__).parent


def ask(harness, client, *messages):
    client.send_many(list(messages))
    harness.run()
    return client.recv_many(len(messages), timeout=0)


def test_it_adds_up_by_name():
    with EngineHarness(load_engine(HERE, "main")) as harness:
        client = harness.attach().client
        answers = ask(harness, client, b"apples 3", b"pears 1", b"apples 5", b"nonsense")
        assert answers == [b"apples 1 3 3", b"pears 1 1 1", b"apples 2 8 4", b"error: send NAME NUMBER"]


def test_upgraded_to_itself_it_goes_on_as_if_nothing_had_been():
    with EngineHarness(load_engine(HERE, "main")) as harness:
        client = harness.attach().client
        ask(harness, client, b"apples 3")
        before = harness.contents()
        upgrade(harness, load_engine(HERE, "main"))
        assert harness.contents() == before
        assert ask(harness, client, b"apples 5") == [b"apples 2 8 4"]


def test_a_crash_in_a_poll_counts_nothing_twice():
    with EngineHarness(load_engine(HERE, "main")) as harness:
        client = harness.attach().client
        client.send(b"apples 3")
        crash(harness)
        harness.run()
        assert client.recv_many(8, timeout=0) == [b"apples 1 3 3"]
