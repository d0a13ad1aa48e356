"""CALM, the model package: continuous autoregressive language models (arXiv 2510.27688).

Models know nothing of training, files or devices; objectives, metrics and samplers take plain tensors or
callables. Stages read files and call into this package; nothing here imports them.
"""
