"""What the rules look at, collected once: facts about the layers, the optimizer and the batches."""
