"""Snap measured beside its peers, between two processes, in one run: `snapctl bench`."""
