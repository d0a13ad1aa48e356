"""The encoded corpus: the posterior of every distinct patch, once (stage encode_corpus), or of a batch in the step.

May import: autoencoder, training, tokens, storage, runtime. Begin with: encode.py.
"""
