"""The mathematics of diffusion on tensors alone: no models, no configuration, no files."""
