"""What is installed, what a model would get, what would be ignored, and what the machine can do.

The checks return rows and print nothing; the command shows them.
"""

from dataclasses import dataclass

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Row:
    """One finding."""

    what: str  # what was looked at; unique in a report
    found: str
    state: str = OK  # "ok"; "note": works, but not as one may think; "problem": something cannot work
    advice: str = ""  # what to do; "" where nothing is to be done
