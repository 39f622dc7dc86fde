"""R-Probe: can the first quarter of the LLM rebuild the pixels from the projected tokens?"""
