"""Weights on disk: our folders (folder.py, writing.py, lock.py) and checkpoints of others (foreign.py, pickles.py)."""
