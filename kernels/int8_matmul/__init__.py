"""W8A8: int8 codes times int8 codes in int32, dequantized in the epilogue; import `api`."""
