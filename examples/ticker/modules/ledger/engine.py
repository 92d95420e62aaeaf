"""The ledger's engine: one number per entry, and who handed it in."""

from snap.modules import Array, Engine, Schema


class Book(Engine):
    """Answers each entry with its number in the book, beginning at 1, and the badge of its author."""

    schema = Schema(version=1, entries=Array("u8", 1))  # how many there are: goes on after a restart

    def poll(self, budget: int) -> int:
        done = 0
        for channel in self.channels:
            messages = channel.take(budget)
            channel.answer([self._enter(message, channel.badge) for message in messages])
            done += len(messages)
        return done

    def _enter(self, message: bytes, author: str) -> bytes:
        number = int(self.state.entries[0]) + 1
        self.state.entries[0] = number
        return b"%d %s by %s" % (number, message, author.encode())
