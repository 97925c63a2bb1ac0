"""One cell of the grid: attack a batch, predict again, measure, for one attacker."""
