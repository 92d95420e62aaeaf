"""relay: joins a client of the service `relay-in` with one of `relay-out`. The way that `snapctl demo` sends a tree."""
