"""The microkernel: supervises modules, holds the capability table, brokers channels; never on the data path."""
