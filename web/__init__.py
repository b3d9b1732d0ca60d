"""The page for people, and what serves it on one machine."""
