"""Pony Express measured: one-sided operations, round trips and bulk, each beside TCP in the same round.

Everything runs on kernels of its own, with an initiator and a target in processes of their own; between hosts means
between two network namespaces, which need root."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from snap.ipc import BLOCK, SPIN, SnapError

from .pony_app import LARGE
from .pony_hosts import App, Site, idle_share, one_host, run, two_hosts, unable
from .pony_rivals import rpc_kinds

ROUNDS: Final = 5
QUICK_ROUNDS: Final = 2
REGIONS: Final = {"1 MiB": 1 << 20, "256 MiB": 256 << 20}
BURSTS: Final = (1, 4, 16, 64, 256, 1024, 4096, 16_384)
BURST: Final = 4096
"""Operations of a burst where its size is not what is compared."""

MTUS: Final = (1500, 9000)
MANY: Final = 10_000
"""Connections, against one."""

LOSSES: Final = {0.1: 128, 1: 32, 10: 2}
"""Percent of packets, and large messages to send then over TCP, which takes long for them; Snap sends `LOSSY`."""

LOSSY: Final = 64

SENDERS: Final = {"Snap": ("send_large", "take_large"), "TCP": ("tcp_send", "tcp_take")}
"""Who is compared in bulk: what the initiator does and what the target."""

STREAMS: Final = (1, 200)
SPREAD: Final = 64
"""Operations of each burst when they are spread over connections."""

ONE_WHO: Final = "on one"
MANY_WHO: Final = "on very many"

PARTS: Final = ("reads", "trips", "indirect", "bulk", "connections", "hosts", "loss")


@dataclass
class Figure:
    """What `who` reached in a scenario, once a round, in `unit`."""

    scenario: str
    who: str
    unit: str
    rounds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)


@dataclass
class Results:
    figures: list[Figure] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """What could not be measured, and why."""

    def add(self, scenario: str, who: str, **values: float) -> None:
        """A round's values, by their units: an underscore stands for a space."""
        for name, value in values.items():
            unit = UNITS[name]
            for figure in self.figures:
                if (figure.scenario, figure.who, figure.unit) == (scenario, who, unit):
                    break
            else:
                figure = Figure(scenario, who, unit)
                self.figures.append(figure)
            figure.rounds.append(value)

    def get(self, scenario: str, who: str, name: str) -> float | None:
        """The median over the rounds; None when it was not measured."""
        for figure in self.figures:
            if (figure.scenario, figure.who, figure.unit) == (scenario, who, UNITS[name]):
                return figure.median
        return None


UNITS: Final = {
    "rate": "M/s",
    "per_core": "M per core-second",
    "p50": "p50 µs",
    "p99": "p99 µs",
    "goodput": "Gbit/s",
    "goodput_per_core": "Gbit per core-second",
    "memory": "bytes",
}
"""Of figures, by short names. A core-second is one of the engine, of a server, or for bulk of the whole machine."""

Say = Callable[[str], None]


@dataclass
class Bench:
    """What is measured, how often and how long (`seconds` of each)."""

    results: Results
    say: Say
    rounds: int
    seconds: float
    trips: int
    quick: bool

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """When one fails the others are still worth having: they took minutes."""
        self.say(what)
        try:
            yield
        except (SnapError, OSError, subprocess.SubprocessError) as error:
            self.results.failures.append(f"{what}: {error}")


def measure(quick: bool, say: Say, parts: frozenset[str] = frozenset()) -> Results:
    """Measure everything, or those `parts`."""
    bench = Bench(
        Results(),
        say,
        QUICK_ROUNDS if quick else ROUNDS,
        0.2 if quick else 1.0,
        1000 if quick else 10_000,
        quick,
    )
    wanted = [part for part in PARTS if not parts or part in parts]
    local = {
        "reads": _reads,
        "trips": _trips,
        "indirect": _indirect,
        "bulk": _bulk_here,
        "connections": _connections,
    }
    for part in wanted:
        if part in local:
            with bench.part(f"one host: {part}"), one_host() as site:
                local[part](bench, site)
    if "hosts" in wanted:
        why = unable()
        for mtu in MTUS:
            with bench.part(f"two hosts, MTU {mtu}"):
                if why:
                    raise SnapError(why)
                with two_hosts(mtu) as site:
                    _hosts(bench, site, mtu)
    if "loss" in wanted:
        with bench.part("goodput with loss"):
            _loss(bench)
    return bench.results


# -- what is common ---------------------------------------------------------------------------------------------


def _meet(site: Site, apps: tuple[App, App], name: str, count: int = 1) -> None:
    """Connect the initiator to the target."""
    near, far = apps
    far.ask("bind", name=name)
    far.begin("accept", count=count)
    near.ask("connect", name=site.prefix + name, count=count)
    far.result()


def _meet_tcp(site: Site, apps: tuple[App, App], count: int = 1) -> None:
    near, far = apps
    port = far.ask("tcp_listen", address=site.address)
    far.begin("tcp_accept", count=count)
    near.ask("tcp_connect", address=site.address, port=port, count=count)
    far.result()


def _both(apps: tuple[App, App], initiator: str, target: str, **arguments: Any) -> tuple[Any, Any]:
    """What both come to; the target begins."""
    near, far = apps
    far.begin(target, **arguments)
    near.begin(initiator, **arguments)
    return near.result(), far.result()


def _rate(site: Site, near: App, **arguments: Any) -> dict[str, float]:
    """Of reads: millions a second, and per second of the initiator's engine."""
    engine = site.engine()
    before = engine.cpu()
    found = near.ask("reads", **arguments)
    millions = found["operations"] / 1e6
    return {"rate": millions / found["seconds"], "per_core": millions / (engine.cpu() - before)}


def _percentiles(times: list[int]) -> dict[str, float]:
    """In µs, of ns."""
    times.sort()
    return {"p50": times[len(times) // 2] / 1e3, "p99": times[len(times) * 99 // 100] / 1e3}


# -- one host ---------------------------------------------------------------------------------------------------


def _reads(bench: Bench, site: Site) -> None:
    """Bursts of one-sided reads, beside calls of a server."""
    regions = dict(list(REGIONS.items())[:1]) if bench.quick else REGIONS
    for label, size in regions.items():
        with site.apps(0, size) as apps:
            near, far = apps
            _meet(site, apps, "target")
            region = far.ask("share", size=size)
            calls = _serve(site, far, label)
            for _ in range(bench.rounds):
                for burst in BURSTS:
                    found = _rate(site, near, region=region, burst=burst, seconds=bench.seconds, how="direct")
                    bench.results.add(f"reads in {label}", f"bursts of {burst}", **found)
                found = _rate(site, near, region=region, burst=BURST, seconds=bench.seconds, how="indirect")
                bench.results.add(f"reads in {label}", "indirect", **found)
                for kind, path in calls.items():
                    before = far.ask("rpc_cpu")
                    done = near.ask("rpc_reads", path=path, kind=kind, seconds=bench.seconds)
                    millions, cpu = done["operations"] / 1e6, far.ask("rpc_cpu") - before
                    bench.results.add(
                        f"reads in {label}",
                        rpc_kinds()[kind],
                        rate=millions / done["seconds"],
                        per_core=millions / cpu,
                    )
    if "grpc" not in rpc_kinds():
        bench.results.failures.append("gRPC unary: grpcio is not installed")


def _serve(site: Site, far: App, label: str) -> dict[str, str]:
    """Sockets at which the target serves calls, by their kinds."""
    paths = {kind: os.fspath(site.stage.folder / f"{kind} {label}.sock") for kind in rpc_kinds()}
    for kind, path in paths.items():
        far.ask("rpc_serve", path=path, kind=kind)
    return paths


def _trips(bench: Bench, site: Site, scenario: str = "round trip, one host") -> None:
    """Of 64 B: messages and reads, beside TCP."""
    with site.apps(0, LARGE) as apps:
        near, far = apps
        _meet(site, apps, "target")
        _meet_tcp(site, apps)
        region = far.ask("share", size=LARGE)
        cpus = sorted(os.sched_getaffinity(0))
        for _ in range(bench.rounds):
            for who, wait in (("spinning", SPIN), ("blocking", BLOCK)):
                # Two that sleep in turn are far faster on one processor: not by chance. Those that spin move apart.
                near.ask("pin", cpus=cpus if wait == SPIN else cpus[:1])
                far.ask("pin", cpus=cpus if wait == SPIN else cpus[-1:])
                times, _ = _both(apps, "trips", "echo", count=bench.trips, wait=wait)
                bench.results.add(scenario, f"Snap, {who}", **_percentiles(times))
                times = near.ask("read_trips", region=region, count=bench.trips, wait=wait, how="direct")
                bench.results.add(scenario, f"Snap, read, {who}", **_percentiles(times))
                times, _ = _both(apps, "tcp_trips", "tcp_echo", count=bench.trips, spin=wait == SPIN)
                bench.results.add(scenario, f"TCP, {who}", **_percentiles(times))


def _indirect(bench: Bench, site: Site) -> None:
    """An indirect read, beside two reads of which the second depends on the first."""
    with site.apps(0, LARGE) as apps:
        near, far = apps
        _meet(site, apps, "target")
        region = far.ask("share", size=LARGE)
        for _ in range(bench.rounds):
            for how, who in (("indirect", "indirect read"), ("twice", "two reads")):
                found = _rate(site, near, region=region, burst=BURST, seconds=bench.seconds, how=how)
                bench.results.add("indirection, in bursts", who, **found)
                found = _rate(site, near, region=region, burst=1, seconds=bench.seconds, how=how)
                bench.results.add("indirection, one at a time", who, **found)
                times = near.ask("read_trips", region=region, count=bench.trips, wait=SPIN, how=how)
                bench.results.add("indirection, latency", who, **_percentiles(times))


def _connections(bench: Bench, site: Site) -> None:
    """Small messages and bursts spread over very many connections, beside the same on one; the memory of each."""
    many = 500 if bench.quick else MANY
    engine = site.engine()
    with site.apps(0, LARGE) as one, site.apps(0, LARGE) as all_:
        _meet(site, one, "one")
        before = engine.resident()
        _meet(site, all_, "many", many)
        bench.results.add("connections", MANY_WHO, memory=(engine.resident() - before) / many)
        regions = [apps[1].ask("share", size=LARGE) for apps in (one, all_)]
        for _ in range(bench.rounds):
            for who, apps, region in ((ONE_WHO, one, regions[0]), (MANY_WHO, all_, regions[1])):
                found = _rate(site, apps[0], region=region, burst=SPREAD, seconds=bench.seconds, how="direct")
                bench.results.add("connections, bursts of 64 reads", who, **found)
                _, took = _both(apps, "send_small", "take_small", batches=bench.trips)
                rate = took["operations"] / took["seconds"] / 1e6
                bench.results.add("connections, messages of 64 B", who, rate=rate)


def _bulk(bench: Bench, site: Site, link: str, switches: tuple[bool, ...] = ()) -> None:
    """Large messages, beside TCP; with the offloads of the link on and off, if it has any."""
    idle = idle_share(0.5)
    for streams in STREAMS:
        with site.apps(0, 0) as apps:
            _meet(site, apps, f"bulk{streams}", streams)
            _meet_tcp(site, apps, streams)
            counts: dict[tuple[bool | None, str], int] = {}
            for turn in range(bench.rounds + 1):
                for on in switches or (None,):
                    if on is not None:
                        _offload(site, on)
                    for who in SENDERS:
                        # The first round tells how many a full one needs.
                        count = counts.get((on, who), 64 + 2 * streams)
                        rate = _goodput(
                            bench, apps, who, count, idle, bulk_scenario(link, streams, on) if turn else ""
                        )
                        counts.setdefault((on, who), max(count, int(rate * bench.seconds)))


def _goodput(bench: Bench, apps: tuple[App, App], who: str, count: int, idle: float, scenario: str) -> float:
    """Send `count` large messages: how many came a second. It is noted unless there is no `scenario`."""
    _, took = _both(apps, *SENDERS[who], count=count)
    bits = took["bytes"] * 8 / 1e9
    if scenario:
        bench.results.add(
            scenario,
            who,
            goodput=bits / took["seconds"],
            goodput_per_core=bits / max(0.01, took["cpu"] - idle * took["seconds"]),
        )
    rate: float = took["bytes"] / LARGE / took["seconds"]
    return rate


def bulk_once(site: Site, seconds: float = 1.0) -> list[tuple[str, float, float]]:
    """One stream of large messages for about `seconds` each: who, Gbit/s, Gbit per core-second."""
    bench = Bench(Results(), lambda _: None, 1, seconds, 0, quick=True)
    idle, rows = idle_share(0.5), []
    with site.apps(0, 0) as apps:
        _meet(site, apps, "bulk")
        _meet_tcp(site, apps)
        for who in SENDERS:
            rate = _goodput(bench, apps, who, 64, idle, "")
            _goodput(bench, apps, who, max(64, int(rate * seconds)), idle, "bulk")
            found = [bench.results.get("bulk", who, name) for name in ("goodput", "goodput_per_core")]
            rows.append((who, found[0] or 0.0, found[1] or 0.0))
    return rows


def bulk_scenario(link: str, streams: int, on: bool | None = None) -> str:
    offloads = {True: ", offloads on", False: ", offloads off", None: ""}[on]
    return f"bulk, {link}{offloads}, {streams} stream{'s' if streams > 1 else ''}"


def _bulk_here(bench: Bench, site: Site) -> None:
    _bulk(bench, site, "one host")


# -- two hosts --------------------------------------------------------------------------------------------------


def _hosts(bench: Bench, site: Site, mtu: int) -> None:
    with site.apps(0, LARGE) as apps:
        near, far = apps
        _meet(site, apps, "target")
        region = far.ask("share", size=LARGE)
        for _ in range(bench.rounds):
            found = _rate(site, near, region=region, burst=BURST, seconds=bench.seconds, how="direct")
            bench.results.add(f"reads, MTU {mtu}", f"bursts of {BURST}", **found)
    _trips(bench, site, f"round trip, MTU {mtu}")
    _bulk(bench, site, f"MTU {mtu}", (True, False))


def _offload(site: Site, on: bool) -> None:
    """Of both ends of the link. Raises SnapError."""
    with site.apps() as apps:
        for app, link in zip(apps, site.links, strict=True):
            app.ask("offload", device=link, on=on)


def _loss(bench: Bench) -> None:
    """Goodput where a filter loses packets in both directions; without offloads, whose packets are of up to 64 KiB."""
    if why := unable() or ("" if shutil.which("tc") else "there is no `tc` (iproute2)"):
        raise SnapError(why)
    with two_hosts(MTUS[0]) as site:
        _offload(site, False)
        ends = list(zip(site.namespaces, site.links, strict=True))
        for netns, link in ends:
            run("tc", "-n", netns, "qdisc", "add", "dev", link, "clsact")
        for loss, count in LOSSES.items():
            # Load a random word; drop (2) if it is below a threshold, else go on (0).
            code = f"4,32 0 0 4294963256,53 1 0 {int(loss / 100 * (1 << 32))},6 0 0 2,6 0 0 0"
            for netns, link in ends:
                place = ("dev", link, "ingress", "pref", "1", "handle", "1")
                run("tc", "-n", netns, "filter", "replace", *place, "bpf", "da", "bytecode", code)
            with site.apps(0, 0) as apps:
                _meet(site, apps, f"lossy{loss}")
                _meet_tcp(site, apps)
                for _ in range(bench.rounds):
                    for who in SENDERS:
                        large = LOSSY if who == "Snap" else count
                        _goodput(bench, apps, who, large, 0.0, bulk_scenario(f"{loss} % lost", 1))
