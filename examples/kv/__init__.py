"""A key-value store whose GETs need no work of its server."""
