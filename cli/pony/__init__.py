"""Measuring Pony Express as its applications meet it: `snapctl pony ping` and `snapctl pony perf`."""
