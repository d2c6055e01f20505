"""S3 on loopback for tests: a real server, and a proxy that breaks it on demand."""
