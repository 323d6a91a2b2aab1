"""Networks, training loops and comparisons that the claims use."""
