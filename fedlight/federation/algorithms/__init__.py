"""Federated algorithms, one a file; all are subclasses of FedAvg."""
