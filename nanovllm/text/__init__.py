"""Between text and tokens: conversations become prompts, and tokens become text as they come.

Nothing here imports the engine or torch.
"""
