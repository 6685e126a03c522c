"""How answers are read and compared: numbers, words, LaTeX; which answers count as one vote."""
