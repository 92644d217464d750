"""The dial: how λ is read from an argument, where it is kept, and how it is turned."""
