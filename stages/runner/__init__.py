"""What all stages do around their work: params, locks, signals, several processes, resuming after an interruption.

May import: calm_core. Begin with: run.py.
"""
