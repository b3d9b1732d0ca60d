"""The model: its folder, weights, VAE and adapters, and their compilation."""
