"""What an answer says: decimals, words, LaTeX."""
