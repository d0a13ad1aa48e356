"""Files: written atomically, hashed, resumed, and models as folders that describe themselves.

May import: runtime, errors. Begin with: atomic.py; model_folder.py is what a trained model is on disk.
"""
