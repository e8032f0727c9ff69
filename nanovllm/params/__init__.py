"""What the fields of a request's parameters have in common: checks, assignment, copies."""
