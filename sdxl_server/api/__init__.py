"""APIs: requests and uploads in, responses and image files out. One file for each API."""
