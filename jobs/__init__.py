"""Pictures that a client orders, leaves, and comes back for: Redis holds jobs, Celery wakes workers."""
