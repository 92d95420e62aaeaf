"""ticker: a module that is the client of another one."""
