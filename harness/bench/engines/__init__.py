"""Other libraries on the same layers, as a second opinion: one file each, and nothing else is touched for a new one.

Never a default: their arithmetic is theirs.
"""
