"""Routing of image tokens around deep decoder layers, and pruning.

`reference.py` is the definition of every variant in plain mathematics; read it first. `schedule.py` says what each
layer does, `routed_pass.py` runs it, `side_branch.py`, `pruning.py` (`fastv.py`) and `cache.py` are its parts.
"""
