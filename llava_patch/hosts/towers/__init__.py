"""Vision towers: where their parts are, which classes are known, and how each attends."""
