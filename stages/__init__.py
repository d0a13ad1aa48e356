"""The stages of dvc.yaml, a thin module each: read params and inputs, call calm_core, write outputs."""
