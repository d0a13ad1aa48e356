"""The stages of dvc.yaml, a thin module each: read params and inputs, call calm_core, write outputs."""

from calm_core.runtime.waiting import wait_asleep

# `python -m stages.NAME` comes here first, before the stage's module imports torch.
wait_asleep()
