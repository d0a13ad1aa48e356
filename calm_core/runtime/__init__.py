"""The machine and this process on it: device, threads, bf16, progress, signals, random numbers, other processes.

May import: errors. Begin with: randomness.py, since every draw of the project goes through it.
"""
