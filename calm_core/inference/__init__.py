"""Trained models at work: text at a temperature, BrierLM of any text (paper, section 5).

May import: evaluation, corpus, the models, storage. Begin with: language_model.py.
"""
