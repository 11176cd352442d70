"""Ablation: what a model answers without what a part of it says."""
