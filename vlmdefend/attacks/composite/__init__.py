"""Attacks made of other attacks: sequences, repetitions, targets, the mean over draws."""
