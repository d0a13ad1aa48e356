"""The study: both models over budgets, widths and K, and what the paper's claims are worth at these sizes (section 6).

May import: costs and report; only plan.py imports torch. Begin with: point.py, then plan.py.
"""
