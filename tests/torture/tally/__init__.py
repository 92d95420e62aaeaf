"""The module under torture. `versions` copies this package and gives each copy its own `engine`."""
