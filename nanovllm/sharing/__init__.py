"""What requests share: their prompts' cache blocks, one computation of equal prompts, an order."""
