"""The training loop: stages, epochs, steps, and the state that makes a run resumable."""
