"""How a patch gets on a model and off again: `patch`, the handle, and our part of a checkpoint."""
