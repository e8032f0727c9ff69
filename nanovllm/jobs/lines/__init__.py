"""Lines of a job: what is asked in them, and how they are answered."""
