"""What all stages do around their work: params, locks, signals, several processes, going on after an interruption.

May import: calm_core. Begin with: run.py.
"""
