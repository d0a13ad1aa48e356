"""What more than one model is made of: layers, the causal backbone, cross entropy, draws, limits of shapes.

May import: torch alone. Begin with: backbone.py.
"""
