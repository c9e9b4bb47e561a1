"""Float -> packed codes, scales and zero points in one pass; import `api`."""
