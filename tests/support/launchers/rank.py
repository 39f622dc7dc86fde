"""Runs a training script as one of torchrun's ranks, unchanged: `rank.py SCRIPT ...`.

The script's work is done and written when it returns. A rank that then takes its interpreter down may abort in gloo's
threads ("terminate called without an active exception"), whether or not its groups were destroyed, and takes the other
ranks along; so ranks meet once more and leave without that.
"""

import os
import runpy
import sys


def leave() -> None:
    """End this process with success, after every rank has come this far."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    leave()
