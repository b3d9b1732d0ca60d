"""The worker's queue, and programs: readiness check, container entry point, rolling restart."""
