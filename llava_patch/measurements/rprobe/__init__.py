"""R-Probe: can the first quarter of the language model rebuild an image from its projected tokens?"""
