"""Text: where it comes from and how it becomes token shards (stage tokenise).

May import: tokens, storage, runtime, params. Begin with: documents.py, then tokenise.py.
"""
