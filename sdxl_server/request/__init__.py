"""One request: its fields, their checks, and the images that it brings."""
