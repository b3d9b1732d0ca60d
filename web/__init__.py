"""The web UI, and a program that serves it on one machine."""
