"""What some requests read from the last hidden states of a prompt, besides the next token.

Log-probabilities of the prompt's own tokens, an embedding, the logits of a few tokens. `readout` is
what one sequence wants and what it has got so far, `reading` what it wants of one step, and
`step_reader` reads it on the device. Nearly all steps read nothing, and use none of it.
"""
