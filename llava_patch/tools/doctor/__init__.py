"""`llava-patch doctor`: what is installed, what a model would get, what would be ignored, and what the machine can do.

The checks return rows and print nothing; `command.py` shows them.
"""
