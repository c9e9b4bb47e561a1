"""Softmax to log2 or log-sqrt2 codes, and the attention product of such codes by shifts; import `api`."""
