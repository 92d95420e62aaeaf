"""What operators ask: the service `pony-control`. A request is {"list": "flows" | "peers" | "regions"}, an answer
{"items": [...]} or {"error": text}."""

from __future__ import annotations

import json
from typing import Any

from snap.dataplane.errors import SnapError
from snap.modules import Engine
from snap.modules.serving import ServerChannel

from .module import PonyModule


class ControlEngine(Engine):
    """Asks the engine beside it, which answers within a poll of its own: so this one may wait for that."""

    def poll(self, budget: int) -> int:
        done = 0
        for channel in self.channels:
            done += self._serve(channel, budget)
        return done

    def _serve(self, channel: ServerChannel, budget: int) -> int:
        requests = channel.take(budget)
        channel.answer([json.dumps(self.answer(request)).encode() for request in requests])
        return len(requests)

    def answer(self, request: bytes) -> dict[str, Any]:
        module = self.module
        assert isinstance(module, PonyModule)
        try:
            wanted = json.loads(request)["list"]
            if wanted == "peers":
                return {"items": peers(module)}
            if wanted in ("flows", "regions"):
                return {"items": module.ask_engine({"do": wanted})[wanted]}
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        except SnapError as error:
            return {"error": str(error)}
        return {"error": "the request is not understood"}


def peers(module: PonyModule) -> list[dict[str, Any]]:
    """Every host with an address or a certificate here, or a set-up that there was. A flow that works says more
    than the last set-up, which may have been that of an earlier process."""
    control = module.control
    if control is None:
        return []
    pins = control.identity.pins
    try:
        flows = module.ask_engine({"do": "flows"})["flows"]
    except SnapError:
        flows = []
    connected = {flow["host"] for flow in flows if flow.get("attached")}
    rows = []
    for host in sorted({*control.config.peers, *pins, *control.records}):
        record = control.records.get(host)
        where = control.config.address_of(host)
        state = "idle" if record is None else record.state
        rows.append(
            {
                "host": host,
                "address": "" if where is None else f"{where[0]}:{where[1]}",
                "state": "connected" if state == "idle" and host in connected else state,
                "since": 0.0 if record is None else record.since,
                "error": "" if record is None else record.error,
                "fingerprint": pins.get(host, ""),
            }
        )
    return rows
