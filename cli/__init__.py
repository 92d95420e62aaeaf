"""snapctl, the operator's command line. It speaks to the kernel through `snap.ipc` and imports nothing else of Snap."""
