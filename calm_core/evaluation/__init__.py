"""BrierLM, from samples alone, and cross entropy beside it (paper, section 4).

May import: calm, transformer, autoencoder, tokens, runtime. Begin with: brier.py; a new metric is a module here.
"""
