"""What requests ask of the sampler beyond a temperature and a seed, from the request to the device.

`options` is what one sequence asks for, `table` makes a step's tensors of it (`extras`), `stages`
changes the logits by them. A step of plain requests uses none of it.

Which tokens may be drawn at all is decided on the host, token by token: `rule_maker` makes the
rules of a request, `token_rules` are those rules, and `masks` asks them before each draw.
"""
