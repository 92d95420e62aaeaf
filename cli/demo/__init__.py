"""`snapctl demo`: a directory tree from this process through a module's engine to a second process.

    sender (snapctl demo) ──▶ relay-in ──▶ module "relay" ──▶ relay-out ──▶ writer (second process)
                                               ▲
                              upgraded · killed · its kernel killed · rolled back

Nobody sends anything twice, opens a channel again, or knows of what happens to the module. The chunks are numbered only
so that the writer can tell if one were lost or came twice; both ends hash the whole stream. The tree is sent
again from its beginning for as long as things happen, so that they always fall into the transfer.
"""
