"""Training a small language model: loop, checkpoints, presets."""
