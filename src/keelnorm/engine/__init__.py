"""What lies between a layer's call and the loops over memory. Nothing in here is public."""
