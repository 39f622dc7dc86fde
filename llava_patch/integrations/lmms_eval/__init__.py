"""lmms-eval integration: our tasks beside the stock ones, and failures of a patched model that end a command."""
