"""A call whose own calls share one piece of memory for their frames.

Since version 3.11 Python keeps frames in pieces of 16 KiB, which it asks of the system where calls
pass the end of one, and gives back where they return. A loop that calls across such an end does so
each time, and tests run at a depth of calls that is nobody's choice. The frame of a function with a
large stack gets a larger piece, whose rest holds what it calls.
"""

SLOTS = 2**15
"""Slots of a stack, of 8 bytes: a little more than half of a piece, whose size is a power of 2."""


def in_one_piece(function, *arguments):
    """Call a function; return its result."""
    return function(*arguments)


in_one_piece.__code__ = in_one_piece.__code__.replace(co_stacksize=SLOTS)
