"""The kernel, but that a module which dies ever so often is started again: the torture kills it a thousand times."""

from __future__ import annotations

import sys

from snap.kernel import daemon
from snap.kernel.supervision import Limits

defaults = dict(zip(Limits.__match_args__, Limits.__init__.__defaults__ or (), strict=True))
Limits.__init__.__defaults__ = tuple({**defaults, "crashes": 100_000, "backoff_most": 0.5}.values())

if __name__ == "__main__":
    sys.exit(daemon.main())
