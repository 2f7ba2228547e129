"""A model behind an interface of the network, many texts at a time."""
