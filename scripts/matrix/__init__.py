"""The table of stacks, hosts and jobs; see `scripts/matrix.sh`."""
