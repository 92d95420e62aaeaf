"""tally: adds up what is sent to it, by name; the example of state that outlives its process."""
