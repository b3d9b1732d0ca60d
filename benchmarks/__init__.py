"""Compare engines, checkouts and step plans on one model: python -m benchmarks."""
