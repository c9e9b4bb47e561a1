"""y = x @ dequantize(w).T for packed W1..W8 weights; import `api`."""
