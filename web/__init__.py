"""The web UI and its server for one machine."""
