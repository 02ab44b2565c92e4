"""A deployment: what institutions agree on, what their nodes answer, and the apps that Flower runs."""
