"""Policies. `base` is the seam, `presets` the light catalogue that the registry reads."""
