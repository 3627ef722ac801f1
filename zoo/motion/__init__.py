"""Human motion: skeletons, motion matching, a scheduler of stories, and endless playing."""
