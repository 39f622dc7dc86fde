"""One command for many training runs: a grid of settings times seeds, resumable, with mean, spread and a plot."""
