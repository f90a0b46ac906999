"""vlarl-bench: compare RL fine-tuning methods for vision-language-action policies on one footing."""

__version__ = "0.1.0"
