"""One file per command or noun, each imported only when it is used."""
