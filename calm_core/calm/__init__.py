"""The continuous language model: its model, its three heads and their losses, its training (paper, section 3).

May import: models and losses torch, nn and autoencoder.model alone; folder.py storage too; training.py latents,
training and below too. Begin with: model.py, then head.py and energy_score.py. A new head is a module here that keeps
to head.py.
"""
