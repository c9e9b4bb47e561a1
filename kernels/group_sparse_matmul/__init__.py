"""y = x @ w_hat.T for group-sparse packed weights (block-sparse rows of 1 x G groups); import `api`."""
