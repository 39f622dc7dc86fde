"""Where other programs meet llava_patch: the import hook, LLaVA's training scripts, and lmms-eval."""
