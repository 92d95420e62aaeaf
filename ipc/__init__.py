"""What both ends of a connection share, and what an application imports."""
