"""One image: the diffusion loop between diffusers' pipeline and the shared, compiled models."""
