"""The machine and this process on it: device, threads and bf16, progress, signals, random generators, other processes.

May import: errors. Begin with: randomness.py, since every draw of the project goes through it.
"""
