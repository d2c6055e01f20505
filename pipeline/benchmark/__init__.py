"""What the job could reach, what it reaches, and what the alternatives reach, in one run."""
