"""Jobs: a client orders images and fetches them later. Redis holds the jobs, and Celery wakes the workers."""
