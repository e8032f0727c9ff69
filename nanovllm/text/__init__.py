"""Between text and tokens: conversations become prompts, and tokens become text as they come.

Nothing here knows the engine or imports torch.
"""
