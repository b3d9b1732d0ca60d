"""Operations: the queue of a worker, readiness, the container's entry point, rolling restarts."""
