"""What `scripts/canary.sh` runs: throw-away environments, what is tried in each, and the record of it.

    run           the command line
    environments  resolves, makes and compares environments
    smoke         inside one: load, patch, forward, generate, save and load again, on one host
    pinned        three steps of LLaVA's own train.py, with the package, with it switched off, and without it
    record        docs/measured/canary.json and its table

`run`, `environments`, `pinned` and `record` need the standard library alone.
"""
