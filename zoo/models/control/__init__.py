"""Systems that act: recurrent cores of agents, and policies that are sequence models."""
