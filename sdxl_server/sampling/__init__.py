"""Samplers: the schedulers that suit a model, and the steps of an image."""
