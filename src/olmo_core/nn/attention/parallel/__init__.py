"""Context parallelism: who holds which tokens, what ranks exchange, and how they attend."""
