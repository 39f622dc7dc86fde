"""R-Probe's positive controls: effects that were planted, which it has to see."""
