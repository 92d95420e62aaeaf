"""The torture of upgrades: clients at full rate, and everything that can happen to what serves them.

    python -m tests.torture --events 1000 --seed 7

* `ops`: operations, their answers, and the model of what both must be.
* `ledger`: what each client notes outside the system, and the check of it.
* `client`: one client process, in five ways of waiting.
* `versions`: the module under torture, in versions that work and versions that fail at each phase.
* `events`: the plan, drawn from the seed.
* `world`: the kernel, the clients, and who is who among the processes.
* `driver`: plays the plan, waits until all is well again after each event, and judges.
* `report`: what a run comes to.
* `guard`: sees to it that nothing is left, however a run ends.
"""
