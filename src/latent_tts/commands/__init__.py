"""One file a command; the only place where configs become objects. Heavy rooms are imported inside `main`."""
