"""Channels brokered by a real kernel: the handshake, what it costs, and every way in which one ends."""

from __future__ import annotations

import asyncio
import fcntl
import mmap
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from snap.dataplane import _native
from snap.dataplane.errors import DeniedError, NotFoundError, UsageError
from snap.ipc import RevokedError, aconnect, protocol
from tests.kernel_rig import SERVES, Application, Rig, fake_host, run, running, write_module

FUTURE_WRITE = 0x10
MUTE = SERVES + "link.recv(1000000)\nlink.recv(100000)"


async def look_up(application: Application, service: str = "mine") -> int:
    found = await application.ask(protocol.Lookup(seq=1, service=service))
    assert isinstance(found, protocol.Found)
    return found.handle


async def opened(application: Application, **wish: Any) -> protocol.Opened:
    answer = await application.ask(protocol.Open(seq=2, handle=await look_up(application), **wish))
    assert isinstance(answer, protocol.Opened)
    return answer


def seal(application: Application) -> None:
    fcntl.fcntl(application.fds[1], fcntl.F_ADD_SEALS, FUTURE_WRITE)


def only(rig: Rig) -> Any:
    (channel,) = rig.kernel.broker.channels.values()
    return channel


def test_a_channel_is_described_counted_and_visible_until_its_client_closes_it(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")

    async def test() -> None:
        async with running(tmp_path, start=["mine"]) as rig, await aconnect(rig.directory) as client:
            channel = await client.aopen("mine", slots=64, up_bytes=10_000, down_bytes=4096)
            (view,) = await rig.operate("channel.list")
            assert (view["service"], view["module"], view["client"]) == ("mine", "mine", client.principal)
            assert (view["state"], view["slots"], view["up_bytes"]) == ("open", 64, 12288)
            assert view["read_only"] == "up: sealed; down: advisory (same uid)"
            used = rig.kernel.desk.principals[client.principal].bytes
            assert used == _native.ring_bytes(64) + 12288 + 4096
            channel.close()
            await rig.until(lambda: not rig.kernel.broker.channels)
            assert rig.kernel.desk.principals[client.principal].bytes == 0
            assert [cap["object"] for cap in await rig.operate("cap.list")] == ["service:mine"]

    run(test())


def test_the_up_pool_must_be_sealed_before_the_provider_gets_it(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")

    async def test() -> None:
        async with running(tmp_path, start=["mine"]) as rig:
            with await rig.application() as application:
                answer = await opened(application)
                refused = await application.ask(protocol.Mapped(seq=3, channel=answer.channel))
                assert (refused.code, "not sealed" in refused.message) == ("protocol", True)
                assert not rig.kernel.broker.channels

    run(test())


def test_what_was_sealed_cannot_be_written_by_who_receives_it(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")
    code = (
        SERVES
        + "_, ring = seqpacket.recv(link)\nimport mmap\n"
        + "try: mmap.mmap(os.open(f'/proc/self/fd/{ring[1]}', os.O_RDWR), 4096)\n"
        + "except PermissionError: print('refused', flush=True)\nlink.recv(100000)"
    )

    async def test() -> None:
        async with running(tmp_path, host=fake_host(tmp_path, code), start=["mine"]) as rig:
            with await rig.application() as application:
                answer = await opened(application)
                with mmap.mmap(application.fds[1], answer.up_bytes) as up:
                    seal(application)
                    application.say(protocol.Mapped(seq=3, channel=answer.channel))
                    await rig.until(lambda: rig.kernel.runner("mine").log.tail)
                    assert list(rig.kernel.runner("mine").log.tail) == ["refused"]
                    up[0] = 1

    run(test())


def test_a_provider_that_never_attaches_costs_its_client_a_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_module(tmp_path / "modules", "mine")
    monkeypatch.setattr("snap.kernel.broker.ATTACH_DEADLINE", 0.2)

    async def test() -> None:
        async with running(tmp_path, host=fake_host(tmp_path, MUTE), start=["mine"]) as rig:
            with await rig.application() as application:
                answer = await opened(application)
                seal(application)
                late = await application.ask(protocol.Mapped(seq=3, channel=answer.channel))
                assert (late.seq, late.code) == (3, "timeout")
                assert not rig.kernel.broker.channels

    run(test())


def test_a_revocation_while_the_provider_attaches_is_an_answer_too(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")

    async def test() -> None:
        async with running(tmp_path, host=fake_host(tmp_path, MUTE), start=["mine"]) as rig:
            with await rig.application() as application:
                answer = await opened(application)
                seal(application)
                application.say(protocol.Mapped(seq=3, channel=answer.channel))
                await rig.until(lambda: only(rig).state == "attaching")
                await rig.operate("cap.revoke", id=only(rig).cap)
                refused = await application.hear()
                assert (refused.seq, refused.code) == (3, "revoked")

    run(test())


def test_an_opener_that_never_maps_loses_the_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path / "modules", "mine")
    monkeypatch.setattr("snap.kernel.broker.MAP_DEADLINE", 0.2)

    async def test() -> None:
        async with running(tmp_path, start=["mine"]) as rig:
            with await rig.application() as application:
                await opened(application)
                await rig.until(lambda: "channel.gone" in rig.kinds())
                assert rig.kernel.desk.principals[rig.event("channel.offered").data["client"]].bytes == 0

    run(test())


def test_a_provider_that_dies_while_it_attaches_is_named_to_the_client(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine", more='[restart]\npolicy = "never"\n')
    code = SERVES + "link.recv(1000000)\nos._exit(3)"

    async def test() -> None:
        async with running(tmp_path, host=fake_host(tmp_path, code), start=["mine"]) as rig:
            with await rig.application() as application:
                answer = await opened(application)
                seal(application)
                failed = await application.ask(protocol.Mapped(seq=3, channel=answer.channel))
                assert (failed.code, "exit status 3" in failed.message) == ("not_running", True)

    run(test())


def test_a_provider_can_refuse_a_channel_with_its_own_reason(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")
    code = (
        SERVES
        + "d, _ = seqpacket.recv(link)\norder = protocol.Decoder(protocol.ToModule).decode(d)\n"
        + "say(protocol.Failure(seq=order.seq, code='resources', message='no more room here'))\nlink.recv(10000)"
    )

    async def test() -> None:
        async with running(tmp_path, host=fake_host(tmp_path, code), start=["mine"]) as rig:
            with await rig.application() as application:
                answer = await opened(application)
                seal(application)
                failed = await application.ask(protocol.Mapped(seq=3, channel=answer.channel))
                assert (failed.code, failed.message) == ("resources", "no more room here")

    run(test())


def test_a_module_has_nothing_to_say_of_channels_that_it_does_not_serve(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")
    write_module(tmp_path / "modules", "rogue")
    host = tmp_path / "host.py"
    rogue = fake_host(
        tmp_path,
        SERVES + "for n in range(1, 50): say(protocol.Dropped(channel=n, reason='mine now'))\n"
        "say(protocol.Attached(channel=1))\nprint('said', flush=True)\nlink.recv(100)",
    )
    host.write_text(
        "import os, socket, sys\n"
        "data = socket.socket(fileno=os.dup(int(os.environ['SNAP_LINK_FD']))).recv(100000, socket.MSG_PEEK)\n"
        f"command = {rogue!r} if b'rogue' in data else [sys.executable, '-m', 'snap.modules.host']\n"
        "os.execv(command[0], command)\n"
    )

    async def test() -> None:
        async with (
            running(tmp_path, host=[rogue[0], str(host)], start=["mine"]) as rig,
            await aconnect(rig.directory) as client,
        ):
            channel = await client.aopen("mine")
            await rig.operate("module.start", name="rogue")
            await rig.until(lambda: list(rig.kernel.runner("rogue").log.tail) == ["said"])
            await channel.asend(b"x")
            assert await channel.arecv(timeout=10) == b"x"
            assert only(rig).state == "open"
            channel.close()

    run(test())


def test_an_open_waits_for_the_service_when_told_to(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")

    async def test() -> None:
        async with running(tmp_path) as rig:
            with await rig.application() as application:
                handle = await look_up(application)
                refused = await application.ask(protocol.Open(seq=4, handle=handle))
                assert (refused.code, "never started" in refused.message) == ("not_running", True)
                application.say(protocol.Open(seq=5, handle=handle, wait=20.0))
                await rig.operate("module.start", name="mine")
                assert isinstance(await application.hear(), protocol.Opened)
                await rig.operate("module.stop", name="mine")
                late = await application.ask(protocol.Open(seq=6, handle=handle, wait=0.1))
                assert (late.seq, late.code) == (6, "timeout")

    run(test())


def test_who_leaves_while_it_waits_is_forgotten(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")

    async def test() -> None:
        async with running(tmp_path) as rig:
            with await rig.application() as application:
                application.say(protocol.Open(seq=5, handle=await look_up(application), wait=100.0))
                await rig.until(lambda: rig.kernel.broker._waiting)
            await rig.until(lambda: not rig.kernel.broker._waiting)
            await rig.operate("module.start", name="mine")
            assert not rig.kernel.broker.channels

    run(test())


def test_quotas_bound_channels_and_bytes_and_hurt_nobody_else(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")
    quota = {"quota": {"channels": 2, "bytes": "1MiB"}}

    async def test() -> None:
        async with running(tmp_path, quota, start=["mine"]) as rig:
            with await rig.application() as greedy, await rig.application() as modest:
                handle = await look_up(greedy)
                small = {"handle": handle, "slots": 64, "up_bytes": 4096, "down_bytes": 4096}
                big = await greedy.ask(protocol.Open(seq=2, handle=handle))
                assert (big.code, "bytes" in big.message) == ("quota", True)
                for _ in range(2):
                    assert isinstance(await greedy.ask(protocol.Open(seq=2, **small)), protocol.Opened)
                third = await greedy.ask(protocol.Open(seq=2, **small))
                assert (third.code, "2 channels" in third.message) == ("quota", True)
                assert await opened(modest, slots=64, up_bytes=4096, down_bytes=4096)

    run(test())


def test_revoking_stops_traffic_and_takes_what_was_derived_along(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")

    async def test() -> None:
        async with (
            running(tmp_path, start=["mine"]) as rig,
            await aconnect(rig.directory) as giver,
            await aconnect(rig.directory) as taker,
        ):
            service = await giver.alookup("mine")
            with await rig.application() as third:
                to = rig.kernel.desk.principals
                name = next(iter(set(to) - {giver.principal, taker.principal, "module:mine"}))
                application_handle = rig.kernel.table.delegate(
                    giver.principal, service.handle, name, 0.0
                ).handle
                assert isinstance(
                    await third.ask(protocol.Open(seq=2, handle=application_handle)), protocol.Opened
                )
                mine, other = await giver.aopen(service), await taker.aopen("mine")
                cap = next(
                    cap for cap in rig.kernel.table.views(giver.principal) if cap.object == "service:mine"
                )
                gone = (await rig.operate("cap.revoke", id=cap.id))["revoked"]
                assert len(gone) == 4
                with pytest.raises(RevokedError):
                    await mine.asend(b"x")
                with pytest.raises(RevokedError):
                    await mine.arecv(timeout=5)
                await other.asend(b"y")
                assert await other.arecv(timeout=10) == b"y"
                assert len(rig.kernel.broker.channels) == 1
                log = (rig.directory / "audit.jsonl").read_text()
                assert '"action":"revoke"' in log
                mine.close()
                other.close()

    run(test())


def test_an_expired_capability_ends_its_channels(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")
    rules = {
        "allow": [{"who": "owner", "service": "*", "rights": ["connect", "send", "recv"], "expires": 0.5}]
    }

    async def test() -> None:
        async with running(tmp_path, rules, start=["mine"]) as rig, await aconnect(rig.directory) as client:
            channel = await client.aopen("mine")
            with pytest.raises(RevokedError):
                await channel.arecv(timeout=10)
            assert not rig.kernel.broker.channels
            assert rig.event("cap.revoked").data["reason"] == "expired"
            channel.close()

    run(test())


def test_a_client_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")
    code = (
        "import sys, time\nfrom snap.ipc import connect\nclient = connect(sys.argv[1])\n"
        "channel = client.open('mine')\nchannel.send(b'x')\nchannel.recv()\nprint('up', flush=True)\ntime.sleep(3600)"
    )

    async def test() -> None:
        async with running(tmp_path, start=["mine"]) as rig:
            before = len(os.listdir("/proc/self/fd"))
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, rig.directory, stdout=asyncio.subprocess.PIPE
            )
            assert process.stdout is not None
            await process.stdout.readline()
            assert only(rig).state == "open"
            process.send_signal(signal.SIGKILL)
            await process.wait()
            await rig.until(lambda: "principal.left" in rig.kinds())
            assert not rig.kernel.broker.channels
            assert not rig.kernel.table.views()
            await rig.until(lambda: len(os.listdir("/proc/self/fd")) <= before)

    run(test())


def test_a_principal_without_a_right_is_denied_and_the_audit_log_says_so(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")

    async def test() -> None:
        async with (
            running(tmp_path, {"allow": []}, start=["mine"]) as rig,
            await aconnect(rig.directory) as client,
        ):
            with pytest.raises(DeniedError):
                await client.aopen("mine")
            assert '"action":"lookup","outcome":"denied"' in (rig.directory / "audit.jsonl").read_text()
            why = await rig.operate("cap.why", who=client.principal, service="mine")
            assert (why["allowed"], "denied by default" in why["reason"]) == (False, True)

    run(test())


def test_an_operator_can_grant_what_policy_does_not_give(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")

    async def test() -> None:
        async with running(tmp_path, {"allow": []}, start=["mine"]) as rig:
            with await rig.application() as application:
                name = next(name for name in rig.kernel.desk.principals if name.startswith("app:"))
                cap = await rig.operate("cap.grant", owner=name, service="mine", rights=["connect", "send"])
                answer = await application.ask(protocol.Open(seq=2, handle=cap["handle"]))
                assert answer.rights == ["send"]
                with pytest.raises(NotFoundError):
                    await rig.operate("cap.grant", owner=name, service="no-such", rights=["connect"])
                with pytest.raises(UsageError):
                    await rig.operate("cap.grant", owner=name, service="mine", rights=["fly"])

    run(test())


def test_two_modules_are_given_a_channel_by_policy_alone(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "base")
    caller = (
        "import os, socket\nfrom snap.modules import Engine\n"
        "class Main(Engine):\n"
        "    def on_start(self):\n        pass\n"
        "    def poll(self, budget):\n        return 0\n"
    )
    write_module(tmp_path / "modules", "above", caller, more='[requires]\nservices = ["base"]\n')
    rules = {"allow": [{"who": "module:above", "service": "base", "rights": ["connect", "send", "recv"]}]}
    talks = fake_host(
        tmp_path,
        "from snap.ipc.protocol import *\n"
        "hear = Decoder(ToModule).decode\n"
        "def ask(m):\n    say(m)\n    d, f = seqpacket.recv(link)\n    return hear(d), f\n"
        "found, _ = ask(Lookup(seq=1, service='base'))\n"
        "opened, f = ask(Open(seq=2, handle=found.handle))\n"
        "from snap.dataplane import _native\n"
        "end = _native.Endpoint(_native.CLIENT, f[0], f[1], f[2], opened.slots, opened.up_bytes, opened.down_bytes, "
        "(f[3], f[4]), opened.generation)\n"
        "import fcntl\nfcntl.fcntl(f[1], fcntl.F_ADD_SEALS, 16)\n"
        "ready, _ = ask(Mapped(seq=3, channel=opened.channel))\n"
        "end.send(b'from above')\nprint(type(ready).__name__, end.recv(timeout=10), flush=True)\n"
        + SERVES
        + "link.recv(1000)",
    )
    host = tmp_path / "host.py"
    host.write_text(
        "import os, socket, sys\n"
        "data = socket.socket(fileno=os.dup(int(os.environ['SNAP_LINK_FD']))).recv(100000, socket.MSG_PEEK)\n"
        f"command = {talks!r} if b'/above' in data else [sys.executable, '-m', 'snap.modules.host']\n"
        "os.execv(command[0], command)\n"
    )

    async def test() -> None:
        async with running(tmp_path, rules, host=[talks[0], str(host)], start=["base", "above"]) as rig:
            assert list(rig.kernel.runner("above").log.tail) == ["Ready b'from above'"]
            assert only(rig).client.badge == "module:above"
            await rig.operate("module.stop", name="above")
            assert not rig.kernel.broker.channels

    run(test())


def test_the_other_back_end_works_and_says_what_it_cannot_hold(tmp_path: Path) -> None:
    write_module(tmp_path / "modules", "mine")

    async def test() -> None:
        rules = {"segments": {"backend": "posix"}}
        async with running(tmp_path, rules, start=["mine"]) as rig, await aconnect(rig.directory) as client:
            channel = await client.aopen("mine", slots=64, up_bytes=4096, down_bytes=4096)
            await channel.asend(b"x")
            assert await channel.arecv(timeout=10) == b"x"
            (view,) = await rig.operate("channel.list")
            assert view["read_only"] == "up: advisory (same uid); down: advisory (same uid)"
            os.kill(rig.kernel.runner("mine").machine.pid or 0, signal.SIGKILL)
            await channel.asend(b"y")
            assert await channel.arecv(timeout=10) == b"y"
            channel.close()

    run(test())
