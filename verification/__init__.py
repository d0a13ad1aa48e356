"""`make verify`: whether two clean runs of the smoke pipeline on this machine give the same artefacts."""
