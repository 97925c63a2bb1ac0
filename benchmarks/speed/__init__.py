"""Speed and memory against the floor and against the peers."""
