"""ledger: numbers what other modules hand in."""
