"""echo: sends every message back. The example of a module, once in Rust (`native:echo`) and once in Python."""
