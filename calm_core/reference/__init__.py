"""Checkpoints of the reference implementation: read without trust, converted, written back.

May import: the models, tokens, storage. Begin with: importing.py; names.py is the table of names.
"""
