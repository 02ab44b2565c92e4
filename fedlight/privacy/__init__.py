"""What is promised about privacy, in numbers, and an attacker who tries to break it."""
