"""Settings: model-config.yaml, checked key by key."""
