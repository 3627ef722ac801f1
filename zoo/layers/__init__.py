"""What three or more systems share."""
