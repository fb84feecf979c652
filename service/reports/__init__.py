"""Floor 6: what is told to the people in front of a terminal."""
