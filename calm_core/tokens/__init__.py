"""Token ids: the tokenizer, shards of a split on disk, blocks of an evaluation.

May import: storage, runtime. Begin with: shards.py.
"""
