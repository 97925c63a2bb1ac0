"""The 15 common corruptions (Hendrycks & Dietterich 2019): a control without an adversary."""
