"""`calm rehearse`: the real stages at the real shape of a run, with the smallest batch on a sliver of text.

May import: presets, params, corpus, tokens, storage; neither torch nor stages, which run in processes of their own.
Begin with: rehearse.py.
"""
