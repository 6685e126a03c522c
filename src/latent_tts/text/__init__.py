"""What an answer says: numbers, words, LaTeX; which answers are one vote."""
