"""The echo engine in Python; the one in Rust is `native:echo`."""

from snap.modules import Engine


class PyEcho(Engine):
    """Sends every message back to the client that it came from."""

    def poll(self, budget: int) -> int:
        done = 0
        for channel in self.channels:
            messages = channel.take(budget)
            channel.answer(messages)
            done += len(messages)
        return done
