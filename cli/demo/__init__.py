"""`snapctl demo`: a directory tree from this process through a module's engine to a second process.

    sender (snapctl demo) ──▶ relay-in ─┐                  ┌─ relay-out ──▶ writer (second process)
                          ◀── acks ─────┤ module "relay"   ├───── acks ◀──
                                        └──────────────────┘
                                          restarted half-way

The tree is cut into numbered chunks before anything is sent, so that a number says everything about a chunk:
sending again is sending the same number. The writer takes each number once and in order, and acknowledges
the number that it expects next; what the restarted module held is sent again from there.
"""
