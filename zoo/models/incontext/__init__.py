"""Systems that learn a function from the examples in their prompt."""
