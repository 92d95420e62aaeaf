"""The ledger's engine: one number per entry, and who handed it in."""

from snap.modules import Engine


class Book(Engine):
    """Answers each entry with its number in the book, beginning at 1, and the badge of its author."""

    def __init__(self) -> None:
        self.entries = 0

    def poll(self, budget: int) -> int:
        done = 0
        for channel in self.channels:
            messages = channel.take(budget)
            channel.answer([self._enter(message, channel.badge) for message in messages])
            done += len(messages)
        return done

    def _enter(self, message: bytes, author: str) -> bytes:
        self.entries += 1
        return b"%d %s by %s" % (self.entries, message, author.encode())
