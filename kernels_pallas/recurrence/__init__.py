"""Linear recurrences: `api` the door, `reference` the definitions, `tile` the shared arithmetic."""
