"""Neighbourhood attention: `api` the door, `reference` the definition, the rest bodies."""
