"""A model: its folder, its weights, its adapters, and their compilation."""
