"""R-Probe as a measurement (the way of a sample: `llava_patch.probe`).

`fit.run_rprobe` is one run: `store` (frozen tokens, computed once), `train` and `resume`, `evaluate`, `error_map`, then
a `result`. `keys` tells which images the data hold, and has every digest by which stores and states are found again.
`output` and `figures` write a run; `ablation`, `compare`, `correlate` and `bootstrap` put runs side by side.
"""
