"""The dial: what λ is, where it is kept, and how it is turned."""
