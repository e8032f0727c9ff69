"""Beam search: the likeliest completions of a prompt, as far as following a few of them finds them.

hypotheses.py has the search itself, which knows of no engine; engine.py runs it on shared blocks.
"""
