"""Say something to the echo service, and hear it again: `snapctl up`, then `python examples/hello.py`."""

from snap.ipc import SnapError, connect

try:
    with connect(name="hello") as client, client.open("echo") as channel:
        channel.send(b"hello, snap")
        print(channel.recv(timeout=1.0).decode())

        with channel.loan(1 << 20) as loan:  # a payload in place: no copy on the way there
            loan.view[:5] = b"large"
            channel.send_loan(loan)
        with channel.receive(timeout=1.0) as payload:  # nor on the way back
            print(len(payload), "bytes that begin with", bytes(payload.view[:5]))
except SnapError as error:
    raise SystemExit(f"hello: {error}") from error
