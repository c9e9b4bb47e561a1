"""flax.nnx models with named quantizable sites, and a zoo that trains once and caches."""
