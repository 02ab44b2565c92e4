"""What carries messages and runs clients: one file a transport."""
