"""On the path of the torture's kernels, those that their keeper starts too: a module that dies ever so often is started
again, for the torture kills it a thousand times."""

from __future__ import annotations

import sys

if "snap.kernel" in sys.orig_argv:
    from snap.kernel.supervision import Limits

    defaults = dict(zip(Limits.__match_args__, Limits.__init__.__defaults__ or (), strict=True))
    Limits.__init__.__defaults__ = tuple({**defaults, "crashes": 100_000, "backoff_most": 0.5}.values())
