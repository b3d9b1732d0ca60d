"""Jobs: a client orders images and fetches them later. PostgreSQL holds the jobs, and procrastinate runs them."""
