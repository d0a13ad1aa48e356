"""The encoded corpus: the posterior of every distinct patch, once (stage encode_corpus).

May import: autoencoder, tokens, storage, runtime. Begin with: encode.py.
"""
