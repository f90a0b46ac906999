"""Policies. `base` and `spec` are the seam, `presets` what ships, which the registry reads."""
