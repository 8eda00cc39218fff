"""Fits scaling laws to runs, in numpy: loss against parameters, tokens and FLOPs, and reward against compute."""
