"""Embeddings of texts and scores of pairs: prefills of which no token is sampled.

`files` reads what a checkpoint says of its embeddings, `params` and `results` are what a call takes
and returns, `prompts` is how a model is asked to judge, and `engine` has the two calls.
"""
