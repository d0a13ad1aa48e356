"""One training step and the run around it, the same for all three models.

May import: tokens, nn, storage, runtime, params. Begin with: loop.py.
"""
