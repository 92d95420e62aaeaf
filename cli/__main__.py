"""`python -m snap.cli`, which is also what `snap-kernel ctl` executes."""

from .main import main

main()
