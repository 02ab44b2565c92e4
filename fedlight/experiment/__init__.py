"""One cell from configuration to result: build, execute, evaluate, open again."""
