"""What attacks, defenses and training methods come to."""
