"""K tokens <-> one latent vector: the model and its training (paper, section 2).

May import: model.py torch and nn alone; training.py training, tokens, runtime, params too. Begin with: model.py.
"""
