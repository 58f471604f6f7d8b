"""`heddle estimate`: what fits into memory, from a model's config alone."""
