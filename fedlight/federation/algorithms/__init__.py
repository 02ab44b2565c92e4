"""What clients add to their training and how the server steps: one file an algorithm, FedAvg is the base."""
