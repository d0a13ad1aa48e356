"""What people read: the report's page and figures, and the card beside each model.

May import: storage. Begin with: page.py.
"""
