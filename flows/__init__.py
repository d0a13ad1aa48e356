"""Prefect flows over the pipeline: they run stages through DVC, and import neither torch nor the models."""
