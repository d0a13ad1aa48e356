"""Models writing side by side on a page in the browser: `calm demo`.

May import: inference and what is below it. Begin with: turns.py.
"""
