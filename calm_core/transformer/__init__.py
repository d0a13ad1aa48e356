"""The baseline: a Transformer with a softmax on the same backbone, and its training.

May import: model.py torch and nn alone; training.py training and below too. Begin with: model.py.
"""
