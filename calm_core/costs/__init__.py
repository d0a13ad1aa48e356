"""What a run costs: FLOPs counted and measured, speed, memory, a plan on paper (paper, section 6).

May import: the models and their trainings. Begin with: flops.py.
"""
