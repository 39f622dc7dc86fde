"""lmms-eval integration: our tasks beside the stock ones, and failures of a patched model made loud."""
